# SPDX-License-Identifier: Apache-2.0
"""Products of codes on a GPU: which units are exact and up to which length, how fast each is, and the kernels beside.

Every product is compared with the exact integers in the run that times it.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.report import Report
from dpquant.backends import triton
from dpquant.backends.algebra import ROUND_OFF, im2col, patch_products, positions
from dpquant.backends.carriers import CARRIERS, Carrier, flaw_of, in_patches, unfolded
from dpquant.backends.cuda import Cuda
from dpquant.backends.geometry import Geometry
from dpquant.backends.interface import Operands
from dpquant.backends.qtensor import QTensor
from dpquant.backends.quantize import quantize_rows
from dpquant.formats import RECIPES
from dpquant.machine import now
from dpquant.rounding import row_keys

STAGE = "products"
LENGTHS = (256, 1024, 4096, 16384, 65536)
CODES = {"e3m0": 64, "int8": 127, "int4": 7}
# (name, geometry, weight's shape, examples, map): of ResNet18 for small images, and of BERT-base's linear layers
LAYERS: tuple[tuple[str, Geometry, tuple[int, ...], int, tuple[int, int]], ...] = (
    ("conv 64, 32x32", Geometry(kernel=(3, 3), padding=(1, 1)), (64, 64, 3, 3), 512, (32, 32)),
    ("conv 128, 16x16", Geometry(kernel=(3, 3), padding=(1, 1)), (128, 128, 3, 3), 512, (16, 16)),
    ("conv 256, 8x8", Geometry(kernel=(3, 3), padding=(1, 1)), (256, 256, 3, 3), 512, (8, 8)),
    ("conv 512, 4x4", Geometry(kernel=(3, 3), padding=(1, 1)), (512, 512, 3, 3), 512, (4, 4)),
    ("linear 768 to 768", Geometry(), (768, 768, 1, 1), 64, (128, 1)),
    ("linear 768 to 3072", Geometry(), (3072, 768, 1, 1), 64, (128, 1)),
)
Layer = tuple[str, Geometry, tuple[int, ...], int, tuple[int, int]]


def run(
    report: Report,
    end: float,
    *,
    device: str = "cuda",
    backend: Cuda | None = None,
    carriers: Sequence[Carrier] = CARRIERS,
    layers: Sequence[Layer] = LAYERS,
    lengths: Sequence[int] = LENGTHS,
) -> None:
    """Measure one thing after another until `end`, of `time.monotonic`, and put each into the report."""
    place, backend = torch.device(device), backend or Cuda()
    report.put(STAGE, "triton", triton.refusal(place) or "runs")
    for carrier in carriers:
        flaws = {
            f"{kind}, {length} terms": flaw_of(carrier, place, code, length) or "exact"
            for kind, code in CODES.items()
            for length in lengths
        }
        report.put(STAGE, f"exactness of {carrier.name}", flaws)
    report.put(STAGE, "quantizer", quantizer(place, layers[0]))
    for layer in layers:
        if time.monotonic() > end:
            report.put(STAGE, layer[0], "not run: no time was left")
            continue
        report.put(STAGE, layer[0], of_layer(layer, place, backend, carriers))


def of_layer(layer: Layer, device: torch.device, backend: Cuda, carriers: Sequence[Carrier]) -> dict[str, Any]:
    """Return the milliseconds of a layer's products and norms in every way, with whether each is exact."""
    _, geometry, shape, batch, size = layer
    x, weight = (_codes(one, device) for one in ((batch, shape[1], *size), shape))
    operand, packed = QTensor(codes=x, scale=torch.ones(batch, device=device)), in_patches(weight, 1)
    of_values = x.float(), weight.float()
    convolve = torch.nn.functional.conv2d
    facts: dict[str, Any] = {"stride": geometry.stride, "padding": geometry.padding}
    ways: dict[str, Callable[[], Tensor]] = {
        "float32": lambda: convolve(*of_values, **facts),
        "bfloat16": lambda: convolve(of_values[0].bfloat16(), of_values[1].bfloat16(), **facts),
    }
    for carrier in carriers:
        if flaw_of(carrier, device, 64, 1 << (math.prod(shape[1:]) - 1).bit_length()) is None:
            ways[f"{carrier.name}, unfolded"] = lambda one=carrier: unfolded(one, x, packed, geometry, 64)
            if carrier.can_convolve(shape[1], geometry, 64):
                ways[f"{carrier.name}, convolution"] = lambda one=carrier: one.exact_convolution(
                    x, weight, geometry, 64
                )
    scale = torch.ones(1, device=device)
    chosen = backend.pack(QTensor(codes=weight, scale=scale), geometry, max_code=64)
    ways["the backend's choice"] = lambda: chosen.forward(operand, None)
    if triton.refusal(device) is None:
        from dpquant.backends.triton.conv import TritonWeight

        kernel = TritonWeight(QTensor(codes=weight, scale=scale), geometry, 64)
        ways["kernel"] = lambda: kernel.forward(operand, None)
    exact = convolve(of_values[0].double(), of_values[1].double(), **facts).float()
    found = {name: _timed(way, lambda y: torch.equal(y.float(), exact)) for name, way in ways.items()}
    return {"forward": found, "norms": _norms(operand, geometry, exact, backend)}


