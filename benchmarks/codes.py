# SPDX-License-Identifier: Apache-2.0
"""Processor time of the products of codes of single layers, by every kernel of this processor: `scripts/bench codes`.

For each shape, the kernels take turns in one process, on random codes. A layer's five products are the forward product,
the input gradient, both with scales; packing the weight for both; each example's norm of the weight gradient; and the
weighted sum of the weight gradients.
"""

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.results import folder_here
from dpquant.backends import native_products as native
from dpquant.backends.cpu_int8 import Int8Weight
from dpquant.backends.geometry import Geometry
from dpquant.backends.malloc import working_memory
from dpquant.backends.native_convolutions import NativeWeight, native_kernels
from dpquant.backends.qtensor import QTensor
from dpquant.machine import Hardware

LARGEST = 64  # code of LUQ-FP4
SHAPES = (  # channels, outputs, height, width, kernel: convolutions of ResNet18, and linear layers over 64 tokens
    (64, 64, 32, 32, 3),
    (128, 128, 16, 16, 3),
    (256, 256, 8, 8, 3),
    (512, 512, 4, 4, 3),
    (384, 384, 64, 1, 1),
    (384, 1536, 64, 1, 1),
)


def codes(*shape: int) -> QTensor:
    """Return random codes as activations have them."""
    drawn = torch.randint(128 - LARGEST, 129 + LARGEST, shape, dtype=torch.uint8)
    return QTensor(
        codes=drawn.contiguous(memory_format=torch.channels_last), scale=torch.rand(shape[0]), zero_point=128
    )


def products(shape: tuple[int, ...], batch: int) -> dict[str, Callable[[], object]]:
    """Return {product and kernel: a function that computes it once} for a shape, of stride 1."""
    channels, outputs, height, width, kernel = shape
    geometry = Geometry(kernel=(kernel, kernel), padding=(kernel // 2, kernel // 2))
    x, g = codes(batch, channels, height, width), codes(batch, outputs, height, width)
    one = codes(1, channels, height, width), codes(1, outputs, height, width)
    drawn = torch.randint(-LARGEST, LARGEST + 1, (outputs, channels, kernel, kernel), dtype=torch.int8)
    weight = QTensor(codes=drawn, scale=torch.rand(1))
    factors = torch.rand(batch).bfloat16().float()
    both: tuple[Tensor, Tensor, Geometry] = g.codes, x.codes, geometry
    ways: dict[str, Callable[[], object]] = {}

    def packed(make: Callable[..., Int8Weight | NativeWeight]) -> None:
        weights = make(weight, geometry, LARGEST)
        weights.forward(one[0], None)
        weights.input_gradient(one[1], (height, width))

    makers = {"onednn": Int8Weight, **{name: partial(NativeWeight, kernel=name) for name in native_kernels()}}
    for name, make in makers.items():
        weights = make(weight, geometry, LARGEST)
        ways[f"forward {name}"] = partial(weights.forward, x, None)
        ways[f"input gradient {name}"] = partial(weights.input_gradient, g, (height, width))
        ways[f"packing {name}"] = partial(packed, make)
    for name in native._native.code_kernels() if native._native is not None else ():
        total = torch.zeros(1, outputs, kernel**2 * channels)
        ways[f"norm {name}"] = partial(native.code_norms, *both, kernel=name)
        ways[f"Gram norm {name}"] = partial(native.gram_norms, *both, kernel=name)
        ways[f"sum {name}"] = partial(native.add_code_products, *both, factors, total, kernel=name)
    for name in native._native.code_sum_kernels() if native._native is not None else ():
        total = torch.zeros(outputs, kernel**2 * channels)
        ways[f"sum bfloat16 {name}"] = partial(native.add_code_sums, *both, factors, total, bf16_terms=1, kernel=name)
    return ways


def main() -> None:
    """Measure, print, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, default=128)
    args = parser.parse_args()
    torch.set_num_threads(1)
    hardware, rows = Hardware.here(), []
    print(f"{hardware}{' (busy)' if hardware.busy else ''}\nus an example, median (least)")
    for shape in SHAPES:
        ways = products(shape, args.batch)
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(args.rounds + 1):
            for name, work in ways.items():
                with working_memory():  # as in a step: allocations reuse freed pages
                    start = time.thread_time()
                    work()
                    took = time.thread_time() - start
                if number:  # the first round is a warm-up
                    seconds[name].append(1e6 * took / args.batch)
        for name, mine in seconds.items():
            middle, least = statistics.median(mine), min(mine)
            print(f"{shape!s:24s}{name:24s}{middle:8.1f} ({least:.1f})", flush=True)
            rows.append({"shape": shape, "product": name, "median": middle, "least": least})
    result = {"hardware": dataclasses.asdict(hardware), "busy": hardware.busy, "batch": args.batch, "rows": rows}
    (folder_here() / "codes.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
