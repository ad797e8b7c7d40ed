# SPDX-License-Identifier: Apache-2.0
"""A GPU's units on the CPU: carriers of codes that compute as the unit does, and units with one flaw each.

What surrounds a unit (types, padding, pieces) is the library's own; only the call of the unit is replaced, and not even
that where torch has the operator on the CPU too (int8 and float8).
"""

import collections
import contextlib
import dataclasses

import torch
from torch import Tensor

from dpquant.backends.algebra import convolved
from dpquant.backends.carriers import BF16, FP8, INT8, TF32, Carrier
from dpquant.backends.choose import Choices, Machine
from dpquant.backends.cuda import Cuda
from dpquant.backends.geometry import Geometry


def rounded(x: Tensor, bits: int) -> Tensor:
    """float32 to this many bits after the leading one, to nearest: 10 are TF32, 7 bfloat16."""
    dropped = 23 - bits
    return ((x.contiguous().view(torch.int32) + (1 << (dropped - 1))) & -(1 << dropped)).view(torch.float32)


def of_float32(a: Tensor, b: Tensor) -> Tensor:
    """Float32 accumulators, which round sums beyond 2^24."""
    return a.float() @ b.float()


def of_tf32(a: Tensor, b: Tensor) -> Tensor:
    return rounded(a, 10) @ rounded(b, 10)


def convolved_in_tf32(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    layout = torch.channels_last
    x, weight = (rounded(t, 10).contiguous(memory_format=layout) for t in (x, weight))
    return convolved(x, weight, None, geometry)


def of_hopper(a: Tensor, b: Tensor) -> Tensor:
    """Float8 as Hopper adds it up: 14 bits are kept of the sum of every 32 terms."""
    total = torch.zeros(a.shape[0], a.shape[1], b.shape[2], dtype=torch.float64)
    for some, part in zip(a.double().split(32, 2), b.double().split(32, 1), strict=True):
        total += some @ part
        quantum = torch.exp2(total.abs().clamp(min=1).log2().floor() - 13)
        total = (total / quantum).trunc() * quantum
    return total.float()


def wrong_beyond_4096(a: Tensor, b: Tensor) -> Tensor:
    product = of_float32(a, b)
    return product + 1 if a.shape[2] > 4096 else product


def of_23_bits(a: Tensor, b: Tensor) -> Tensor:
    """Wrong for the greatest sums only."""
    return of_float32(a, b).clamp(-(2**23), 2**23)


def without_the_operator(a: Tensor, b: Tensor) -> Tensor:
    raise NotImplementedError("Could not run it. A second sentence.\nA second line.")


def winograds(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """A convolution that is inexact for 3x3 kernels without a stride, as an algorithm that transforms its operands."""
    y = convolved_in_tf32(x, weight, geometry)
    return y + 2**-10 if geometry.kernel == (3, 3) and geometry.stride == (1, 1) else y


def here(carrier: Carrier, **changes) -> Carrier:
    return dataclasses.replace(carrier, device_type="cpu", **changes)


TF32_HERE = here(TF32, unit=of_tf32, convolution=convolved_in_tf32)
BF16_HERE = here(BF16, unit=of_float32)
INT8_HERE = here(INT8)
FP8_HERE = here(FP8)
EXACT = (TF32_HERE, BF16_HERE, INT8_HERE, FP8_HERE)

HOPPERS = here(FP8, unit=of_hopper)
BEYOND_4096 = here(BF16, unit=wrong_beyond_4096)
OF_23_BITS = here(BF16, unit=of_23_bits)
MISSING = here(BF16, unit=without_the_operator)
WINOGRADS = here(TF32, unit=of_tf32, convolution=winograds)


def backend_of(*carriers: Carrier, kernels: bool = False) -> Cuda:
    """The backend for GPUs, on the CPU; its kernels would run in Triton's interpreter, which is slow."""
    backend = Cuda(carriers, device_type="cpu", kernels=kernels)
    backend.name = f"cuda on {', '.join(carrier.name for carrier in carriers)}"
    return backend


def taking_turns() -> contextlib.AbstractContextManager[None]:
    """Until the block ends every way that there is gets its turn, and none is timed."""
    taken: collections.Counter[str] = collections.Counter()

    def timed(ways):
        seconds = {name: float(taken[name]) for name in ways}
        taken[min(ways, key=seconds.__getitem__)] += 1
        return seconds

    return Choices(timed=timed, machine=Machine(None)).active()
