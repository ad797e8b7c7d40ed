# SPDX-License-Identifier: Apache-2.0
"""What a run measures on this machine before it begins: which layers gain from being quantized, how many examples a
backward pass should take, and how much memory that needs.

All of it is measured on made-up data: the choices depend on shapes and on the machine, never on a record.
"""

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dpquant.choice import measured, timed
from dpquant.clip import PerExampleLoss, clipped_sum, take_rows
from dpquant.cost import LayerTimes
from dpquant.errors import SettingError
from dpquant.formats import FULL_PRECISION, Precision
from dpquant.hardware import forget_peak, memory_mib
from dpquant.layers import QuantizableLayer, current_precisions, quantizable_layers, set_precisions
from dpquant.working_memory import give_back

_SMALLEST, _FIRST, _LARGEST = 4, 32, 256  # microbatches: the smallest, the first that is tried, the largest
_WORTHWHILE = 1.03  # speed-up for which a microbatch is doubled
_LAYER_MICROBATCHES = 2  # of a layer's trial, over which its weight is quantized once
_MIB = 2**10  # in a GiB


def layer_times(
    model: nn.Module, loss_fn: PerExampleLoss, batch: Any, *, microbatch_size: int, expected_batch_size: float
) -> dict[str, LayerTimes]:
    """Each layer's time, alone.

    Args:
      model: a prepared model.
      loss_fn: `(model, batch) -> Tensor (B,)`.
      batch: made-up; only its shapes count.
      microbatch_size: examples a backward pass.
      expected_batch_size: examples a step, over which a weight is quantized once.
    Returns: for every layer that is called and trained; each shape is measured once a process.
    """
    num_microbatches = min(max(round(expected_batch_size / microbatch_size), 1), _LAYER_MICROBATCHES)
    return {
        name: _times(quantizable_layers(model)[name], shape, needs_gradient, microbatch_size, num_microbatches)
        for name, (shape, needs_gradient) in _inputs(model, loss_fn, batch).items()
    }


def _inputs(model: nn.Module, loss_fn: PerExampleLoss, batch: Any) -> dict[str, tuple[torch.Size, bool]]:
    """{layer whose weight is trained: (shape of one example's input, whether a gradient flows into it)}."""
    found: dict[str, tuple[torch.Size, bool]] = {}

    def listener(name: str) -> Callable[..., None]:
        def listen(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found[name] = inputs[0].shape[1:], inputs[0].requires_grad

        return listen

    handles = [
        layer.register_forward_pre_hook(listener(name))
        for name, layer in quantizable_layers(model).items()
        if layer.weight.requires_grad
    ]
    try:
        with torch.enable_grad(), torch.random.fork_rng(devices=[]):
            loss_fn(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _times(
    layer: QuantizableLayer, shape: torch.Size, needs_gradient: bool, size: int, num_microbatches: int
) -> LayerTimes:
    alone = copy.deepcopy(layer)
    alone._forward_hooks.clear()
    alone._forward_pre_hooks.clear()
    inputs = torch.randn(size * num_microbatches, *shape, generator=torch.Generator().manual_seed(0))

    def losses(module: nn.Module, x: Tensor) -> Tensor:
        return module(x.requires_grad_(needs_gradient)).square().flatten(1).sum(1)

    def run(quantized: bool) -> None:
        alone.precision = layer.chosen if quantized else FULL_PRECISION
        _clipped_sum(alone, losses, inputs, size)

    question = (
        "layer", type(layer), layer.geometry, layer.weight.shape, shape, needs_gradient, layer.chosen, layer.backend,
        size, num_microbatches, torch.get_num_threads(),
    )  # fmt: skip
    seconds = measured(question, {"full": partial(run, False), "quantized": partial(run, True)})
    return LayerTimes(full=seconds["full"] / len(inputs), quantized=seconds["quantized"] / len(inputs))


def fastest_microbatch_size(
    model: nn.Module,
    loss_fn: PerExampleLoss,
    batch: Any,
    precisions: Mapping[str, Precision],
    *,
    expected_batch_size: float,
    memory: float | None,
) -> int:
    """The number of examples a backward pass with which a step takes the least time, within the memory.

    It is doubled as long as that gains and fits. A batch fills its last microbatch up, which counts against large ones.

    Args:
      model: a prepared model.
      loss_fn: `(model, batch) -> Tensor (B,)`.
      batch: made-up; its rows are used again and again.
      precisions: of the layers that run quantized, as in an epoch.
      expected_batch_size: examples a step.
      memory: that the process may use at its peak, GiB; None: no limit.
    Raises:
      SettingError: not even the smallest microbatch fits.
    """
    before = current_precisions(model)
    start = 0.0 if memory is None else forget_peak() / _MIB

    def run(size: int, num_examples: int, precisions: Mapping[str, Precision]) -> None:
        set_precisions(model, precisions)
        rows = torch.arange(num_examples) % len(_first_tensor(batch))
        _clipped_sum(model, loss_fn, take_rows(batch, rows), size)

    def peak(size: int) -> float:
        """GiB in use so far, once microbatches of this size have been tried: most where nothing is quantized."""
        run(size, size, {})
        return memory_mib()[1] / _MIB

    try:
        size = _FIRST if memory is None else _SMALLEST
        used = 0.0 if memory is None else peak(size)
        if memory is not None and used > memory:
            raise SettingError(
                f"Expected memory of at least {used:.2f} GiB for this model and data; got memory={memory:g}. So "
                f"much is in use with {size} examples a backward pass. Allow more, or take a smaller model."
            )
        while size < min(_LARGEST, expected_batch_size):
            # what is in use grows at most in proportion to the examples
            if memory is not None and used + (used - start) > memory:
                break
            used = 0.0 if memory is None else peak(2 * size)
            seconds = timed({str(number): partial(run, number, 2 * size, precisions) for number in (size, 2 * size)})
            filled_up = (1 + size / expected_batch_size) / (1 + size / 2 / expected_batch_size)
            if size >= _FIRST and seconds[str(size)] < _WORTHWHILE * filled_up * seconds[str(2 * size)]:
                break
            size *= 2
    finally:
        set_precisions(model, before)
        give_back()  # a run with smaller microbatches does not need what the largest one took
    return size


def _clipped_sum(model: nn.Module, loss_fn: PerExampleLoss, batch: Any, size: int) -> None:
    ids = torch.arange(len(_first_tensor(batch)))
    with torch.random.fork_rng(devices=[]):
        clipped_sum(model, loss_fn, batch, max_grad_norm=1.0, record_ids=ids, step=0, seed=0, microbatch_size=size)


def _first_tensor(batch: Any) -> Tensor:
    """Some tensor of a batch; all have the same number of rows."""
    if isinstance(batch, Tensor):
        return batch
    return _first_tensor(next(iter(batch.values() if isinstance(batch, dict) else batch)))
