# SPDX-License-Identifier: Apache-2.0
"""Attention in full precision on the CPU by a native kernel, wherever a model calls F.scaled_dot_product_attention.

    p[t, s] = softmax over s of (scale * q[t] k[s] + mask[t, s]),        out[t] = sum over s of p[t, s] v[s]

torch's kernel calls the BLAS library for every product of every head. Where sequences are short these calls take longer
than the products, and it keeps the output for the gradients, which layers with codes need no more. The kernel of
`native/attention.cpp` has a head in the cache, computes the probabilities again in the backward pass, and keeps q, k
and v. A head's sums are formed by one thread in one order: no bit of an example follows from the others.

While a step runs, `attention` stands in torch.nn.functional in place of torch's function, which it calls for all that
the kernel does not compute. A TorchFunctionMode would also see the 70,000 other calls of a step, at a microsecond each.

Symbols: B examples, N heads, L queries, S keys, E features of a head.
"""

import contextlib
import math
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpquant.engine.attention import added
from dpquant.native import kernels as _native

KERNELS: Sequence[str] = () if _native is None else _native.float_kernels()
"""The kernels that this processor has, `avx512` and `avx2`, the fastest first."""

_LANES = 16  # the kernels take features by so many
_torchs = F.scaled_dot_product_attention
_lock, _blocks = threading.Lock(), 0  # how many blocks of `fused_attention` run, in all threads


@contextlib.contextmanager
def fused_attention() -> Iterator[None]:
    """Let F.scaled_dot_product_attention be `attention` until the block ends, in all threads."""
    global _blocks
    with _lock:
        _blocks += 1
        F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        with _lock:
            _blocks -= 1
            if not _blocks:
                F.scaled_dot_product_attention = _torchs


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Compute what F.scaled_dot_product_attention does, with its arguments and errors, by the kernel where it can.

    The kernel takes float32 on the CPU, `(B, N, L, E)` with E a multiple of 16, and masks that are not trained. Dropout
    and grouped queries are torch's.

    Privacy: per example: the kernel computes every head of every example by itself.
    Source: Dao et al., arXiv 2205.14135, for the backward pass that computes the probabilities again.
    """
    plain = not dropout_p and not enable_gqa and not (is_causal and attn_mask is not None)
    if not plain or not _fits(query, key, value, attn_mask):
        return _torchs(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    mask = None if attn_mask is None else _numbers(attn_mask).expand(*query.shape[:3], key.shape[2])
    factor = 1 / math.sqrt(query.shape[3]) if scale is None else scale
    return FusedAttention.apply(query, key, value, mask, float(factor), bool(is_causal), KERNELS[0])


class FusedAttention(torch.autograd.Function):
    """Runs a kernel forward and backward: `(B, N, L, E)` from q, and k and v `(B, N, S, E)`.

    The mask `(B, N, L, S)` is added to the scores and has no gradient. `causal` hides key s from queries before it.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool, kernel: str):
        assert _native is not None
        out = _empty_like(q)
        ctx.save_for_backward(q, k, v, mask)
        ctx.options = {"scale": scale, "causal": causal, "kernel": kernel}
        _native.attention(*_arrays(q, k, v, mask, out), **ctx.options, threads=torch.get_num_threads())
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride] - the decorator's
        assert _native is not None
        q, k, v, mask = ctx.saved_tensors
        grad = grads[0] if grads[0].stride(3) == 1 else grads[0].contiguous()
        found = [_empty_like(x) for x in (q, k, v)]
        _native.attention_backward(
            *_arrays(q, k, v, mask, grad, *found), **ctx.options, threads=torch.get_num_threads()
        )
        return *found, None, None, None, None


def _fits(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    """Return whether a kernel takes these tensors. Shapes that do not go together are left to torch's error."""
    if not KERNELS or torch._C._are_functorch_transforms_active():  # vmap has no tensors that a kernel could read
        return False
    if not all(x.ndim == 4 and x.dtype == torch.float32 and x.device.type == "cpu" for x in (q, k, v)):
        return False
    if q.shape[:2] != k.shape[:2] or k.shape != v.shape or q.shape[3] != k.shape[3]:
        return False
    if not q.numel() or not k.numel() or q.shape[3] % _LANES or any(x.stride(3) != 1 for x in (q, k, v)):
        return False
    if mask is None:
        return True
    if mask.dtype not in (torch.float32, torch.bool) or mask.device.type != "cpu" or mask.requires_grad:
        return False
    scores = (*q.shape[:3], k.shape[2])
    if not 1 <= mask.ndim <= 4 or mask.shape[-1] != scores[-1]:
        return False
    return all(size in (1, full) for size, full in zip(mask.shape, scores[4 - mask.ndim :], strict=True))


def _numbers(mask: Tensor) -> Tensor:
    """Return a mask as numbers that are added to scores, its rows contiguous. In torch's function True is seen."""
    numbers = added(~mask, torch.float32) if mask.dtype == torch.bool else mask
    return numbers if numbers.stride(-1) == 1 else numbers.contiguous()


def _empty_like(x: Tensor) -> Tensor:
    """Return an empty tensor like x, in which the heads of a position lie beside each other, as in its projection."""
    B, N, L, E = x.shape
    return x.new_empty_strided((B, N, L, E), (L * N * E, E, N * E, 1))


def _arrays(*tensors: Tensor | None) -> list[Any]:
    """Return NumPy's views: binding them to C++ takes less time than binding tensors."""
    return [None if x is None else x.detach().numpy() for x in tensors]
