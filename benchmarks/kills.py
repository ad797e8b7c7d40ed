# SPDX-License-Identifier: Apache-2.0
"""Kill training runs at random moments, continue each to its end, and check that no charge is lost.

    scripts/bench kills --kills 1000

Every attempt is `dpquant train --resume` on a small job, digits or an image folder, and gets SIGKILL at a moment that
is drawn beforehand: four in five within half a second after their first charge, the others from their start on. One
attempt in ten is a new process, which also dies while it imports; the others are forked from a process that has
imported everything. After each kill the ledger and the checkpoints on disk are read as they are. Every
kill is in the result. The first that breaks a promise ends the benchmark with an error:

- The ledger verifies, and holds no fewer charges than before.
- No checkpoint and no model is ahead of the ledger.
- What the attempt charged and lost is at most one interval between checkpoints and one lease of the ledger.
- Continued to its end, the run has all of its plan charged and no more; record and ledger state the same epsilon.
"""

import argparse
import dataclasses
import functools
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.results import folder_here
from dpquant.app import cli
from dpquant.privacy.ledger import Ledger
from dpquant.runs.directory import charged
from dpquant.runs.names import CHECKPOINTS, LEDGER, RECORD
from dpquant.runs.place import Place
from dpquant.runs.record import RunRecord
from dpquant.runs.settings import plan_of
from dpquant.training.checkpoint import newest

EVERY = 3  # steps between checkpoints
EPOCHS = 6
SMALL = [
    "--policy",
    "rotate",
    "--epochs",
    str(EPOCHS),
    "--checkpoint-every",
    f"{EVERY}steps",
    "--microbatch-size",
    "64",
]
IMAGES = ["--model", "cnn", "--image-size", "12", "--records", "120", "--batch-size", "20"]
LONGEST = 300.0  # seconds of an attempt that nobody kills
COLD_ONE_IN, EARLY_ONE_IN = 10, 5  # attempts that are new processes, and that may be killed before they train


@dataclasses.dataclass(frozen=True)
class Kill:
    """One attempt that was killed.

    Attributes:
      seconds: from its start, or from its first charge.
      cold: whether it was a new process, which had to import first.
      charged: training steps that the ledger held afterwards.
      lost: of the steps that this attempt charged, those that no checkpoint holds.
      phase: how far the run was: no directory, settings, ledger, training.
    """

    seconds: float
    cold: bool
    charged: int
    lost: int
    phase: str


class Attempts:
    """Starts the command line, in a new process or in one that is forked after all imports."""

    def __init__(self):
        os.environ["OMP_NUM_THREADS"] = "1"  # of every process that is started
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["dpquant.runs.train", "dpquant.app.cli", "sklearn.datasets"])

    def killed(
        self, arguments: Sequence[str], seconds: float, *, cold: bool, log: Path, begun: Callable[[], bool]
    ) -> bool:
        """Run a command line and kill it so many seconds after it has begun. Return whether it was still there."""
        if cold:
            with log.open("w") as file:
                process = subprocess.Popen([sys.executable, "-m", "dpquant", *arguments], stdout=file, stderr=file)
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                process.kill()
            return process.wait() == -signal.SIGKILL
        process = self._context.Process(target=_verb, args=(arguments, log))
        process.start()
        while process.is_alive() and not begun():
            time.sleep(0.005)
        process.join(seconds)
        process.kill()
        process.join()
        return process.exitcode == -signal.SIGKILL

    def ended(self, arguments: Sequence[str], *, log: Path) -> None:
        """Run a command line to its end.

        Raises:
          RuntimeError: it fails; the message has its last words.
        """
        process = self._context.Process(target=_verb, args=(arguments, log))
        process.start()
        process.join(LONGEST)
        if process.exitcode != 0:
            process.kill()
            raise RuntimeError(f"dpquant {' '.join(arguments)}: exit code {process.exitcode}: {log.read_text()[-500:]}")


def _verb(arguments: Sequence[str], log: Path) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.exit(cli.run(list(arguments)))


