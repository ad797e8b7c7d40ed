# SPDX-License-Identifier: Apache-2.0
"""Quantized products of attention, Q K^T and P V with one scale for each example and head: error, accuracy and time.

    scripts/bench attention
    scripts/bench attention --seeds 1 --steps 60

The product leaves them in full precision. This script shows why, in three parts:

- `errors`: relative error of an attention's output and input gradients, where all operands are codes.
- `accuracies`: private training of a small transformer on handwritten digits, every row of an image a token. Linear
  layers stay in full precision, so that attention alone is compared. Not a private run: draws follow from seeds.
- `times`: processor time for an example and head, one thread, of torch's fused attention, of its float32 products
  alone, of quantizing their operands alone, and of the int8 products with the kernels that dpquant has, whose right
  operand has to be packed for every head. Medians of the ratios of sides that take turns.

Symbols: B examples, N heads, T positions, D features of a head.
"""

import argparse
import dataclasses
import itertools
import json
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import dpquant
from benchmarks.results import folder_here
from dpquant.backends.geometry import Geometry
from dpquant.backends.qtensor import QTensor
from dpquant.backends.quantize import quantize_rows
from dpquant.backends.registry import resolve
from dpquant.formats import RECIPES, RoleFormat, precision
from dpquant.machine import Hardware
from dpquant.rounding import row_keys

FORMATS = ("full", "int8", "luq-fp4")
HEADS, FEATURES = 12, 32  # of MiniLM
LENGTHS = (64, 128)
EXAMPLES = 16

_draws = itertools.count()


def codes(x: Tensor, role: RoleFormat) -> Tensor:
    """Return values `(B, N, T, D)` rounded to codes with one scale for each example and head."""
    rows = x.flatten(0, 1)
    keys = row_keys(next(_draws), torch.arange(len(rows)))
    return quantize_rows(rows, role, keys).dequantize().view(x.shape)


class Product(torch.autograd.Function):
    """a @ b with both operands, and the gradient of the result, in codes."""

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor, format: str) -> Tensor:
        ctx.gradient = RECIPES[format].gradient
        a, b = (codes(x, RECIPES[format].activation) for x in (a, b))
        ctx.save_for_backward(a, b)
        return a @ b

    @staticmethod
    def backward(ctx, *grads: Tensor):
        a, b = ctx.saved_tensors
        g = codes(grads[0], ctx.gradient)
        return g @ b.transpose(2, 3), a.transpose(2, 3) @ g, None


def attention(q: Tensor, k: Tensor, v: Tensor, format: str) -> Tensor:
    """Return the attention of `(B, N, T, D)`, its two products in a format or in full precision."""
    product = torch.matmul if format == "full" else lambda a, b: Product.apply(a, b, format)
    scores = product(q / q.shape[-1] ** 0.5, k.transpose(2, 3))
    return product(scores.softmax(-1), v)


def errors(repeats: int = 8) -> dict[str, Any]:
    """Return {format: {length: relative root mean square error of the output and of the gradients of q, k, v}}."""
    found: dict[str, Any] = {}
    for format, length in itertools.product(FORMATS[1:], LENGTHS):
        torch.manual_seed(0)
        q, k, v, g = (torch.randn(EXAMPLES, HEADS, length, FEATURES) for _ in range(4))

        def results(format: str, inputs: tuple[Tensor, ...] = (q, k, v), g: Tensor = g) -> list[Tensor]:
            leaves = [x.clone().requires_grad_() for x in inputs]
            y = attention(leaves[0], leaves[1], leaves[2], format)
            return [y.detach(), *torch.autograd.grad(y, leaves, g)]

        exact = results("full")
        squares = torch.zeros(4, dtype=torch.float64)
        for _ in range(repeats):
            squares += torch.stack(
                [(a - b).double().square().mean() for a, b in zip(results(format), exact, strict=True)]
            )
        scale = torch.stack([x.double().square().mean() for x in exact])
        errors = (squares / repeats / scale).sqrt().tolist()
        found.setdefault(format, {})[length] = dict(zip(("output", "q", "k", "v"), errors, strict=True))
        print(f"{format}, {length} positions: relative error {found[format][length]}", flush=True)
    return found


