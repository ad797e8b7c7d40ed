# SPDX-License-Identifier: Apache-2.0
"""The heartbeat is written at most once a second, says when its process ends, and never ends a run."""

import dataclasses
import json

import pytest

from dpquant.errors import SettingError
from dpquant.runs.heartbeat import Beat, Heartbeat
from dpquant.runs.names import PROGRESS
from dpquant.runs.settings import TrainSettings, plan_of
from dpquant.runs.sinks import Progress, Sink
from dpquant.runs.timings import NOT_FOR_RELEASE
from dpquant.runs.train import train

SETTINGS = TrainSettings.chosen({"policy": "none", "noise_multiplier": 1.0})


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Counted(Heartbeat):
    """Keeps the step of every write."""

    def __init__(self, path, **given):
        super().__init__(path, **given)
        self.writes = []

    def _write(self, beat):
        self.writes.append(beat.step)
        super()._write(beat)


class Impatient(Counted):
    """Writes at every step."""

    def stepped(self, progress):
        self._written = 0.0
        super().stepped(progress)


def progress(step):
    return Progress(
        epoch=step // 10, epochs=3, step=step, steps=30, epsilon=1.0, layers_quantized=0, num_layers=2,
        macs_quantized=0.0, examples_per_second=100.0, accuracy_test=None,
    )  # fmt: skip


def beaten(kind, path, seconds):
    """The heartbeat after steps that take so many seconds each."""
    clock = Clock()
    beats = kind(path, clock=clock)
    beats.started(plan_of(SETTINGS), SETTINGS)
    for step, taken in enumerate(seconds, 1):
        clock.now += taken
        beats.stepped(progress(step))
    return beats


def assert_writes_once_a_second(kind, path):
    assert beaten(kind, path, [0.25] * 12).writes == [0, 4, 8, 12]
    assert beaten(kind, path, [2.0] * 3).writes == [0, 1, 2, 3]


def test_it_is_written_at_most_once_a_second(tmp_path):
    assert_writes_once_a_second(Counted, tmp_path / PROGRESS)


def test_one_that_writes_at_every_step_would_be_seen(tmp_path):
    with pytest.raises(AssertionError):
        assert_writes_once_a_second(Impatient, tmp_path / PROGRESS)


def test_it_says_how_far_the_run_is_that_it_is_the_operators_and_when_it_ends(tmp_path):
    path = tmp_path / PROGRESS
    beats = beaten(Heartbeat, path, [1.0, 7.0, 2.0])
    assert json.loads(path.read_text())["note"] == NOT_FOR_RELEASE
    beat = Beat.read(path)
    assert (beat.step, beat.steps, beat.epoch, beat.epochs) == (3, 30, 0, 3)
    assert beat.running and beat.longest_pause == 7.0 and beat.examples_per_second == 100.0
    beats.close()
    beats.close()
    assert Beat.read(path) == dataclasses.replace(beat, running=False, written=Beat.read(path).written)
    assert [one.name for one in tmp_path.iterdir()] == [PROGRESS]


def test_a_run_that_never_began_leaves_none(tmp_path):
    Heartbeat(tmp_path / PROGRESS).close()
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fails_does_not_end_the_run(tmp_path):
    beats = beaten(Counted, tmp_path / "missing" / PROGRESS, [2.0, 2.0])
    beats.close()
    assert beats.writes == [0, 1, 2, 2]


@pytest.mark.parametrize(
    "text",
    ["", '{"step": 1', "[]", "{}", "null", '{"written": 3}'],
    ids=["empty", "torn", "list", "{}", "null", "odd"],
)
def test_a_torn_one_is_none(text, tmp_path):
    assert Beat.read(tmp_path / PROGRESS) is None
    (tmp_path / PROGRESS).write_text(text)
    assert Beat.read(tmp_path / PROGRESS) is None


def test_one_with_values_of_other_types_is_none(tmp_path):
    beaten(Heartbeat, tmp_path / PROGRESS, [1.0])
    fields = json.loads((tmp_path / PROGRESS).read_text())
    for name, value in (("step", "many"), ("written", 1.0), ("running", "yes"), ("examples_per_second", "fast")):
        (tmp_path / PROGRESS).write_text(json.dumps({**fields, name: value}))
        assert Beat.read(tmp_path / PROGRESS) is None, name


class Refuses(Sink):
    def started(self, plan, settings):
        raise ConnectionError("no tracker")


class Fails(Sink):
    def stepped(self, progress):
        if progress.step == 3:
            raise ConnectionError("no tracker")


SMALL = TrainSettings.chosen(
    {"model": "mlp", "width": 0.1, "epochs": 1, "policy": "none", "microbatch_size": 64, "backend": "simulate"}
)


def test_a_run_that_fails_says_that_it_has_ended_and_one_that_is_refused_leaves_nothing(tmp_path):
    with pytest.raises(SettingError, match="sink Fails"):
        train(SMALL, tmp_path / "run", sinks=[Fails()])
    beat = Beat.read(tmp_path / "run" / PROGRESS)
    assert (beat.step, beat.running) == (3, False)
    with pytest.raises(SettingError, match="sink Refuses"):
        train(SMALL, tmp_path / "refused", sinks=[Refuses()])
    assert not (tmp_path / "refused").exists()
