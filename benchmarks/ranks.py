# SPDX-License-Identifier: Apache-2.0
"""Kill processes of runs of several processes at random moments, and check that no charge is lost.

    scripts/bench ranks --kills 50

Each run is `torchrun --max-restarts N -m dpquant train` on digits. A process that is drawn gets SIGKILL at a moment
that is drawn: four in five within a second after a first charge since the last kill, the others from the start on. As
torchrun then starts all again, they continue the run. After each kill the ledger on disk is read as it is. Every kill
is in the result. The first that breaks a promise ends the benchmark with an error:

- The ledger verifies, and holds no fewer charges than before.
- torchrun starts the run again, and it ends: all of its plan is charged and no more.
- Record and ledger state the same epsilon, which is within the plan's.
"""

import argparse
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.kills import SMALL
from benchmarks.results import folder_here
from dpquant.privacy.ledger import Ledger
from dpquant.runs.directory import charged
from dpquant.runs.names import CHECKPOINTS, LEDGER, RECORD
from dpquant.runs.place import Place
from dpquant.runs.record import RunRecord
from dpquant.runs.settings import plan_of
from dpquant.training.checkpoint import Checkpoint, newest
from dpquant.training.state import RunState

LONGEST = 600.0  # seconds of a run after its last kill
EARLY_ONE_IN = 5
SPARE = 2  # restarts, for processes that do not find each other on a busy machine


@dataclasses.dataclass(frozen=True)
class Kill:
    """One process that was killed.

    Attributes:
      rank: of the process.
      seconds: waited since its start, or since a first charge.
      early: whether it might die before anything was charged.
      charged: training steps that the ledger held afterwards.
    """

    rank: int
    seconds: float
    early: bool
    charged: int


@dataclasses.dataclass(frozen=True)
class Ended:
    """A run that was killed and has ended.

    Attributes:
      kills: of its processes.
      seconds: from its start to its end.
      steps: of the plan, all of which are charged.
      lost: of them, those of which no checkpoint held what came.
      epsilon: that the run has spent.
      planned_epsilon: of the plan.
    """

    kills: list[Kill]
    seconds: float
    steps: int
    lost: int
    epsilon: float
    planned_epsilon: float


def ended(out: Path, draw: random.Random, *, size: int, kills: int) -> Ended:
    """Start a run of `size` processes, kill so many of them, one by one, and wait for its end.

    Raises:
      AssertionError: a promise of this file is broken.
    """
    began, found = time.monotonic(), []
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    launcher += ["--max-restarts", str(kills + SPARE)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with out.with_suffix(".log").open("w") as log:
        command = [*launcher, "-m", "dpquant", "train", "--out", str(out), *SMALL]
        agent = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            while len(found) < kills and agent.poll() is None:
                kill = _killed(agent, out / LEDGER, draw, size, before=found[-1].charged if found else 0)
                found += [] if kill is None else [kill]
            code = agent.wait(LONGEST)
        finally:
            agent.terminate()
    assert code == 0, f"exit code {code}: {out.with_suffix('.log').read_text()[-8000:]}"
    plan, record = plan_of(Place(out).settings()), RunRecord.read(out / RECORD)
    spent = charged(out / LEDGER, plan)
    assert spent.steps == plan.steps, f"{spent.steps} steps of {plan.steps} are charged"
    assert abs(spent.epsilon - record.epsilon) < 1e-9, "record and ledger state another epsilon"
    assert record.epsilon <= plan.epsilon + 1e-9, "the run spent more than its plan"
    assert record.group is not None and record.group.world_size == size, "another number of processes"
    seconds = round(time.monotonic() - began, 1)
    last = newest(out / CHECKPOINTS)[0]
    assert last is not None, "there is no checkpoint"
    lost = RunState.from_json(Checkpoint.read(last).facts["state"]).steps_lost
    return Ended(found, seconds, plan.steps, lost, record.epsilon, plan.epsilon)


def _killed(agent: subprocess.Popen, ledger: Path, draw: random.Random, size: int, *, before: int) -> Kill | None:
    """Kill a process of a run at a random moment; None if the run ended before it."""
    early, rank = draw.randrange(EARLY_ONE_IN) == 0, draw.randrange(size)
    seconds = draw.uniform(0, 12) if early else draw.uniform(0, 1)
    while agent.poll() is None and not (_process(agent.pid, rank) if early else _charged(ledger) > before):
        time.sleep(0.02)
    time.sleep(seconds)
    process = _process(agent.pid, rank)
    if process is None or agent.poll() is not None:
        return None
    os.kill(process, signal.SIGKILL)
    while _process(agent.pid, rank) == process:
        time.sleep(0.02)
    steps = Ledger.verify(ledger).charged("train") if _charged(ledger) else 0
    assert steps >= before, "a charge is lost"
    return Kill(rank=rank, seconds=round(seconds, 3), early=early, charged=steps)


def _process(agent: int, rank: int) -> int | None:
    """Return the id of the process of that rank which torchrun has started; None if there is none now."""
    try:
        for child in Path(f"/proc/{agent}/task/{agent}/children").read_text().split():
            if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
                return int(child)
    except OSError:
        pass
    return None


def _charged(ledger: Path) -> int:
    """Return the number of steps that a ledger holds, which may be in the middle of a line."""
    if not ledger.exists():
        return 0
    lines = [json.loads(line) for line in ledger.read_bytes().split(b"\n")[:-1]]
    return sum(line["count"] for line in lines if line["kind"] == "train")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    given = parser.parse_args()
    draw, runs = random.Random(given.seed), []
    with tempfile.TemporaryDirectory() as folder:
        while (done := sum(len(run.kills) for run in runs)) < given.kills:
            out = Path(folder) / f"run-{len(runs)}"
            kills = min(draw.randint(1, 4), given.kills - done)
            runs.append(ended(out, draw, size=given.processes, kills=kills))
            shutil.rmtree(out)
            result = {
                "kills": sum(len(run.kills) for run in runs),
                "runs": len(runs),
                "lost_charges": 0,  # one would have ended the benchmark
                "most_steps_lost": max(run.lost for run in runs),
                "processes": given.processes,
                "seed": given.seed,
                "each_run": [dataclasses.asdict(run) for run in runs],
            }
            (folder_here() / f"ranks-{given.seed}.json").write_text(json.dumps(result, indent=1) + "\n")
            print({name: value for name, value in result.items() if name != "each_run"}, flush=True)


if __name__ == "__main__":
    main()
