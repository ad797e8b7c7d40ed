# SPDX-License-Identifier: Apache-2.0
"""Time of checking that examples are kept apart: the check at the start, and the probe in each epoch.

    scripts/bench checks

For each network this measures the seconds of the check on synthetic records (`isolation.check_isolation`), of the check
at the run's microbatch size (`check_at_size`) and of the rehearsed step. It also measures the probe's time over that of
an epoch of 59 steps of 1024 records, extrapolated from one microbatch; probe and microbatch take turns. A network whose
examples are coupled must be refused in the same process.
"""

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils.data import TensorDataset, default_collate

import dpquant
from benchmarks.results import folder_here
from dpquant.app.bench import Spread
from dpquant.checks.isolation import check_at_size, check_isolation, keeps_apart
from dpquant.checks.synthetic import candidates
from dpquant.engine.clip import clipped_sum_of
from dpquant.engine.passes import Objective
from dpquant.formats import precision
from dpquant.machine import Hardware
from dpquant.training.distributed import Alone
from dpquant.training.records import Records
from dpquant.training.rehearsal import rehearse
from dpquant.training.setup import Setup
from dpquant.training.steps import Steps

EPOCH = 59 * 1024  # records
MICROBATCH, PROBED = 64, 8
CPU = torch.device("cpu")


class Block(nn.Module):
    """Transformer encoder block with attention built of linear layers."""

    def __init__(self, width: int, heads: int, inner: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2)
        x = self.first(x + F.dropout(self.out(mixed), 0.1, self.training))
        return self.second(x + F.dropout(self.down(F.gelu(self.up(x))), 0.1, self.training))


class Text(nn.Module):
    """Text model of MiniLM's size: six blocks of width 384, 30,522 words, 22.7 million parameters."""

    def __init__(self, words: int = 30_522, width: int = 384):
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.blocks = nn.Sequential(*(Block(width, 12, 4 * width) for _ in range(6)))
        self.head = nn.Linear(width, 2)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.blocks(self.words(ids)).mean(1))


def networks() -> Iterator[tuple[str, nn.Module, TensorDataset]]:
    """Yield (name, network, records)."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 2, (256,), generator=generator)
    images = torch.randn(256, 3, 32, 32, generator=generator)
    ids = torch.randint(0, 30_522, (256, 64), generator=generator)
    small = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 225, 2))
    yield "small convolution", small, TensorDataset(images, labels)
    yield "resnet18", dpquant.fix(torchvision.models.resnet18(num_classes=43)), TensorDataset(images, labels)
    yield "text of MiniLM's size", Text(), TensorDataset(ids, labels)


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def coupled(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    losses = loss(model, batch)
    return losses + 1e-3 * losses.mean()


def seconds(work: Callable[[], object]) -> float:
    """Return the seconds that a call takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def measured(model: nn.Module, data: TensorDataset, rounds: int) -> dict:
    """Return all figures of one network.

    Raises:
      AssertionError: the check accepts coupled losses.
    """
    model = dpquant.prepare(model)
    luq = precision("luq-fp4")

    def check(loss_fn: Callable):
        records = [data[index] for index in range(3)]
        return check_isolation(Objective(model, loss_fn), candidates(records, default_collate, CPU), quantized=[luq])

    try:
        check(coupled)
    except dpquant.ModelError:
        pass
    else:
        raise AssertionError("a coupled loss was accepted")
    found = check(loss)
    checks = [seconds(lambda: check(loss)) for _ in range(rounds)]
    plan = dpquant.PrivacyPlan(
        noise_multiplier=1.0, delta=1e-5, max_grad_norm=1.0, sample_rate=0.02, expected_batch_size=1024, steps=100
    )
    optimizer = torch.optim.Adam(model.parameters())
    steps, policy = Steps(optimizer, Alone()), dpquant.NonePolicy()
    setup = Setup(optimizer=optimizer, steps=steps, plan=plan, policy=policy, seed=0, found=found)
    sized = [seconds(lambda: check_at_size(found, MICROBATCH)) for _ in range(rounds)]
    analysed = next(iter(found.macs))
    rehearsed = [
        seconds(lambda: rehearse(setup, size=MICROBATCH, analysis_size=MICROBATCH, analysed=analysed))
        for _ in range(rounds)
    ]
    source = Records(data, default_collate, CPU, found.specimens)
    ids = torch.arange(MICROBATCH)

    def probe() -> None:
        batches = source.batchmates(ids, PROBED, 0)
        assert batches is not None and keeps_apart(found.objective, *batches, key=0)

    def microbatch() -> None:
        pieces = source.microbatches(ids, MICROBATCH, 0)
        clipped_sum_of(found.objective, pieces, max_grad_norm=1.0, key=0, leaves_out=True)

    probe()
    microbatch()
    shares = []
    for _ in range(rounds):
        one, other = seconds(probe), seconds(microbatch)
        shares.append(one / (other * EPOCH / MICROBATCH))
    return {
        "check_seconds": dataclasses.asdict(Spread.of(checks)),
        "at_size_seconds": statistics.median(sized),
        "rehearsal_seconds": statistics.median(rehearsed),
        "start_seconds": statistics.median(checks) + 2 * statistics.median(sized) + statistics.median(rehearsed),
        "probe_share_of_an_epoch": dataclasses.asdict(Spread.of(shares)),
    }


def main() -> None:
    """Measure, print, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    hardware, rows = Hardware.here(), {}
    print(f"{hardware}{' (busy)' if hardware.busy else ''}", flush=True)
    for name, model, data in networks():
        rows[name] = row = measured(model, data, args.rounds)
        print(
            f"{name}: check {row['check_seconds']['median']:.1f} s, all trials at the start "
            f"{row['start_seconds']:.1f} s, probe {row['probe_share_of_an_epoch']['median']:.2%} of an epoch",
            flush=True,
        )
    path = folder_here() / "checks.json"
    kept = {"hardware": dataclasses.asdict(hardware), "busy": hardware.busy, "networks": rows}
    path.write_text(json.dumps(kept, indent=1) + "\n")
    print(f"kept in {path}")


if __name__ == "__main__":
    main()
