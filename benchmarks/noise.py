# SPDX-License-Identifier: Apache-2.0
"""Time of a step's noise, per value: `scripts/bench noise`.

Three sources take turns in one process: numpy's ziggurat on randomgen's AES counter (dpquant's former noise), dpquant's
noise with its native kernel, and without it. Each draws one tensor for each parameter of the network. The same run
checks that each source's values are normal with the stated deviation, and that the kernel does not change any bit.
"""

import argparse
import os
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from randomgen import AESCounter
from scipy import stats
from torch import Tensor

from dpquant.app.bench import Spread
from dpquant.app.networks import NETWORKS, build_network
from dpquant.machine import Hardware
from dpquant.privacy import noise as noise_module
from dpquant.privacy.noise import NoiseSource

STD = 0.37
ALPHA = 1e-6  # probability of refusing a correct source

Shapes = dict[str, torch.Size]
Source = Callable[[Shapes, int], Iterator[Tensor]]


def ziggurat(shapes: Shapes, step: int) -> Iterator[Tensor]:
    """Yield normal values by numpy on AES in counter mode, with one generator for each tensor."""
    for number, shape in enumerate(shapes.values()):
        generator = np.random.Generator(AESCounter(key=(step << 64) + number, counter=0))  # pyright: ignore[reportArgumentType]
        yield torch.from_numpy(np.asarray(STD * generator.standard_normal(tuple(shape)), dtype=np.float32))


def box_muller(shapes: Shapes, step: int) -> Iterator[Tensor]:
    """Yield dpquant's noise."""
    source = NoiseSource.from_seed(0)
    for name, shape in shapes.items():
        yield source.gaussian(shape, STD, stream="train", step=step, attempt=0, name=name)


def without_kernel(shapes: Shapes, step: int) -> Iterator[Tensor]:
    """Yield dpquant's noise as it is computed without the native kernel."""
    kernel, noise_module._native = noise_module._native, None
    try:
        yield from box_muller(shapes, step)
    finally:
        noise_module._native = kernel


SOURCES: dict[str, Source] = {
    "ziggurat on AESCounter": ziggurat,
    "dpquant": box_muller,
    "dpquant, no kernel": without_kernel,
}


def check(shapes: Shapes) -> None:
    """Raise AssertionError unless every source is normal, and dpquant's values equal with and without the kernel."""
    for name, source in SOURCES.items():
        z = torch.cat([noise.flatten() for noise in source(shapes, 0)]).double().numpy() / STD
        bound = stats.norm.isf(ALPHA / 2)
        assert abs((z.var() - 1) * np.sqrt(z.size / 2)) < bound, f"{name}: wrong standard deviation"
        assert abs(z.mean()) * np.sqrt(z.size) < bound, f"{name}: wrong mean"
        assert stats.kstest(z[:200_000], "norm").pvalue > ALPHA, f"{name}: not normal"
    for native, plain in zip(box_muller(shapes, 0), without_kernel(shapes, 0), strict=True):
        assert torch.equal(native, plain), "the kernel changes bits"


def timed(shapes: Shapes, rounds: int) -> dict[str, list[float]]:
    """Return {source: seconds of each round}; sources take turns, and a first round is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in SOURCES}
    for number in range(rounds + 1):
        for name, source in SOURCES.items():
            start = time.perf_counter()
            for _ in source(shapes, number):
                pass
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def main() -> None:
    """Check the sources, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(NETWORKS), default="resnet18")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, os.cpu_count() or 1])
    parser.add_argument("--rounds", type=int, default=11)
    args = parser.parse_args()

    network = build_network(args.model, NETWORKS[args.model].image_size)
    shapes = {name: parameter.shape for name, parameter in network.named_parameters()}
    num_values = sum(shape.numel() for shape in shapes.values())
    check(shapes)
    hardware = Hardware.here()
    print(f"{hardware}{' (busy)' if hardware.busy else ''}")
    print(f"{args.model}: {num_values} values in {len(shapes)} tensors; {args.rounds} rounds, median [quartiles]")
    print(f"{'threads':>7}  {'source':<24}{'ns a value':<22}{'ms a step':<24}{'ziggurat / this':<20}")
    for threads in sorted(set(args.threads)):
        torch.set_num_threads(threads)
        seconds = timed(shapes, args.rounds)
        for name, mine in seconds.items():
            quotients = [old / new for old, new in zip(seconds["ziggurat on AESCounter"], mine, strict=True)]
            each = Spread.of([1e9 * s / num_values for s in mine])
            step = Spread.of([1e3 * s for s in mine])
            print(f"{threads:>7}  {name:<24}{each!s:<22}{step!s:<24}{Spread.of(quotients)!s:<20}")


if __name__ == "__main__":
    main()
