# SPDX-License-Identifier: Apache-2.0
import dataclasses
import json
import re

import pytest

from doubles import Told
from dpquant.errors import SettingError
from dpquant.privacy.ledger import Ledger
from dpquant.runs.directory import charged
from dpquant.runs.record import EpochRecord, RunRecord
from dpquant.runs.settings import TrainSettings, plan_of
from dpquant.runs.sinks import MetricsFile, Sink
from dpquant.runs.train import train


def small(**given):
    return TrainSettings.chosen({"epochs": 2, "policy": "none", "microbatch_size": 64, "backend": "simulate", **given})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One short run: (its directory, its record, what a sink was told)."""
    out, told = tmp_path_factory.mktemp("runs") / "run", Told()
    return out, train(small(), out, sinks=[told]), told.all


def assert_tells_all(told, record):
    """Once that the run starts; every step; every epoch after its steps; once the record."""
    steps = record.steps // record.epochs
    epoch = ["stepped"] * steps + ["epoch_ended"]
    assert [method for method, _ in told] == ["started", *epoch * record.epochs, "finished"]
    assert [what.step for method, what in told if method == "stepped"] == list(range(1, record.steps + 1))
    accuracies = [what.accuracy_test for method, what in told if method == "stepped"]
    assert accuracies == [None] * steps + [record.accuracy_per_epoch[0]] * steps
    assert [what for method, what in told if method == "epoch_ended"] == record.per_epoch
    assert told[0][1] == (plan_of(small()), small()) and told[-1][1] == record


def test_a_sink_is_told_how_the_run_goes(run):
    _, record, told = run
    assert_tells_all(told, record)


@pytest.mark.parametrize("planted", [lambda told: told[:-1], lambda told: told[:3] + told[4:], lambda told: told[::-1]])
def test_what_a_sink_is_not_told_would_be_seen(planted, run):
    _, record, told = run
    with pytest.raises(AssertionError):
        assert_tells_all(planted(told), record)


# The file of metrics


EPOCH = EpochRecord(
    index=1,
    epsilon=2.0,
    accuracy_test=0.5,
    metrics_test={"accuracy": 0.5},
    layers_quantized=["0"],
    nonprivate_accuracy_train=None,
    scores={"0": 0.25},
)


def test_metrics_hold_one_line_an_epoch_and_nothing_from_private_data(run):
    out, record, _ = run
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert lines == [
        {
            "epoch": e.index,
            "epsilon": e.epsilon,
            "accuracy_test": e.accuracy_test,
            "metrics_test": e.metrics_test,
            "layers_quantized": [],
        }
        for e in record.per_epoch
    ]


def test_a_training_accuracy_that_was_measured_is_in_the_metrics(tmp_path):
    sink = MetricsFile(tmp_path / "metrics.jsonl")
    sink.epoch_ended(EPOCH)
    sink.epoch_ended(dataclasses.replace(EPOCH, nonprivate_accuracy_train=0.75))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line.get("nonprivate_accuracy_train") for line in lines] == [None, 0.75]
    expected = {"epoch": 1, "epsilon": 2.0, "accuracy_test": 0.5, "layers_quantized": ["0"], "scores": {"0": 0.25}}
    assert lines[0] == {**expected, "metrics_test": {"accuracy": 0.5}}


# A sink that raises


class Raises(Sink):
    """Raises in one of its methods."""

    def __init__(self, method):
        def refuse(*what):
            raise ConnectionError("no route to the tracker")

        setattr(self, method, refuse)


def assert_ends_with_one_error_and_all_that_was_charged(train, out, method, steps):
    """The error says what was spent, the ledger holds it, and what was made until then is there."""
    with pytest.raises(SettingError, match=r"sink Raises.*ConnectionError: no route.*stays charged") as found:
        train(small(), out, sinks=[Raises(method)])
    plan = plan_of(small())
    spent = charged(out / "ledger.jsonl", plan)
    assert spent.steps == steps
    said = float(re.search(r"epsilon = (\d+\.\d{4})\.", str(found.value))[1])
    assert 0 <= said - plan.epsilon_spent(steps=steps, analyses=0) < 1e-4
    assert {path.name for path in out.iterdir()} >= {"config.toml", "choices.json", "ledger.jsonl"}
    epochs = {"stepped": 0, "epoch_ended": 1, "finished": 2}[method]
    for name in ("model.safetensors", "timings.json", "metrics.jsonl"):
        assert (out / name).exists() == (epochs > 0), name
    assert (out / "record.json").exists() == (epochs == 2)
    if epochs == 2:
        assert RunRecord.read(out / "record.json").steps == steps


@pytest.mark.parametrize(("method", "steps"), [("stepped", 1), ("epoch_ended", 6), ("finished", 12)])
def test_a_sink_that_raises_ends_the_run_with_one_error(method, steps, tmp_path):
    assert_ends_with_one_error_and_all_that_was_charged(train, tmp_path / "run", method, steps)


def that_goes_on(settings, out, *, sinks):
    """A run that does not care about its sinks."""
    return train(settings, out)


def that_loses_the_ledger(settings, out, *, sinks):
    try:
        return train(settings, out, sinks=sinks)
    finally:
        (out / "ledger.jsonl").unlink()
        Ledger(out / "ledger.jsonl")


def that_lets_it_through(settings, out, *, sinks):
    try:
        return train(settings, out, sinks=sinks)
    except SettingError as error:
        raise error.__cause__ from None


@pytest.mark.parametrize("planted", [that_goes_on, that_loses_the_ledger, that_lets_it_through])
def test_a_run_that_ends_otherwise_would_be_seen(planted, tmp_path):
    with pytest.raises((AssertionError, pytest.fail.Exception, ConnectionError)):
        assert_ends_with_one_error_and_all_that_was_charged(planted, tmp_path / "run", "epoch_ended", 6)


class Blocks(Sink):
    """Puts a folder where the file of metrics is to be."""

    def __init__(self, out):
        self._out = out

    def started(self, plan, settings):
        (self._out / "metrics.jsonl").mkdir()


def test_metrics_that_cannot_be_written_end_the_run_with_one_error(tmp_path):
    with pytest.raises(
        SettingError, match=r"sink MetricsFile.*IsADirectoryError.*stays charged: epsilon = \d\.\d{4}\."
    ):
        train(small(), tmp_path / "run", sinks=[Blocks(tmp_path / "run")])
    assert charged(tmp_path / "run" / "ledger.jsonl", plan_of(small())).steps == 6


def test_a_sink_that_raises_before_the_first_charge_refuses_the_run(tmp_path):
    with pytest.raises(SettingError, match="no route to the tracker"):
        train(small(), tmp_path / "run", sinks=[Raises("started")])
    assert list(tmp_path.iterdir()) == []
