# SPDX-License-Identifier: Apache-2.0
"""A step on the table of `examples/fraud`: plain PyTorch, Opacus' hooks and dpquant, in turns.

    scripts/bench table_step [--rounds 25] [--model tabular-resnet] [--threads 1]

The networks are those of `dpquant train --data table:...`, the rows are random within the ranges of the spec, and every
side takes the whole batch in the pieces that suit it. Before times are taken, the clipped sum of eight rows in full
precision is compared with plain autograd, one row at a time. Figures are medians of the steps' wall time, and of their
ratios.
"""

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.oracle import error_of_sum
from benchmarks.results import folder_here
from dpquant.app.contenders import StepSettings, example_losses, opacus_hooks, ours, plain
from dpquant.data.models import build
from dpquant.data.spec import Spec
from dpquant.machine import Hardware

SPEC = Path(__file__).parent.parent / "examples/fraud/spec.toml"
SIDES: dict[str, Callable[..., Callable[[], None]]] = {
    "plain": plain,
    "opacus": opacus_hooks,
    "full": partial(ours, share=0.0),
    "quantized": partial(ours, share=1.0),
}


def network(name: str, spec: Spec) -> nn.Module:
    """Return a network for the rows of a spec, the same weights each time."""
    torch.manual_seed(0)
    sizes = [category.size for category in spec.categories.values()]
    return build(name, num_classes=len(spec.classes), input_shape=(spec.width,), categories=sizes)


def rows(spec: Spec, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return encoded rows, labels and record ids."""
    generator = torch.Generator().manual_seed(1)
    sizes = torch.tensor([category.size for category in spec.categories.values()])
    numbers = torch.rand(count, spec.width - len(sizes), generator=generator) * 2 - 1
    codes = (torch.rand(count, len(sizes), generator=generator) * sizes).floor()
    labels = (torch.rand(count, generator=generator) < 0.02).long()
    return torch.cat([numbers, codes], 1), labels, torch.arange(count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["mlp", "tabular-resnet"], default="mlp")
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--physical-batch-size", type=int, default=4096, help="of Opacus")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--threads", type=int)
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    spec, hardware = Spec.read(SPEC), Hardware.here()
    off = error_of_sum(given.model, network(given.model, spec), example_losses, rows(spec, 8)[:2])
    batch = rows(spec, given.batch_size)
    settings = StepSettings(format="int8", physical_batch_size=given.physical_batch_size)
    steps = {name: make(network(given.model, spec), batch, settings) for name, make in SIDES.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(given.rounds + 1):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            if number:  # the first warms up
                seconds[name].append(time.perf_counter() - began)
    for name, many in seconds.items():
        ratios = sorted(one / of_plain for one, of_plain in zip(many, seconds["plain"], strict=True))
        low, middle, high = ratios[len(ratios) // 4], statistics.median(ratios), ratios[3 * len(ratios) // 4]
        print(
            f"{given.model}: {name} {statistics.median(many) * 1e3:.1f} ms, {middle:.2f} times plain "
            f"(quartiles {low:.2f} and {high:.2f})"
        )
    result = {"hardware": dataclasses.asdict(hardware), "busy": hardware.busy, "options": vars(given), "error": off}
    (folder_here() / f"table_step-{given.model}.json").write_text(json.dumps(result | {"seconds": seconds}) + "\n")


if __name__ == "__main__":
    main()
