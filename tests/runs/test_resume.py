# SPDX-License-Identifier: Apache-2.0
"""`dpquant resume`: a run that was stopped or killed ends as it would have; what does not belong to it is refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from doubles import Dies
from dpquant.app.cli import run as dpquant
from dpquant.data.split import Split
from dpquant.errors import DataError, SettingError
from dpquant.privacy.ledger import Ledger
from dpquant.runs.directory import RunDirectory
from dpquant.runs.record import RunRecord
from dpquant.runs.settings import TrainSettings, checkpoint_steps, plan_of
from dpquant.runs.sinks import Sink
from dpquant.runs.stopping import Stopping
from dpquant.runs.timings import Timings
from dpquant.runs.train import train

SMALL = {
    "epochs": 3,
    "backend": "simulate",
    "microbatch_size": 64,
    "policy": "rotate",
    "checkpoint_every": "1epoch",
}


def settings(**given):
    return TrainSettings.chosen({**SMALL, **given})


class Asks(Sink):
    """The system, which asks the run to end after so many steps."""

    def __init__(self, steps, number=signal.SIGTERM):
        self._steps, self._number = steps, number

    def stepped(self, progress):
        if progress.step == self._steps:
            os.kill(os.getpid(), self._number)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The directory of a run that was stopped by SIGTERM in its second epoch: six steps an epoch."""
    out = tmp_path_factory.mktemp("runs") / "stopped"
    with pytest.raises(Exception, match=r"interrupted after 8 of 18 steps; .*Continue by: dpquant resume") as stop:
        train(settings(), out, sinks=[Asks(8)])
    assert stop.value.exit_code == 143
    return out


def copied(run, tmp_path):
    return Path(shutil.copytree(run, tmp_path / "copy"))


def test_a_stopped_run_has_a_checkpoint_of_its_last_step_and_gives_back_its_lease(stopped):
    assert (stopped / "checkpoints" / "step-00000008").is_dir()
    assert Ledger.verify(stopped / "ledger.jsonl").charged("train") == 8
    assert not (stopped / "record.json").exists()


def test_a_stopped_run_continues_to_its_end(stopped, tmp_path):
    out = copied(stopped, tmp_path)
    record = train(settings(), out, resume=True)
    assert record == RunRecord.read(out / "record.json")
    assert [epoch.index for epoch in record.per_epoch] == [0, 1, 2] and record.steps == 18
    assert Ledger.verify(out / "ledger.jsonl").charged("train") == 18
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1, 2]
    assert record.epsilon == pytest.approx(plan_of(settings()).epsilon, abs=1e-3)


def test_the_first_epoch_keeps_its_figures(stopped, tmp_path):
    before = json.loads((stopped / "metrics.jsonl").read_text().splitlines()[0])
    record = train(settings(), copied(stopped, tmp_path), resume=True)
    assert record.per_epoch[0].accuracy_test == before["accuracy_test"]
    assert record.per_epoch[0].layers_quantized == before["layers_quantized"]


