# SPDX-License-Identifier: Apache-2.0
"""What safety costs, as shares of a step: checkpoints, the ledger with and without leases, discrete noise.

    scripts/bench overhead

Real runs on synthetic records. Whole steps with Gaussian and with discrete noise take turns in one process. Checkpoints
are written to the disk of the temporary folder after every round, as `dpquant train` writes them, and are read back;
their share is for the interval that `--checkpoint-every` has by default. The ledger is charged by itself, with a
budget, as a run charges it, and then verified.
"""

import argparse
import dataclasses
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch

import dpquant
from benchmarks.results import folder_here
from dpquant.app.networks import NETWORKS, build_network
from dpquant.app.synthetic import SyntheticRecords
from dpquant.machine import Hardware
from dpquant.privacy.ledger import Ledger
from dpquant.privacy.plan import NoiseLaw
from dpquant.runs.evaluation import per_example_loss
from dpquant.runs.settings import TrainSettings, checkpoint_steps
from dpquant.training.checkpoint import Checkpoint
from dpquant.training.private import PrivateTraining

RECORDS = 60_000  # of which a run of the benchmark is said to be, for the length of its epochs
CHARGES = 200


@dataclasses.dataclass(frozen=True, kw_only=True)
class Overhead:
    """What safety costs in one network.

    Attributes:
      network: of NETWORKS.
      batch_size: examples a step, on average.
      step_ms: of a step with Gaussian noise, median.
      checkpoint_ms: time to write a checkpoint, median.
      checkpoint_steps: steps from one checkpoint to the next, by default.
      checkpoint_share: of the time of the steps between two checkpoints.
      ledger_ms: of one charge without leases, mean.
      lease: steps that a line charges ahead.
      lease_share: of a step's time that a charge takes with leases, mean.
      discrete: time of a step with discrete noise over one with Gaussian noise, medians.
    """

    network: str
    batch_size: int
    step_ms: float
    checkpoint_ms: float
    checkpoint_steps: int
    checkpoint_share: float
    ledger_ms: float
    lease: int
    lease_share: float
    discrete: float


def run_of(network: str, batch_size: int, noise: NoiseLaw, steps: int) -> PrivateTraining:
    """Return a run of a network on synthetic records that has taken no step."""
    facts = NETWORKS[network]
    records = SyntheticRecords(facts.input_shape(facts.image_size), facts.num_classes, 4 * batch_size)
    model = build_network(network, facts.image_size)
    return dpquant.make_private(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        records,
        loss_fn=per_example_loss,
        plan=dpquant.PrivacyPlan(
            noise_multiplier=1.0,
            delta=1e-5,
            max_grad_norm=1.0,
            sample_rate=0.25,
            expected_batch_size=batch_size,
            steps=steps,
            noise=noise,
        ),
        policy=dpquant.AllPolicy(),
    )


def charge_seconds(folder: Path, run: PrivateTraining, *, leases: bool) -> tuple[float, int]:
    """Return the mean time of a charge on disk, and the lease."""
    path = folder / f"ledger-{leases}.jsonl"
    plan = dataclasses.replace(run.plan.budget(), events=tuple(_many(event) for event in run.plan.budget().events))
    ledger = Ledger(path, budget=plan, step_seconds=run.step_seconds if leases else None)
    began = time.perf_counter()
    for _ in range(CHARGES):
        ledger.charge(kind="train", sample_rate=run.plan.sample_rate, noise_multiplier=run.plan.noise_multiplier)
    seconds = (time.perf_counter() - began) / CHARGES
    ledger.close()
    assert Ledger.verify(path).charged("train") == CHARGES
    return seconds, ledger.lease


def _many(event: dpquant.Event) -> dpquant.Event:
    return dataclasses.replace(event, count=10 * CHARGES)


def measured(network: str, batch_size: int, rounds: int) -> Overhead:
    """Measure one network."""
    gaussian, discrete = (run_of(network, batch_size, noise, rounds) for noise in ("gaussian", "discrete"))
    steps: dict[str, list[float]] = {"gaussian": [], "discrete": []}
    writes: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        epochs = [iter(_batches(run)) for run in (gaussian, discrete)]
        for number in range(rounds):
            for run, batches, seconds in zip((gaussian, discrete), epochs, steps.values(), strict=True):
                batch = next(batches)
                began = time.perf_counter()
                run.step(batch)
                seconds.append(time.perf_counter() - began)
            began = time.perf_counter()
            gaussian.save(folder / f"step-{number}")
            writes.append(time.perf_counter() - began)
            assert Checkpoint.read(folder / f"step-{number}").facts
            shutil.rmtree(folder / f"step-{number}")
        alone, _ = charge_seconds(folder, gaussian, leases=False)
        leased, lease = charge_seconds(folder, gaussian, leases=True)
    step, write = statistics.median(steps["gaussian"]), statistics.median(writes)
    plan = dpquant.PrivacyPlan(
        noise_multiplier=1.0, delta=1e-5, max_grad_norm=1.0, sample_rate=batch_size / RECORDS,
        expected_batch_size=batch_size, steps=10 * RECORDS // batch_size,
    )  # fmt: skip
    every = checkpoint_steps(TrainSettings.chosen({}), plan, step, write)
    return Overhead(
        network=network,
        batch_size=batch_size,
        step_ms=1e3 * step,
        checkpoint_ms=1e3 * write,
        checkpoint_steps=every,
        checkpoint_share=write / (every * step),
        ledger_ms=1e3 * alone,
        lease=lease,
        lease_share=leased / step,
        discrete=statistics.median(steps["discrete"]) / step,
    )


def _batches(run: PrivateTraining):
    for epoch in run.epochs():
        yield from epoch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    rows = [measured("cnn", 256, given.rounds), measured("resnet18-cifar", 64, given.rounds)]
    print("| | step | checkpoint | every | share | charge | lease | share | discrete noise: a step takes |")
    print("|---|---|---|---|---|---|---|---|---|")
    for one in rows:
        print(
            f"| {one.network}, {one.batch_size} examples | {one.step_ms:.0f} ms | {one.checkpoint_ms:.0f} ms | "
            f"{one.checkpoint_steps} steps | {one.checkpoint_share:.2%} | {one.ledger_ms:.1f} ms | {one.lease} steps | "
            f"{one.lease_share:.2%} | {one.discrete:.1f} times as long |"
        )
    result = {"hardware": dataclasses.asdict(Hardware.here()), "rows": [dataclasses.asdict(one) for one in rows]}
    (folder_here() / "overhead.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
