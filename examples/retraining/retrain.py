#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Train once more on the people's data of this year, if the year's budget holds it: exit code 0; 3 if it does not.

python examples/retraining/retrain.py YEAR_FOLDER -- OPTIONS OF dpquant train

YEAR_FOLDER holds one run a retraining, each with its ledger. All of a year's retrainings together are one plan of as
many steps, calibrated to the year's epsilon. A retraining takes its noise from that plan, and is refused when the
steps in the ledgers and its own would be more than the plan has. OPTIONS must not name a policy that analyses layers:
its analyses are no steps of that plan.
"""

import argparse
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import dpquant

NOTHING_LEFT = 3


def charged(year: Path, plan: dpquant.PrivacyPlan) -> int:
    """Return the number of steps in the ledgers of a year, also of runs that were killed.

    Raises:
      SystemExit: a ledger was not charged by this plan, so that counting its steps would not tell what it has cost.
    """
    steps = 0
    for ledger in sorted(year.glob("*/ledger.jsonl")):
        for event in dpquant.Ledger.read(ledger):
            alike = event.noise_multiplier == plan.noise_multiplier and event.sample_rate == plan.sample_rate
            if not alike or event.kind != "train":
                sys.exit(f"error: Expected runs of this year's plan in {year}; got another one in {ledger}.")
            steps += event.count
    return steps


def called(command: list[str]) -> int:
    """Run a command and return its exit code."""
    return subprocess.run(command, check=False).returncode


def main(train: Callable[[list[str]], int] = called) -> int:
    """Train, or say that nothing is left.

    Args:
      train: runs a command of dpquant and returns its exit code.
    """
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("year", type=Path, help="folder of the year's runs")
    parser.add_argument("--retrainings", type=int, default=12, help="planned in a year")
    parser.add_argument("--epsilon", type=float, default=3.0, help="of the whole year")
    parser.add_argument("--delta", type=float, default=1e-6)
    parser.add_argument("--records", type=int, default=60_000, help="about, and public")
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--epochs", type=int, default=5, help="of one retraining")
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    given, options = parser.parse_args(sys.argv[1:split]), sys.argv[split + 1 :]

    year = dpquant.PrivacyPlan.for_epochs(
        records=given.records,
        batch_size=given.batch_size,
        epochs=given.epochs * given.retrainings,
        epsilon=given.epsilon,
        delta=given.delta,
        analysis=False,
    )
    once = year.steps // given.retrainings
    spent = charged(given.year, year)
    if spent + once > year.steps:
        print(f"{spent:,} of the year's {year.steps:,} steps are charged, and {once:,} more do not fit.")
        return NOTHING_LEFT
    run = given.year / f"{len(list(given.year.glob('*'))) + 1:02}"
    command = ["dpquant", "train", *options, "--out", str(run), "--noise-multiplier", repr(year.noise_multiplier)]
    for name in ("delta", "records", "batch_size", "epochs"):
        command += [f"--{name.replace('_', '-')}", str(getattr(given, name))]
    code = train(command)
    after = math.ceil(1e4 * year.epsilon_spent(steps=charged(given.year, year))) / 1e4
    print(f"This year has spent epsilon {after:.4f} of {given.epsilon:g} at delta {given.delta:g}.")
    return code


if __name__ == "__main__":
    sys.exit(main())