def _norms(x: QTensor, geometry: Geometry, like: Tensor, backend: Cuda) -> dict[str, Any]:
    """Return the milliseconds of every method for the norms of weight gradients of codes."""
    codes = _codes(tuple(like.shape), x.codes.device)
    operands = Operands(x=x, g=QTensor(codes=codes, scale=x.scale), geometry=geometry, bf16_terms=2)
    few = operands.take(torch.arange(2, device=codes.device))
    x_values, g_values = (values.double() for values in few.values)
    gradients = patch_products(positions(g_values, geometry), im2col(x_values, geometry))
    least_B = gradients.square().flatten(1).sum(1)

    def right(squares_B: Tensor) -> bool:
        """Never less, and hardly more: some methods add a bound on their round-off."""
        return bool(((squares_B[:2] >= least_B * (1 - ROUND_OFF)) & (squares_B[:2] <= least_B * 1.01)).all())

    return {
        method.name: _timed(lambda method=method: method.norms(operands).squares_B, right)
        for method in backend.methods(operands)
    }


def quantizer(device: torch.device, layer: Layer) -> dict[str, Any]:
    """Return the quantizer's milliseconds and gigabytes a second; its codes are compared with torch's."""
    _, _, shape, batch, size = layer
    generator = torch.Generator().manual_seed(0)
    x = (
        torch.randn(batch, shape[1], *size, generator=generator)
        .to(device)
        .contiguous(memory_format=torch.channels_last)
    )
    keys, role = row_keys(0, torch.arange(batch)).to(device), RECIPES["luq-fp4"].activation
    right = quantize_rows(x, role, keys, kernel="torch").codes
    found = _timed(lambda: quantize_rows(x, role, keys).codes, lambda codes: torch.equal(codes, right))
    found["gigabytes a second"] = round(5 * x.numel() / found["ms"] / 1e6, 1) if "ms" in found else None
    return found


def _codes(shape: tuple[int, ...], device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    powers = 2 ** torch.randint(0, 7, shape, generator=generator)
    codes = powers * torch.randint(-1, 2, shape, generator=generator)
    return codes.to(torch.int8).to(device).contiguous(memory_format=torch.channels_last)


def _timed(work: Callable[[], Tensor], right: Callable[[Tensor], bool], rounds: int = 10) -> dict[str, Any]:
    """Return the median milliseconds of some work, and whether its result is right; or why it does not run."""
    try:
        work()
        result = work()
        seconds = []
        for _ in range(rounds):
            began = now()
            work()
            seconds.append(now() - began)
        return {"ms": round(1e3 * statistics.median(seconds), 4), "exact": right(result)}
    except Exception as error:  # a unit or a kernel may raise anything; the others are still measured
        return {"failed": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
