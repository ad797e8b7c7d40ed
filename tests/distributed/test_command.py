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
from PIL import Image

from dpquant.app.cli import run as dpquant
from dpquant.privacy.ledger import Ledger
from dpquant.runs.record import RunRecord

SMALL = ["--policy", "rotate", "--backend", "simulate", "--microbatch-size", "64", "--checkpoint-every", "3steps"]
PLAN = 18  # steps in three epochs


def started(*arguments, restarts=0):
    """Two processes of `dpquant ARGUMENTS`, started by torchrun."""
    return launched(f"--max-restarts={restarts}", "-m", "dpquant", *arguments)


def shells(command):
    """Two shells that run a command, in which $RANK differs, started by torchrun."""
    return launched("--no-python", "bash", "-c", command)


def launched(*what):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *what]
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


def images(folder, shade):
    for split in ("train", "test"):
        for number, name in enumerate("ab"):
            (folder / split / name).mkdir(parents=True)
            for one in range(8):
                Image.new("L", (8, 8), 100 * number + shade + one).save(folder / split / name / f"{one}.png")
    return folder


APART = "--records 40 --batch-size 20 --image-size 8 --model cnn --noise-multiplier 1 --epochs 2 --partition range"


def test_images_that_stay_on_their_machine_are_trained_on(tmp_path):
    """Two folders for two machines; the run's record and statement say that it was so."""
    for rank in (0, 1):
        images(tmp_path / f"part{rank}", 50 * rank)
    out, data = tmp_path / "run", f"image-folder:{tmp_path}/part$RANK"
    options = f"--data {data} {APART} {' '.join(SMALL)} --microbatch-size 8 --out {out}"
    agent = shells(f"exec {sys.executable} -m dpquant train {options}")
    _, told = agent.communicate(timeout=300)
    assert agent.returncode == 0, told
    record = RunRecord.read(out / "record.json")
    assert record.source is not None and record.source["partition"] == "range" and record.steps == 4
    assert "had 2 processes" in record.statement and "read records of its own" in record.statement
    assert "network between them are trusted" in (out / "report.html").read_text()
    assert dpquant(["verify", str(out)]) == 0


REFUSED = {
    "train --epochs 0 --out OUT": "got epochs=0",
    "train --out FULL": "new or empty directory",
    "train --data image-folder:/nowhere --records 2000 --out OUT": "/nowhere",
    f"train --data image-folder:PART {APART} --out OUT": "the same files on processes 0 and 1",
}


def test_a_refusal_is_one_line_of_two_processes(tmp_path):
    """One pair of shells tries all, one after the other."""
    images(tmp_path / "PART", 0)
    (tmp_path / "FULL").mkdir()
    (tmp_path / "FULL" / "other").write_text("")
    dpquant = f"{sys.executable} -m dpquant"
    tried = [f"{dpquant} {arguments}; echo exit $? >&2" for arguments in REFUSED]
    words = re.sub("OUT|FULL|PART", lambda name: str(tmp_path / name[0]), "; ".join([*tried, "exit 0"]))
    agent = shells(words)
    printed, told = agent.communicate(timeout=300)
    assert agent.returncode == 0 and printed == ""
    assert told.count("exit 2\n") == 2 * len(REFUSED)
    for line, says in zip(errors(told), REFUSED.values(), strict=True):
        assert says in line
    assert not (tmp_path / "OUT").exists()
    assert [path.name for path in (tmp_path / "FULL").iterdir()] == ["other"]