def endured(out: Path, options: Sequence[str], attempts: Attempts, draw: random.Random, kills: int) -> list[Kill]:
    """Begin a run, kill it so many times, or until it has ended, and continue it to its end.

    Args:
      out: the run directory, which must not exist.
      options: of `dpquant train`.
      attempts: starts the command line.
      draw: source of the moments.
      kills: number of kills at most.

    Raises:
      AssertionError: a promise of this file is broken.
      RuntimeError: the run cannot be continued.
    """
    command = ["train", "--resume", "--out", str(out), *options]
    log = out.with_suffix(".log")
    found: list[Kill] = []
    before = 0
    while len(found) < kills and not (out / RECORD).exists():
        cold, early = draw.randrange(COLD_ONE_IN) == 0, draw.randrange(EARLY_ONE_IN) == 0
        seconds = draw.uniform(0, 8) if cold else draw.uniform(0, 2) if early else draw.uniform(0, 0.5)
        begun = functools.partial(_begun, out / LEDGER, 0 if early else len(_charges(out / LEDGER)) + 1)
        if not attempts.killed(command, seconds, cold=cold, log=log, begun=begun):
            assert (out / RECORD).exists(), f"ended by itself without a record: {log.read_text()[-500:]}"
            break
        found.append(_checked(out, before, seconds, cold=cold))
        before = found[-1].charged
    if not (out / RECORD).exists():
        attempts.ended(command, log=log)
    plan, record = plan_of(Place(out).settings()), RunRecord.read(out / RECORD)
    spent = charged(out / LEDGER, plan)
    assert spent.steps == plan.steps, f"{spent.steps} steps of {plan.steps} are charged"
    assert abs(spent.epsilon - record.epsilon) < 1e-9, "record and ledger state another epsilon"
    assert record.epsilon <= plan.epsilon + 1e-9, "the run spent more than its plan"
    return found


def _checked(out: Path, before: int, seconds: float, *, cold: bool) -> Kill:
    """Check what a kill has left on disk."""
    ledger = out / LEDGER
    if not ledger.exists() or not ledger.stat().st_size:
        assert before == 0, "the ledger is gone"
        phase = "settings" if out.exists() else "no directory"
        return Kill(seconds=seconds, cold=cold, charged=0, lost=0, phase=phase)
    steps = Ledger.verify(ledger).charged("train")
    assert steps >= before, "a charge is lost"
    found = newest(out / CHECKPOINTS)[0] if (out / CHECKPOINTS).exists() else None
    step = int(found.name.removeprefix("step-")) if found is not None else 0
    assert step <= steps, "a checkpoint is ahead of the ledger"
    lost = steps - max(step, before)
    assert lost <= EVERY + max(_charges(ledger), default=0), f"{lost} steps are lost"
    phase = "training" if steps > before else "ledger"
    return Kill(seconds=seconds, cold=cold, charged=steps, lost=lost, phase=phase)


def _charges(ledger: Path) -> list[int]:
    """Return the number of steps of each complete train line."""
    if not ledger.exists():
        return []
    lines = [json.loads(line) for line in ledger.read_bytes().split(b"\n")[:-1]]
    return [line["count"] for line in lines if line["kind"] == "train"]


def _begun(ledger: Path, charges: int) -> bool:
    """Return whether the ledger holds so many charges."""
    return len(_charges(ledger)) >= charges


def put_images(folder: Path) -> None:
    """Write a small image folder: two classes, noise of two brightnesses."""
    draw = np.random.default_rng(0)
    for split, count in (("train", 60), ("test", 10)):
        for number, name in enumerate(("dark", "light")):
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = draw.integers(80 * number, 160 + 80 * number, (12, 12, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{index}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    given = parser.parse_args()
    draw, attempts, began = random.Random(given.seed), Attempts(), time.monotonic()
    kills: list[Kill] = []
    runs: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "images"
        put_images(images)
        jobs = {
            "digits": SMALL,
            "image-folder": [*SMALL, *IMAGES, "--data", f"image-folder:{images}"],
        }
        while len(kills) < given.kills:
            name = ("digits", "image-folder")[len(runs) % 2]
            out = Path(folder) / f"run-{len(runs)}"
            found = endured(out, jobs[name], attempts, draw, min(draw.randint(4, 20), given.kills - len(kills)))
            shutil.rmtree(out)
            kills += found
            runs.append({"data": name, "kills": [dataclasses.asdict(one) for one in found]})
            print(f"{len(kills)} kills, {len(runs)} runs ended, {time.monotonic() - began:.0f} s", flush=True)
            result = {**summary(kills, len(runs)), "seed": given.seed, "each_run": runs}
            (folder_here() / f"kills-{given.seed}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(summary(kills, len(runs)), indent=2))


def summary(kills: Sequence[Kill], runs: int) -> dict:
    """Return what there is to say of all kills together."""
    return {
        "kills": len(kills),
        "runs": runs,
        "new_processes": sum(one.cold for one in kills),
        "phases": dict(Counter(one.phase for one in kills)),
        "lost_charges": 0,  # one would have ended the benchmark
        "most_steps_lost": max(one.lost for one in kills) if kills else 0,
        "interval": EVERY,
    }


if __name__ == "__main__":
    main()
