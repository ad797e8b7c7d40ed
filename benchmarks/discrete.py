# SPDX-License-Identifier: Apache-2.0
"""What discrete noise costs: `scripts/bench discrete`.

The noise of one step, per value, from each source: Gaussian with its native kernel and without, and discrete. And the
sum of a step, per example: floats in microbatches, and integers from records that pass one by one. Each pair takes
turns in one process. The same run checks that all noise has its deviation and shape, and that both sums agree. Time is
the processor's, in one thread, so that other work on the machine counts less.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from benchmarks.noise import box_muller, without_kernel
from benchmarks.results import folder_here
from dpquant import prepare
from dpquant.app.bench import Spread
from dpquant.app.networks import NETWORKS, Batch, build_network, synthetic_batch
from dpquant.engine.batches import microbatches
from dpquant.engine.clip import clipped_sum_of
from dpquant.engine.grid_sum import grid_sum_of
from dpquant.engine.layers import quantizable_layers, set_policy
from dpquant.engine.passes import Objective
from dpquant.machine import Hardware
from dpquant.privacy.grid_noise import BITS, grid_of
from dpquant.privacy.noise import NoiseSource
from dpquant.runs.evaluation import per_example_loss

ALPHA = 1e-6  # probability of refusing a correct source

Shapes = dict[str, torch.Size]
Timed = dict[str, list[float]]


def discrete(shapes: Shapes, step: int) -> list[Tensor]:
    """Return discrete noise, which is integer."""
    source = NoiseSource.from_seed(0)
    return [source.discrete(shape, stream="train", step=step, attempt=0, name=name) for name, shape in shapes.items()]


def turns(sides: dict[str, Callable[[int], object]], rounds: int) -> Timed:
    """Return {side: seconds of each round}; sides take turns, and a first round is not counted."""
    seconds: Timed = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, side in sides.items():
            began = time.process_time()
            side(number)
            seconds[name].append(time.process_time() - began)
    return {name: times[1:] for name, times in seconds.items()}


def noise_seconds(shapes: Shapes, rounds: int) -> Timed:
    """Check discrete noise, and return the seconds of a step's noise from each source."""
    z = torch.cat([noise.flatten() for noise in discrete(shapes, 0)]).double().numpy() / 2.0**BITS
    assert abs((z.var() - 1) * np.sqrt(z.size / 2)) < stats.norm.isf(ALPHA / 2), "wrong standard deviation"
    assert stats.kstest(z[:200_000], "norm").pvalue > ALPHA, "not normal"
    return turns(
        {
            "gaussian": lambda step: list(box_muller(shapes, step)),
            "gaussian, no kernel": lambda step: list(without_kernel(shapes, step)),
            "discrete": lambda step: discrete(shapes, step),
        },
        rounds,
    )


def sum_seconds(model: torch.nn.Module, batch: Batch, rounds: int) -> Timed:
    """Check that the sums agree, and return the seconds of each."""
    objective, records, ids, size = Objective(model, per_example_loss), batch[:2], batch[2], len(batch[2])
    grid = grid_of(1.0)
    floats = partial(clipped_sum_of, objective, max_grad_norm=1.0, key=0)
    integers = partial(grid_sum_of, objective, max_grad_norm=1.0, grid=grid, key=0)
    one, other = floats(microbatches(records, ids, size)).grads, integers(microbatches(records, ids, 1)).grads
    for name, grad in one.items():
        gap = (other[name].double() * grid - grad).norm() / grad.norm()
        assert gap < 1e-2, f"{name}: the sums differ by {gap:.1e}"  # codes may change where a float's last bit does
    return turns(
        {
            f"floats, microbatches of {size}": lambda step: floats(microbatches(records, ids, size)),
            "integers, one by one": lambda step: integers(microbatches(records, ids, 1)),
        },
        rounds,
    )


def main() -> None:
    """Measure every network; print and keep the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(NETWORKS), default=["cnn", "resnet18-cifar"])
    parser.add_argument("--formats", nargs="+", default=["full", "luq-fp4"])
    parser.add_argument("--examples", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    torch.set_num_threads(1)
    hardware, rows = Hardware.here(), []
    print(f"{hardware}{' (busy)' if hardware.busy else ''}")
    for name in args.models:
        image_size = NETWORKS[name].image_size
        network = build_network(name, image_size)
        shapes = {one: parameter.shape for one, parameter in network.named_parameters()}
        num_values = sum(shape.numel() for shape in shapes.values())
        tables = {"noise": (noise_seconds(shapes, args.rounds), 1e9 / num_values, "ns a value")}
        for format in args.formats:
            model = prepare(build_network(name, image_size), format="luq-fp4" if format == "full" else format)
            set_policy(model, () if format == "full" else quantizable_layers(model))
            seconds = sum_seconds(model, synthetic_batch(name, image_size, args.examples), args.rounds)
            tables[f"sum, {format}"] = (seconds, 1e3 / args.examples, "ms an example")
        for what, (seconds, factor, unit) in tables.items():
            for side, times in seconds.items():
                spread = Spread.of([factor * one for one in times])
                print(f"{name:<16}{what:<14}{side:<32}{spread!s:<28}{unit}")
                facts = {"model": name, "values": num_values, "what": what, "side": side, "unit": unit}
                rows.append({**facts, "time": dataclasses.asdict(spread), "rounds": args.rounds})
    record = {"hardware": dataclasses.asdict(hardware), "busy": hardware.busy, "clock": "processor", "rows": rows}
    (args.out or folder_here() / "discrete.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
