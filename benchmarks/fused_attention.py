# SPDX-License-Identifier: Apache-2.0
"""Times attention forward and backward: each kernel of `native/attention.cpp` against torch's, in turns.

    scripts/bench fused_attention [--rounds 25]

Queries, keys and values lie as projections leave them; half of the examples have a quarter of padding, which a mask
hides. All sides are compared with float64 before they are timed. Figures are medians in microseconds of wall time for
an example and head, on one thread and on all.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.results import keep_rows
from dpquant.engine.fused_attention import KERNELS, FusedAttention

SHAPES = [  # examples, heads, positions, features of a head
    (32, 12, 64, 32),  # MiniLM
    (32, 12, 128, 32),
    (16, 6, 197, 64),  # a small vision transformer
    (8, 12, 256, 64),
    (4, 12, 512, 64),
]
TOLERANCE = 1e-5

Compute = Callable[..., Tensor]


class Case:
    """Calls of all sides for one shape."""

    def __init__(self, batch: int, heads: int, positions: int, features: int):
        generator = torch.Generator().manual_seed(0)
        self.leaves = [
            torch.randn(batch, positions, heads, features, generator=generator).transpose(1, 2).requires_grad_()
            for _ in range(3)
        ]
        self.grad = torch.randn(batch, positions, heads, features, generator=generator).transpose(1, 2)
        mask = torch.zeros(batch, 1, positions, positions)
        mask[::2, ..., -(positions // 4) :] = torch.finfo(torch.float32).min
        self.mask, wide = mask, mask.expand(batch, heads, positions, positions)
        self.sides: dict[str, Compute] = {"torch": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask)}
        for kernel in KERNELS:
            self.sides[kernel] = lambda q, k, v, kernel=kernel: FusedAttention.apply(
                q, k, v, wide, features**-0.5, False, kernel
            )

    def results(self, compute: Compute) -> list[Tensor]:
        y = compute(*self.leaves)
        return [y.detach(), *torch.autograd.grad(y, self.leaves, self.grad)]

    def check(self) -> None:
        """Compare all sides with float64; exit with an error if one is wrong."""
        exact = [x.detach().double().requires_grad_() for x in self.leaves]
        with sdpa_kernel(SDPBackend.MATH):
            y = F.scaled_dot_product_attention(exact[0], exact[1], exact[2], self.mask.double())
        right = [y.detach(), *torch.autograd.grad(y, exact, self.grad.double())]
        for side, compute in self.sides.items():
            for found, one in zip(self.results(compute), right, strict=True):
                error = ((found - one).abs().max() / one.abs().max()).item()
                if not error < TOLERANCE:
                    raise SystemExit(f"Expected {side} to be within {TOLERANCE} of float64; got an error of {error}.")

    def seconds(self, compute: Compute) -> tuple[float, float]:
        """Return the wall time of the forward and of the backward pass."""
        began = time.perf_counter()
        y = compute(*self.leaves)
        between = time.perf_counter()
        torch.autograd.grad(y, self.leaves, self.grad)
        return between - began, time.perf_counter() - between


def measured(case: Case, rounds: int) -> dict[str, list[float]]:
    """Return {side: microseconds for an example and head, forward and backward, medians of turns}."""
    times: dict[str, list[tuple[float, float]]] = {side: [] for side in case.sides}
    for _ in range(rounds):
        for side, compute in case.sides.items():
            times[side].append(case.seconds(compute))
    share = 1e6 / case.grad[:, :, 0, 0].numel()
    return {
        side: [round(statistics.median(part) * share, 2) for part in zip(*many, strict=True)]
        for side, many in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25)
    rounds = parser.parse_args().rounds
    if not KERNELS:
        raise SystemExit("Expected a processor that has a kernel; this one has none.")
    rows = []
    for threads, shape in itertools.product(sorted({1, torch.get_num_threads()}), SHAPES):
        torch.set_num_threads(threads)
        case = Case(*shape)
        case.check()
        microseconds = measured(case, rounds)
        ratio = sum(microseconds["torch"]) / sum(microseconds[KERNELS[0]])
        print(f"{threads} threads, {shape}: {microseconds}; torch / {KERNELS[0]} {ratio:.2f}", flush=True)
        rows.append({"threads": threads, "shape": shape, "microseconds": microseconds})
    keep_rows("fused_attention", rows, rounds)


if __name__ == "__main__":
    main()
