# SPDX-License-Identifier: Apache-2.0
"""Times GroupNorm in a private step: fused loops against torch's operators, in turns, on maps of residual networks.

    python -m benchmarks.norms [--rounds 15]

torch's side does the work of a step without the fused loops: forward, backward, then each example's gradients of weight
and bias from the normalised input. Both sides are compared with float64 before they are timed. Figures are medians in
microseconds per example; `copy` is one pass that reads and writes a map of the same size.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpquant.backends.malloc import working_memory
from dpquant.engine.context import twin_of
from dpquant.engine.contributions import Materialised
from dpquant.engine.group_norm import TapedGroupNorm
from dpquant.engine.per_example import contributions_of

SHAPES = [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4)]
BATCH_SIZES = (16, 64)
GROUPS, EPS, TOLERANCE = 32, 1e-5, 1e-5
COLUMNS = ("copy", "forward", "torch forward", "backward", "torch backward", "torch per example")


def _not_asked(module: nn.Module, alone: Tensor, among: Tensor) -> None:
    raise AssertionError("a norm has a formula")


class Kept:
    """Tape that stores the last contribution of each parameter."""

    anchor, listening = torch.zeros((), requires_grad=True), True

    def __init__(self):
        self.kept: dict[Tensor, Materialised] = {}

    def add(self, parameter: Tensor, contribution: Materialised) -> None:
        self.kept[parameter] = contribution


class Case:
    """Calls of both sides for one shape and batch size."""

    def __init__(self, batch: int, shape: tuple[int, int, int]):
        generator = torch.Generator().manual_seed(0)
        self.x, self.grad = (
            torch.randn(batch, *shape, generator=generator).contiguous(memory_format=torch.channels_last)
            for _ in range(2)
        )
        self.norm = torch.nn.GroupNorm(GROUPS, shape[0], eps=EPS).requires_grad_(False)
        for parameter in self.norm.parameters():
            parameter.normal_(generator=generator)
        self.tape = Kept()
        self.fused = twin_of(TapedGroupNorm, self.norm, tape=self.tape)
        self.leaf = self.x.clone().requires_grad_()
        self.y = self.torch_y = self.leaf

    def copy(self) -> Tensor:
        return self.x * 1.5

    def forward(self) -> Tensor:
        self.y = self.fused(self.leaf)
        return self.y.detach()

    def backward(self) -> tuple[Tensor, ...]:
        (grad_x,) = torch.autograd.grad(self.y, self.leaf, self.grad)
        return grad_x, *(self.tape.kept[p].per_example() for p in (self.norm.weight, self.norm.bias))

    def torch_forward(self) -> Tensor:
        self.torch_y = self.norm(self.leaf)
        return self.torch_y.detach()

    def torch_backward(self) -> Tensor:
        return torch.autograd.grad(self.torch_y, self.leaf, self.grad)[0]

    def torch_per_example(self) -> tuple[Tensor, ...]:
        parts = contributions_of(self.norm, (self.x,), {}, self.torch_y.detach(), self.grad, compare=_not_asked)
        return parts["weight"].per_example(), parts["bias"].per_example()

    def check(self) -> None:
        """Compare both sides with float64; exit with an error if one is wrong."""
        x, grad = self.x.double().requires_grad_(), self.grad.double()
        y = F.group_norm(x, GROUPS, self.norm.weight.double(), self.norm.bias.double(), EPS)
        (grad_x,) = torch.autograd.grad(y, x, grad)
        normalised = F.group_norm(x.detach(), GROUPS, None, None, EPS)
        exact = (y.detach(), grad_x, (grad * normalised).sum((2, 3)), grad.sum((2, 3)))
        sides = {
            "fused": (self.forward(), *self.backward()),
            "torch": (self.torch_forward(), self.torch_backward(), *self.torch_per_example()),
        }
        for side, results in sides.items():
            for result, right in zip(results, exact, strict=True):
                error = ((result - right).abs().max() / right.abs().max()).item()
                if not error < TOLERANCE:
                    raise SystemExit(f"Expected {side} to be within {TOLERANCE} of float64; got an error of {error}.")


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def medians(case: Case, rounds: int) -> list[float]:
    """Return the median microseconds per example for each column; the calls take turns."""
    calls = [getattr(case, column.replace(" ", "_")) for column in COLUMNS]
    times = [[seconds(call) for call in calls] for _ in range(rounds)]
    return [statistics.median(column) * 1e6 / len(case.x) for column in zip(*times, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description="GroupNorm: the fused loops against torch's operators")
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}; microseconds an example")
    print(f"{'map':>10} {'batch':>5}", *(f"{column:>17}" for column in COLUMNS), f"{'torch / fused':>13}")
    with working_memory():
        for shape in SHAPES:
            for batch in BATCH_SIZES:
                case = Case(batch, shape)
                case.check()
                medians(case, 2)  # warm
                row = dict(zip(COLUMNS, medians(case, rounds), strict=True))
                fused = row["forward"] + row["backward"]
                theirs = row["torch forward"] + row["torch backward"] + row["torch per example"]
                figures = " ".join(f"{value:17.1f}" for value in row.values())
                print(f"{'x'.join(map(str, shape)):>10} {batch:>5} {figures} {theirs / fused:13.2f}")


if __name__ == "__main__":
    main()