@pytest.mark.always
@pytest.mark.parametrize("at", [1, 7, 18])
def test_a_killed_run_ends_within_its_plan(at, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(Dies.Killed):
        train(settings(), out, sinks=[Dies(at)])
    record = train(settings(), out, resume=True)
    ledger = Ledger.verify(out / "ledger.jsonl")
    assert ledger.charged("train") == 18 and ledger.attempts == 2
    assert record.epsilon <= plan_of(settings()).epsilon + 1e-9
    assert record.per_epoch[-1].index == (1 if at == 18 else 2)  # of an epoch that was lost whole nothing is left


def test_a_run_whose_only_epoch_lost_its_last_step_ends_though_no_step_was_timed(tmp_path):
    out, chosen = tmp_path / "run", settings(epochs=1, checkpoint_every="5steps")
    with pytest.raises(Dies.Killed):
        train(chosen, out, sinks=[Dies(6)])
    record = train(chosen, out, resume=True)
    assert [epoch.index for epoch in record.per_epoch] == [0] and record.steps == 6
    timings = Timings.read(out / "timings.json")
    assert timings is not None and timings.seconds_train == timings.examples_per_second == 0.0


def test_the_averaged_model_continues(tmp_path):
    out = tmp_path / "run"
    with pytest.raises(Exception, match="interrupted after 4"):
        train(settings(average=0.9), out, sinks=[Asks(4, signal.SIGINT)])
    parts = json.loads((out / "checkpoints" / "step-00000004" / "state.json").read_text())
    assert "average" in parts
    train(settings(average=0.9), out, resume=True)


# What does not belong to the run


def test_other_settings_are_refused(stopped, tmp_path):
    with pytest.raises(SettingError, match=r"Expected lr=0\.2, as in"):
        train(settings(lr=0.3), copied(stopped, tmp_path), resume=True)


def test_a_run_that_has_ended_is_printed_again_and_nothing_is_charged(tmp_path, capsys):
    out = tmp_path / "run"
    command = ["train", "--resume", "--out", str(out), "--epochs", "1", "--policy", "none", "--microbatch-size", "64"]
    assert dpquant(command) == 0
    first, before = capsys.readouterr().out, {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for again in (command, ["resume", str(out)]):
        assert dpquant(again) == 0
        told = capsys.readouterr()
        assert told.out == first and "has ended already" in told.err
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert dpquant([*command[:-1], "32"]) == 2
    assert "Expected microbatch_size=64, as in" in capsys.readouterr().err


def test_a_run_that_has_ended_is_trained_by_nobody(stopped, tmp_path):
    out = copied(stopped, tmp_path)
    (out / "record.json").write_text("{}")
    with pytest.raises(SettingError, match="Expected a run that has not ended"):
        train(settings(), out, resume=True)


@pytest.mark.parametrize("place", ["nowhere", "."])
def test_a_directory_without_a_run_is_refused(place, tmp_path, capsys):
    assert dpquant(["resume", str(tmp_path / place)]) == 2
    assert capsys.readouterr().err.startswith("error: Expected the directory of a run")


def test_a_broken_checkpoint_is_passed_over_and_said(stopped, tmp_path):
    out = copied(stopped, tmp_path)
    (out / "checkpoints" / "step-00000008" / "state.json").write_text("{}")
    with pytest.warns(UserWarning, match=r"step-00000008.*continues from step-00000006"):
        record = train(settings(), out, resume=True)
    assert record.steps == 18 and record.epsilon <= plan_of(settings()).epsilon + 1e-9


def test_other_records_are_refused_when_a_run_continues(stopped, tmp_path):
    out = copied(stopped, tmp_path)
    (out / "records.json").unlink()
    RunDirectory(out).know_records(split())
    with pytest.raises(DataError, match="Expected the training records with which the run was begun"):
        train(settings(), out, resume=True)


def test_a_ledger_that_lost_a_line_is_refused(stopped, tmp_path, capsys):
    out = copied(stopped, tmp_path)
    lines = (out / "ledger.jsonl").read_bytes().split(b"\n")
    (out / "ledger.jsonl").write_bytes(b"\n".join(lines[:2] + lines[3:]))
    assert dpquant(["resume", str(out)]) == 2
    assert capsys.readouterr().err.startswith("error: Expected ")


def test_a_run_without_its_ledger_is_refused(stopped, tmp_path, capsys):
    """Else a deleted ledger would be a budget that is new."""
    out = copied(stopped, tmp_path)
    (out / "ledger.jsonl").unlink()
    assert dpquant(["resume", str(out)]) == 2
    assert "ledger" in capsys.readouterr().err


def split(**changes) -> Split:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (100, 1, 4, 4), generator=generator, dtype=torch.uint8)
    made = Split(pixels, torch.arange(100) % 3)
    for name, value in changes.items():
        getattr(made, name)[0] = value
    return made


def test_the_same_records_are_known_again(tmp_path):
    for _ in range(2):
        RunDirectory(tmp_path).know_records(split())
    assert (tmp_path / "records.json").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("other", [split(pixels=1), split(targets=2), split(readable=False)])
def test_other_records_are_refused(other, tmp_path):
    RunDirectory(tmp_path).know_records(split())
    with pytest.raises(DataError, match="Expected the training records with which the run was begun"):
        RunDirectory(tmp_path).know_records(other)


def test_equal_records_have_unequal_fingerprints(tmp_path):
    """Salted: nobody can tell from two of them whether the records are the same."""
    hashes = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        RunDirectory(tmp_path / name).know_records(split())
        hashes.append(json.loads((tmp_path / name / "records.json").read_text())["sha256"])
    assert hashes[0] != hashes[1]


# Signals


def test_the_first_signal_is_kept_and_the_second_interrupts():
    before = signal.getsignal(signal.SIGINT)  # a job in the background of a shell ignores it
    with Stopping() as stopping:
        assert stopping.asked is None
        os.kill(os.getpid(), signal.SIGINT)
        assert stopping.asked == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)  # the signal arrives before it ends
    assert signal.getsignal(signal.SIGINT) is before


