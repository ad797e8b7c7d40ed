# SPDX-License-Identifier: Apache-2.0
"""Speed-up of each layer by quantization, and the smallest shapes that run faster: `scripts/bench layers`.

A layer's time includes its three products, its norm and its part of the clipped sum, within a step on synthetic inputs,
in full precision and quantized. The limit is the time of its multiply-accumulates at the speed of the machine's fastest
int8 convolution, measured in the same run. Writes benchmarks/results/<cpu>-<date>/layers.json.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.results import folder_here
from dpquant import prepare
from dpquant.app.contenders import example_losses
from dpquant.app.networks import NETWORKS, build_network, synthetic_batch
from dpquant.backends.cpu_int8 import INT8_ZERO_POINT, CpuInt8
from dpquant.backends.geometry import Geometry
from dpquant.backends.qtensor import QTensor
from dpquant.engine.layers import count_macs
from dpquant.machine import Hardware
from dpquant.training.tuning import layer_times

CHANNELS, SIDES, KERNELS = (3, 16, 32, 64, 128, 256, 512), (1, 2, 4, 8, 16, 32), (1, 3)
MICROBATCH, BATCH, ROUNDS = 64, 256, 3


def main() -> None:
    """Measure the layers of a network and a grid of convolutions; print and write both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=list(NETWORKS), default="resnet18-cifar")
    parser.add_argument("--format", default="luq-fp4")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    peak = int8_peak()
    print(f"{peak / 1e9:.0f} thousand million int8 multiply-accumulates a second")
    record = {
        "hardware": dataclasses.asdict(Hardware.here()),
        "threads": torch.get_num_threads(),
        "format": args.format,
        "int8_macs_per_second": peak,
        "model": args.model,
        "layers": network(args.model, args.format, peak),
        "grid": grid(args.format),
    }
    (args.out or folder_here() / "layers.json").write_text(json.dumps(record, indent=1) + "\n")


def network(name: str, format: str, peak: float) -> list[dict]:
    """Return seconds per example and limit of every layer of a network, and print them in microseconds."""
    side = NETWORKS[name].image_size
    model = prepare(build_network(name, side), format=format)
    batch = synthetic_batch(name, side, 2)
    macs = count_macs(model, lambda: model(batch[0][:1]))
    times = layer_times(
        model, example_losses, batch, microbatch_size=MICROBATCH, expected_batch_size=BATCH, rounds=ROUNDS
    )
    print(f"{'layer':24s} {'MMAC':>7s} {'full':>8s} {'quantized':>10s} {'gain':>6s} {'limit':>7s}   us an example")
    rows = []
    for layer, seconds in times.items():
        limit = 3 * macs[layer] / peak
        rows.append({"layer": layer, "macs": macs[layer], **dataclasses.asdict(seconds), "limit": limit})
        print(
            f"{layer:24s} {macs[layer] / 1e6:7.2f} {seconds.full * 1e6:8.1f} {seconds.quantized * 1e6:10.1f} "
            f"{seconds.gain:6.2f} {limit * 1e6:7.1f}"
        )
    return rows


def grid(format: str) -> list[dict]:
    """Return the speed-ups of stride-1 convolutions by channels (in and out), kernel size and map size."""
    rows = []
    for kernel in KERNELS:
        print(f"\ngain of a {kernel}x{kernel} convolution; channels down, side of the map across")
        print("      " + "".join(f"{side:7d}" for side in SIDES))
        for channels in CHANNELS:
            gains = {side: gain(channels, side, kernel, format) for side in SIDES}
            rows += [{"channels": channels, "side": side, "kernel": kernel, "gain": g} for side, g in gains.items()]
            print(f"{channels:6d}" + "".join(f"{g:7.2f}" for g in gains.values()), flush=True)
    return rows


def gain(channels: int, side: int, kernel: int, format: str) -> float:
    """Return time in full precision over time quantized of a convolution whose input needs a gradient."""
    conv = nn.Conv2d(channels, max(channels, 16), kernel, padding=kernel // 2, bias=False)
    model = prepare(nn.Sequential(conv), format=format)

    def losses(model: nn.Module, x: Tensor) -> Tensor:
        return model(x.requires_grad_()).flatten(1).sum(1)

    x = torch.zeros(2, channels, side, side)
    times = layer_times(model, losses, x, microbatch_size=MICROBATCH, expected_batch_size=BATCH, rounds=ROUNDS)
    return times["0"].gain


def int8_peak() -> float:
    """Return the multiply-accumulates per second of an int8 convolution of a shape that suits the hardware."""
    codes = torch.full((32, 256, 16, 16), INT8_ZERO_POINT + 1, dtype=torch.uint8)
    codes = codes.contiguous(memory_format=torch.channels_last)
    x = QTensor(codes=codes, scale=torch.ones(32), zero_point=INT8_ZERO_POINT)
    weight = QTensor(codes=torch.ones(256, 256, 3, 3, dtype=torch.int8), scale=torch.ones(1))
    packed = CpuInt8().pack(weight, Geometry(kernel=(3, 3), padding=(1, 1)), max_code=64)
    return 32 * 16 * 16 * 256 * 256 * 9 / best(lambda: packed.forward(x, None))


def best(work: Callable[[], object], repeats: int = 9) -> float:
    """Return the minimum seconds of a call over the repeats."""
    work()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


if __name__ == "__main__":
    main()
