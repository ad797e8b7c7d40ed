# SPDX-License-Identifier: Apache-2.0
"""`torchrun -m dpquant train`, as users start it: two real processes, which die, are stopped and are refused."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dpquant.app.cli import run as dpquant
from dpquant.privacy.ledger import Ledger
from dpquant.runs.record import RunRecord

SMALL = ["--policy", "rotate", "--backend", "simulate", "--microbatch-size", "64", "--checkpoint-every", "3steps"]
PLAN = 18  # steps in three epochs


def started(*arguments, restarts=0):
    """Two processes of `dpquant ARGUMENTS`, started by torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", str(restarts), "-m", "dpquant", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def process_of(agent, rank):
    """The id of the process of that rank."""
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    return next(int(c) for c in children if f"RANK={rank}\0" in Path(f"/proc/{c}/environ").read_text())


def wait_for(ledger, steps):
    while not ledger.exists() or ledger.read_text().count('"kind": "train"') < steps:
        time.sleep(0.05)


def errors(text):
    return [line for line in text.splitlines() if line.startswith("error:")]


def test_a_run_survives_the_death_of_a_process_and_loses_no_charge(tmp_path):
    out = tmp_path / "run"
    agent = started("train", "--epochs", "3", *SMALL, "--out", str(out), restarts=3)
    wait_for(out / "ledger.jsonl", 5)
    os.kill(process_of(agent, 1), signal.SIGKILL)
    printed, told = agent.communicate(timeout=300)
    assert agent.returncode == 0, told
    record, ledger = RunRecord.read(out / "record.json"), Ledger.verify(out / "ledger.jsonl")
    assert ledger.charged("train") == PLAN and record.steps <= PLAN and ledger.attempts >= 2
    assert record.epsilon <= 8 + 1e-9
    assert record.group is not None and record.group.world_size == len(record.group.processes) == 2
    assert "gloo" in record.group.backend
    assert any("no answer of process 1" in line for line in errors(told)), told
    assert len(re.findall(r"^epoch 3/3:", told, re.MULTILINE)) == 1, "one process prints"
    assert printed.count("test accuracy") == 1


@pytest.mark.parametrize("more", [(), ("--optimizer", "adamw", "--shard-optimizer")], ids=["whole", "sharded"])
def test_a_signal_to_one_process_stops_both_after_the_same_step_and_one_process_ends_the_run(more, tmp_path):
    out = tmp_path / "run"
    agent = started("train", "--epochs", "3", *SMALL, *more, "--out", str(out))
    wait_for(out / "ledger.jsonl", 5)
    os.kill(process_of(agent, 1), signal.SIGTERM)
    _, told = agent.communicate(timeout=120)
    assert agent.returncode != 0 and re.search(r"exitcode\s*: (143|-15)", told)
    (line,) = errors(told)
    steps = int(re.search(r"interrupted after (\d+) of 18 steps", line)[1])
    assert (out / "checkpoints" / f"step-{steps:08d}").is_dir()
    assert Ledger.verify(out / "ledger.jsonl").charged("train") == steps, "the rest of a lease is given back"
    assert dpquant(["resume", str(out)]) == 0
    record = RunRecord.read(out / "record.json")
    assert record.steps == PLAN and record.group is not None and record.group.world_size == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("train --epochs 0 --out OUT", "got epochs=0"),
        ("train --out FULL", "new or empty directory"),
        ("train --data image-folder:/nowhere --records 2000 --out OUT", "/nowhere"),
    ],
)
def test_a_refusal_is_one_line_of_two_processes(arguments, says, tmp_path):
    (tmp_path / "FULL").mkdir()
    (tmp_path / "FULL" / "other").write_text("")
    words = [str(tmp_path / word) if word in ("OUT", "FULL") else word for word in arguments.split()]
    agent = started(*words)
    printed, told = agent.communicate(timeout=120)
    assert agent.returncode != 0 and printed == ""
    (line,) = errors(told)
    assert says in line and not (tmp_path / "OUT").exists()
    assert [path.name for path in (tmp_path / "FULL").iterdir()] == ["other"]
