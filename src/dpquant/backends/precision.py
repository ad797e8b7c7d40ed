# SPDX-License-Identifier: Apache-2.0
"""How float32 products are computed: on which inputs, whatever the user of the process has allowed.

torch may round the float32 inputs of matrix products and convolutions: to TF32 (11 significant bits) on a GPU, where it
does so for convolutions unless it is told otherwise, or to bfloat16 (8 bits) on a CPU, after
`torch.set_float32_matmul_precision("medium")`. Norms and sums of per-example gradients of *values* must not be rounded
so: a norm that is too small by 2^-11 lets a contribution exceed the clipping norm, as clip factors allow for errors of
2^-17 only (`algebra.ROUND_OFF`). Forward products and input gradients may be: their results are operands like others.

The settings are those of the process, so a block changes them for other threads too.
"""

import contextlib
from collections.abc import Iterator, Sequence

import torch

_EVERYTHING = ("generic", "all")
_CUDA = (("cuda", "all"), ("cuda", "matmul"), ("cuda", "conv"), ("cuda", "rnn"))
_CPU = (("mkldnn", "all"), ("mkldnn", "matmul"), ("mkldnn", "conv"), ("mkldnn", "rnn"))
_ERRORS = {"tf32": 2.0**-11, "bf16": 2.0**-8}  # of an input that is rounded to nearest

# What the properties `torch.backends.....fp32_precision` call. Through the properties a block takes 75 us, by these 10.
_get, _set = torch._C._get_fp32_precision_getter, torch._C._set_fp32_precision_setter


@contextlib.contextmanager
def ieee_float32() -> Iterator[None]:
    """Round no input of a float32 product until the block ends, on any device."""
    with _products("ieee", (*_CUDA, *_CPU)):
        yield


@contextlib.contextmanager
def tf32_float32() -> Iterator[None]:
    """Round the inputs of float32 products on a GPU to TF32, where it has the units, until the block ends.

    cuDNN takes a convolution that gives the same bits every time, and does not try several.
    """
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        with _products("tf32", _CUDA):
            yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before


@contextlib.contextmanager
def bfloat16_factors() -> Iterator[None]:
    """Allow bfloat16 inputs with float32 accumulation in float32 matrix products of a CPU until the block ends.

    If the inputs are bfloat16 numbers already, the products are the same and only the time changes. A processor without
    bfloat16 instructions keeps computing in float32.
    """
    with _products("bf16", _CPU[:2]):
        yield


def input_error(device: torch.device) -> float:
    """Return the largest relative error that the inputs of some float32 product on a device may get at present."""
    places = _CPU if device.type == "cpu" else _CUDA
    return max(_ERRORS.get(_get(*place), 0.0) for place in places)


@contextlib.contextmanager
def _products(wanted: str, places: Sequence[tuple[str, str]]) -> Iterator[None]:
    """Compute float32 products in precision `wanted` until the block ends, at all of these places, parents first.

    A place without a setting of its own inherits one. Python cannot read which places inherit, and cannot set torch's
    initial value of cuDNN again. So the setting that all inherit is changed first; a place that then still has another
    one has it as its own, and gets it back. Settings by the older `allow_tf32` are settings of places too.
    """
    changed = []
    try:
        for unit, operation in (_EVERYTHING, *places):
            before = _get(unit, operation)
            if before != wanted:
                changed.append((unit, operation, before))
                _set(unit, operation, wanted)
        yield
    finally:
        for setting in reversed(changed):
            _set(*setting)