class Layer(nn.Module):
    """A transformer layer whose attention runs in a format."""

    def __init__(self, width: int, heads: int, format: str):
        super().__init__()
        self.heads, self.format = heads, format
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(self.norms[0](x)).chunk(3, -1)
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in parts)
        x = x + self.out(attention(q, k, v, self.format).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class Transformer(nn.Module):
    """Two layers over the rows of an image of 8x8."""

    def __init__(self, format: str, width: int = 64, heads: int = 4):
        super().__init__()
        self.embed, self.place = nn.Linear(8, width), nn.Embedding(8, width)
        self.layers = nn.Sequential(*[Layer(width, heads, format) for _ in range(2)])
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(8).expand(len(x), 8)
        return self.head(self.layers(self.embed(x) + self.place(places)).mean(1))


def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the cross-entropy of each example."""
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def accuracy(format: str, seed: int, steps: int, batch_size: int = 256, noise: float = 1.0) -> float:
    """Return the test accuracy after some steps of clipped and noised gradients."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32).view(-1, 8, 8) / 16, torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[360:], order[:360]
    torch.manual_seed(seed)
    model = dpquant.prepare(Transformer(format))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for step in range(steps):
        rows = train[torch.randint(len(train), (batch_size,))]
        total = dpquant.clipped_sum(
            model, losses, (x[rows], y[rows]), max_grad_norm=1.0, record_ids=rows, step=step, seed=seed,
            microbatch_size=batch_size,
        )  # fmt: skip
        for name, parameter in model.named_parameters():
            parameter.grad = (total.grads[name] + noise * torch.randn_like(parameter)) / batch_size
        optimizer.step()
    with torch.no_grad():
        return (model(x[test]).argmax(1) == y[test]).float().mean().item()


def accuracies(seeds: int, steps: int) -> dict[str, list[float]]:
    """Return {format: test accuracy of each seed}."""
    found = {format: [accuracy(format, seed, steps) for seed in range(seeds)] for format in FORMATS}
    for format, many in found.items():
        print(f"{format}: test accuracy {[round(one, 3) for one in many]}", flush=True)
    return found


def ways(length: int, format: str) -> dict[str, Callable[[], object]]:
    """Return the forward products of attention by float32, and what codes cost; each call does all heads."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(EXAMPLES, HEADS, length, FEATURES) for _ in range(3))
    p = (q @ k.transpose(2, 3)).softmax(-1)
    role, most = RECIPES[format].activation, RECIPES[format].max_code
    keys = row_keys(0, torch.arange(EXAMPLES * HEADS))
    backend = resolve("auto", [precision(format)], torch.device("cpu"))

    def quantized(x: Tensor, *, as_map: bool = False) -> QTensor:
        rows = x.flatten(0, 1)
        return (
            backend.quantize(rows.transpose(1, 2).unsqueeze(3), role, keys)
            if as_map
            else quantize_rows(rows, role, keys)
        )

    def products() -> None:
        for left, right in ((q, k), (p, v.transpose(2, 3))):
            a, b = quantized(left, as_map=True), quantized(right.contiguous())
            for row in range(EXAMPLES * HEADS):
                one = torch.tensor([row])
                weight = QTensor(codes=b.codes[row][:, :, None, None], scale=b.scale[one])
                backend.pack(weight, Geometry(), max_code=most).forward(a.take(one), None)

    return {
        "fused attention": lambda: F.scaled_dot_product_attention(q, k, v),
        "float32 products": lambda: (q @ k.transpose(2, 3), p @ v),
        "quantizing": lambda: [quantized(x) for x in (q, k, p, v)],
        "int8 products": products,
    }


def times(rounds: int) -> list[Mapping[str, Any]]:
    """Return the microseconds of processor time for an example and head, for each length and format."""
    found = []
    for length, format in itertools.product(LENGTHS, FORMATS[1:]):
        sides = ways(length, format)
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for work in sides.values():
            work()  # warms up
        for _ in range(rounds):
            for name, work in sides.items():
                began = time.process_time()
                work()
                seconds[name].append((time.process_time() - began) / EXAMPLES / HEADS * 1e6)
        middle = {name: statistics.median(many) for name, many in seconds.items()}
        print(
            f"{format}, {length} positions: microseconds { ({k: round(v, 1) for k, v in middle.items()}) }", flush=True
        )
        found.append({"positions": length, "format": format, "microseconds": seconds})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    torch.set_num_threads(1)
    hardware = Hardware.here()
    result = {
        "hardware": dataclasses.asdict(hardware), "busy": hardware.busy, "options": vars(given), "errors": errors(),
        "times": times(given.rounds), "accuracies": accuracies(given.seeds, given.steps),
    }  # fmt: skip
    (folder_here() / "attention.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