# How often


def test_the_echo_of_a_signal_is_the_same_signal():
    """torchrun passes on what the terminal has sent already; what comes later interrupts."""
    times = iter([100.0, 104.9, 105.0])
    with Stopping(5.0, clock=lambda: next(times)) as stopping:
        signal.raise_signal(signal.SIGINT)
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            pytest.fail("the echo was taken for a second signal")
        assert stopping.asked == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(
    ("given", "step_seconds", "write_seconds", "steps"),
    [
        ({}, 1.0, 0.01, 6),  # an epoch
        ({}, 100.0, 0.01, 3),  # five minutes
        ({}, 0.001, 0.01, 500),  # two percent of the time
        ({"checkpoint_every": "2 epochs"}, 0.001, 10.0, 12),
        ({"checkpoint_every": "4steps"}, 1.0, 0.01, 4),
        ({"checkpoint_every": "0.5minutes"}, 10.0, 0.01, 3),
    ],
)
def test_checkpoints_are_as_often_as_asked(given, step_seconds, write_seconds, steps):
    chosen = TrainSettings.chosen({"epochs": 3, **given})
    assert checkpoint_steps(chosen, plan_of(chosen), step_seconds, write_seconds) == steps


@pytest.mark.parametrize("text", ["", "often", "0 epochs", "-1steps", "3", "5 hours"])
def test_an_interval_in_no_known_form_is_refused(text):
    with pytest.raises(SettingError, match="Expected checkpoint_every to be a number of"):
        settings(checkpoint_every=text)


# The real program


def lines_of(path):
    """Return how many lines a file has; 0 where there is none."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_sigkill_at_any_moment_loses_no_charge(tmp_path):
    """Also before the first step, and while files are written."""
    out = tmp_path / "run"
    options = ["--epochs", "6", "--policy", "rotate", "--microbatch-size", "64", "--checkpoint-every", "3steps"]
    program = "import sys; from dpquant.app.cli import main; main()"
    command = [sys.executable, "-c", program]
    charged = 0
    for lines, seconds in ((0, 1.0), (2, 0.0), (9, 0.1), (15, 0.05)):  # of the ledger, and how long after them
        process = subprocess.Popen(
            [*command, "train", "--resume", "--out", str(out), *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        while lines_of(out / "ledger.jsonl") < lines and process.poll() is None:
            time.sleep(0.01)
        time.sleep(seconds)
        process.kill()
        _, said = process.communicate()
        assert process.returncode == -signal.SIGKILL, said
        if lines_of(out / "ledger.jsonl"):
            now = Ledger.verify(out / "ledger.jsonl").charged("train")
            assert now >= charged
            charged = now
    assert 0 < charged < 36
    subprocess.run([*command, "train", "--resume", "--out", str(out), *options], check=True, capture_output=True)
    record = RunRecord.read(out / "record.json")
    assert Ledger.verify(out / "ledger.jsonl").charged("train") == 36
    assert record.epsilon <= 8.0 + 1e-9
