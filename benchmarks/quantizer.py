# SPDX-License-Identifier: Apache-2.0
"""Time of quantizing, per element and format, by the native kernel and in torch: `scripts/bench quantizer`.

Formats and kernels take turns in one process, on synthetic activations after ReLU, channels last. The same run checks
that both kernels give equal bits. Comparing the formats shows the cost of a clip (@) and of unsigned codes (+). Each
line of W * C elements has its own random key: `--shape 64 8 2048 1` shows the cost of short lines.
"""

import argparse
import dataclasses
import json
import os
import time

import torch

from benchmarks.results import folder_here
from dpquant.app.bench import Spread
from dpquant.backends.malloc import working_memory
from dpquant.backends.qtensor import QTensor
from dpquant.backends.quantize import quantize_rows
from dpquant.formats import RoleFormat, recipe
from dpquant.machine import Hardware
from dpquant.rounding import row_keys

SHAPE = (128, 64, 16, 16)
ROLES = ("e3m0~", "int8", "int4", "int4@4", "int4@4+")
KERNELS = ("native", "torch")


def quantized(x: torch.Tensor, role: RoleFormat, kernel: str) -> QTensor:
    """Return x quantized by a kernel, with one scale per row."""
    return quantize_rows(x, role, row_keys(0, torch.arange(len(x))), kernel=kernel)


def check(x: torch.Tensor, role: RoleFormat) -> None:
    """Raise AssertionError unless both kernels give equal bits."""
    first, second = (quantized(x, role, kernel) for kernel in KERNELS)
    assert torch.equal(first.codes, second.codes) and torch.equal(first.scale, second.scale), role


def main() -> None:
    """Check the kernels, measure, print, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, os.cpu_count() or 1])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--shape", nargs=4, type=int, default=SHAPE, metavar=("B", "C", "H", "W"))
    args = parser.parse_args()

    shape = tuple(args.shape)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).relu()
    x = x.contiguous(memory_format=torch.channels_last)
    roles = {text: recipe(f"int8,{text},int8").activation for text in ROLES}
    for role in roles.values():
        check(x, role)
    hardware, rows = Hardware.here(), []
    print(f"{hardware}{' (busy)' if hardware.busy else ''}\nns an element of {shape}, median [quartiles]")
    for threads in sorted(set(args.threads)):
        torch.set_num_threads(threads)
        seconds: dict[tuple[str, str], list[float]] = {(text, kernel): [] for text in roles for kernel in KERNELS}
        for number in range(args.rounds + 1):
            for (text, kernel), mine in seconds.items():
                with working_memory():  # as in a step: allocations reuse freed pages
                    start = time.perf_counter()
                    quantized(x, roles[text], kernel)
                    took = time.perf_counter() - start
                if number:  # the first round is a warm-up
                    mine.append(took)
        for text in roles:
            both = [seconds[text, kernel] for kernel in KERNELS]
            native, plain = (Spread.of([1e9 * s / x.numel() for s in side]) for side in both)
            quotient = Spread.of([slow / fast for fast, slow in zip(*both, strict=True)])
            print(f"{threads} threads  {text:10s}native {native!s:22s}torch {plain!s:22s}torch / native {quotient}")
            facts = {"native": native, "torch": plain, "quotient": quotient}
            spreads = {name: dataclasses.asdict(spread) for name, spread in facts.items()}
            rows.append({"threads": threads, "role": text, **spreads})
    result = {"hardware": dataclasses.asdict(hardware), "busy": hardware.busy, "shape": shape, "rows": rows}
    (folder_here() / "quantizer.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
