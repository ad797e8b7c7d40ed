# SPDX-License-Identifier: Apache-2.0
"""Trackers: what they are told and never told, under which names, and that none of them ends a run."""

import dataclasses
import importlib
import json
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from doubles import Stops, Told
from dpquant.app.cli import run as command
from dpquant.errors import SettingError
from dpquant.runs.record import EpochRecord, RunRecord
from dpquant.runs.settings import TrainSettings, plan_of
from dpquant.runs.sinks import Progress, Sink
from dpquant.runs.trackers.numbers import numbers_of
from dpquant.runs.trackers.registry import check_trackers, load_trackers
from dpquant.runs.trackers.tracking import Tracking
from dpquant.runs.train import train

PLUGIN = Path(__file__).parents[1] / "plugin"
SPY = Path(__file__).parents[1] / "spy.py"
RECORD = RunRecord.read(Path(__file__).parent / "fixtures" / "record-4.json")
SMALL = {"epochs": 2, "policy": "none", "microbatch_size": 64, "backend": "simulate"}


def small(**given):
    return TrainSettings.chosen({**SMALL, **given})


@pytest.fixture
def plugin(monkeypatch):
    """The module of another package, whose entry points name trackers."""
    monkeypatch.syspath_prepend(str(PLUGIN))
    importlib.invalidate_caches()
    module = importlib.import_module("their_trackers")
    yield module
    module.MADE.clear()


# Which trackers there are


def test_a_tracker_of_another_package_is_found_by_its_entry_point(plugin, tmp_path):
    record = train(small(track="theirs"), tmp_path / "run")
    (made,) = plugin.MADE
    assert made.told.of("finished") == [record] and made.closed
    assert made.told.of("epoch_ended") == record.per_epoch
    assert [one.step for one in made.told.of("stepped")] == list(range(1, record.steps + 1))
    assert made.run.folder == tmp_path / "run" / "trackers" / "theirs" and made.run.name == "run"


def test_without_its_package_it_is_refused():
    with pytest.raises(SettingError, match="name tensorboard or mlflow; got track=theirs"):
        load_trackers("theirs")


@pytest.mark.parametrize(
    ("track", "said"),
    [
        ("their", "Did you mean theirs?"),
        ("tensorboard,broken", "from their_trackers:Missing; got AttributeError"),
        ("number", "to be called with a run; got a int"),
    ],
)
def test_a_tracker_that_is_not_there_is_refused(track, said, plugin):
    with pytest.raises(SettingError, match=said):
        load_trackers(track)


@pytest.mark.parametrize(("track", "lacks"), [("tensorboard", "tensorboardX"), ("tensorboard,mlflow", "alembic")])
def test_a_missing_extra_is_refused_with_the_command_that_installs_it(track, lacks):
    name = track.rpartition(",")[2]
    with pytest.raises(SettingError, match=rf"track={name}; got no {lacks}.*pip install 'dpquant\[{name}\]'"):
        check_trackers(track, lambda module: module != lacks)
    check_trackers(track)  # here they are


@pytest.mark.parametrize("verb", ["train", "compare"])
def test_it_is_refused_before_torch_is_loaded_and_a_directory_made(verb, tmp_path):
    script = (
        f"import sys; from dpquant.app.cli import run; code = run([{verb!r}, '--track', 'nobody', '--out', 'out'])\n"
        f"sys.exit(100 if {verb == 'train'} and 'torch' in sys.modules else code)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (
        done.returncode == 2 and done.stderr.startswith("error: Expected track to name") and not any(tmp_path.iterdir())
    )


# The names of numbers

EPOCH = EpochRecord(
    index=4,
    epsilon=2.0,
    accuracy_test=0.5,
    metrics_test={"accuracy": 0.5, "loss": 1.5},
    layers_quantized=["conv"],
    nonprivate_accuracy_train=None,
    scores={"conv": 0.25},
)
PROGRESS = Progress(
    epoch=4,
    epochs=9,
    step=5,
    steps=9,
    epsilon=1.0,
    layers_quantized=1,
    num_layers=2,
    macs_quantized=0.75,
    examples_per_second=math.nan,
    accuracy_test=0.4,
)


def test_numbers_have_the_documented_names():
    plan = plan_of(small())
    assert numbers_of(EPOCH, PROGRESS, plan) == {
        "accuracy/test": 0.5,
        "loss/test": 1.5,
        "privacy/epsilon": 2.0,
        "privacy/epsilon_budget": plan.epsilon,
        "quantized/macs": 0.75,
        "score/conv": 0.25,
    }
    unsafe = dataclasses.replace(EPOCH, nonprivate_accuracy_train=0.875, scores=None)
    found = numbers_of(unsafe, dataclasses.replace(PROGRESS, examples_per_second=8.0), plan)
    assert found["unsafe/accuracy_train"] == 0.875 and found["speed/examples_per_second"] == 8.0
    assert "quantized/macs" not in numbers_of(EPOCH, None, plan)


# What is never told


class Clock:
    """Another time at every look."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        self.now += 1.0
        return self.now


def told_of(tracking, plugin, directory):
    """What a tracker is told of a run that has measured what is not for release, and the times it is given."""
    directory.mkdir()
    for name in ("report.html", "model.safetensors", "model.json"):
        (directory / name).touch()
    unsafe = dataclasses.replace(EPOCH, nonprivate_accuracy_train=0.875)
    record = dataclasses.replace(RECORD, per_epoch=[unsafe], unsafe_metrics=True)
    tracking.preparing("loading the data")
    tracking.started(plan_of(small()), small())
    tracking.stepped(dataclasses.replace(PROGRESS, examples_per_second=8.0))
    tracking.epoch_ended(unsafe)
    tracking.finished(record)
    (made,) = plugin.MADE
    return made, made.run.files(record)


def assert_nothing_unsafe_is_told(settings, plugin, directory, kind=Tracking):
    made, files = told_of(kind(settings, directory, clock=Clock()), plugin, directory)
    assert [math.isnan(one.examples_per_second) for one in made.told.of("stepped")] == [True]
    assert [one.nonprivate_accuracy_train for one in made.told.of("epoch_ended")] == [None]
    assert [epoch.nonprivate_accuracy_train for one in made.told.of("finished") for epoch in one.per_epoch] == [None]
    assert made.times == [101.0] * 3, "the time at which the process began"
    assert files == []


def test_nothing_unsafe_is_told(plugin, tmp_path):
    assert_nothing_unsafe_is_told(small(track="theirs", unsafe_metrics=True), plugin, tmp_path / "run")


class TellsTheSpeed(Tracking):
    def stepped(self, progress):
        self._tell(lambda sink: sink.stepped(progress))


class TellsTheTrainingAccuracy(Tracking):
    def epoch_ended(self, epoch):
        self._tell(lambda sink: sink.epoch_ended(epoch))


class TellsTheTrainingAccuracyAtLast(Tracking):
    def finished(self, record):
        self._tell(lambda sink: sink.finished(record))


class TellsTheTime(Tracking):
    def __init__(self, settings, directory, *, clock):
        super().__init__(settings, directory, clock=clock)
        self._now = clock


class HandsOverTheModel(Tracking):
    def __init__(self, settings, directory, *, clock):
        super().__init__(settings, directory, clock=clock)
        self._model = True


@pytest.mark.parametrize(
    "planted",
    [TellsTheSpeed, TellsTheTrainingAccuracy, TellsTheTrainingAccuracyAtLast, TellsTheTime, HandsOverTheModel],
)
def test_telling_it_would_be_seen(planted, plugin, tmp_path):
    with pytest.raises(AssertionError):
        assert_nothing_unsafe_is_told(small(track="theirs", unsafe_metrics=True), plugin, tmp_path / "run", planted)


def test_it_is_told_where_that_is_asked_for(plugin, tmp_path):
    settings = small(track="theirs", unsafe_metrics=True, track_unsafe=True, track_model=True)
    made, files = told_of(Tracking(settings, tmp_path / "run", clock=Clock()), plugin, tmp_path / "run")
    assert [one.examples_per_second for one in made.told.of("stepped")] == [8.0]
    assert [one.nonprivate_accuracy_train for one in made.told.of("epoch_ended")] == [0.875]
    assert [epoch.nonprivate_accuracy_train for one in made.told.of("finished") for epoch in one.per_epoch] == [0.875]
    assert made.times == [102.0, 103.0, 104.0]
    assert [path.name for path in files] == ["report.html", "model.safetensors", "model.json"]


# A tracker that fails


def shown_by(work):
    """The warnings about trackers that some work shows."""
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        work()
    return [str(one.message) for one in shown if "tracker" in str(one.message)]


def a_whole_run(kind, method, directory):
    """Tell trackers of a run of three steps in two epochs, among them one that fails in a method."""
    directory.mkdir()
    tracking = kind(small(track=f"failing-{method},theirs"), directory)
    tracking.preparing("loading the data")
    tracking.started(plan_of(small()), small())
    for _ in range(2):
        tracking.stepped(PROGRESS)
        tracking.epoch_ended(EPOCH)
    tracking.finished(RECORD)
    tracking.close()


ONE_WARNING = (
    "Expected tracker failing-{} to take a run's numbers; got ConnectionError: no route to the tracker. The run goes "
    "on. What the tracker lacks is in metrics.jsonl and record.json."
)


def assert_the_run_goes_on_with_one_warning(method, plugin, directory, kind=Tracking):
    assert shown_by(lambda: a_whole_run(kind, method, directory)) == [ONE_WARNING.format(method)]
    assert plugin.MADE[-1].told.of("finished") == [RECORD] and plugin.MADE[-1].closed, "the other tracker"


METHODS = ["init", "started", "stepped", "epoch_ended", "finished", "close"]


@pytest.mark.parametrize("method", METHODS)
def test_a_tracker_that_fails_is_one_warning_and_the_others_are_told(method, plugin, tmp_path):
    assert_the_run_goes_on_with_one_warning(method, plugin, tmp_path / "run")


class EndsTheRun(Tracking):
    def _going_on(self, name):
        return warnings.catch_warnings()


class WarnsEveryTime(Tracking):
    def _tell(self, tell):
        self._failed.clear()
        super()._tell(tell)


class Silent(Tracking):
    def _tell(self, tell):
        self._failed.update(self._sinks)
        super()._tell(tell)


@pytest.mark.parametrize("planted", [EndsTheRun, WarnsEveryTime, Silent])
def test_one_that_ends_the_run_warns_again_or_not_at_all_would_be_seen(planted, plugin, tmp_path):
    with pytest.raises((AssertionError, ConnectionError)):
        assert_the_run_goes_on_with_one_warning("stepped", plugin, tmp_path / "run", planted)


def test_a_run_whose_tracker_fails_is_complete(plugin, tmp_path):
    told, out = Told(), tmp_path / "run"
    shown = shown_by(lambda: train(small(track="failing-started"), out, sinks=[told]))
    assert shown == [ONE_WARNING.format("started")] and told.of("finished") == [RunRecord.read(out / "record.json")]


class Refuses(Sink):
    def started(self, plan, settings):
        raise ConnectionError


def test_a_run_that_is_refused_leaves_nothing_of_its_trackers(plugin, tmp_path):
    with pytest.raises(SettingError):
        train(small(track="tensorboard,theirs"), tmp_path / "run", sinks=[Refuses()])
    assert list(tmp_path.iterdir()) == [] and plugin.MADE[-1].closed


# TensorBoard


def scalars(folder):
    """{name: {step: value}} as TensorBoard itself reads them; a step that is there twice is refused."""
    read = EventAccumulator(str(folder))
    read.Reload()
    found = {}
    for name in read.Tags()["scalars"]:
        events = read.Scalars(name)
        found[name] = {event.step: event.value for event in events}
        assert len(found[name]) == len(events), name
    return found


def assert_tells_the_epochs_of(record, found):
    for name, numbers in {
        "accuracy/test": record.accuracy_per_epoch,
        "privacy/epsilon": [epoch.epsilon for epoch in record.per_epoch],
        "privacy/epsilon_budget": [plan_of(small()).epsilon] * record.epochs,
        "quantized/macs": [record.quantized_fraction_macs] * record.epochs,
    }.items():
        assert found[name] == pytest.approx(dict(enumerate(numbers, 1))), name
    assert not any(name.startswith(("speed", "unsafe")) for name in found)


def test_tensorboard_reads_what_the_record_says_also_of_a_run_that_was_continued(tmp_path):
    settings, out = small(track="tensorboard", checkpoint_every="1epoch"), tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        train(settings, out, sinks=[Stops(8)])
    assert set(scalars(out / "trackers" / "tensorboard")["accuracy/test"]) == {1}
    record = train(settings, out, resume=True)
    found = scalars(out / "trackers" / "tensorboard")
    assert_tells_the_epochs_of(record, found)
    found["privacy/epsilon"][2] += 0.01
    with pytest.raises(AssertionError):
        assert_tells_the_epochs_of(record, found)


# MLflow, and all of them under a spy


def as_command(out, *options, environment=None, script=SPY):
    """Run `dpquant train` under the spy, in the folder of the run directory."""
    hidden = ("PYTEST_CURRENT_TEST", "CI", "MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK")
    clean = {name: value for name, value in os.environ.items() if name not in hidden}
    path = os.pathsep.join([str(PLUGIN), *filter(None, [os.environ.get("PYTHONPATH")])])  # as the planted bugs set it
    words = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    return subprocess.run(
        [sys.executable, script, *options, *(words if options[0] == "train" else [])],
        cwd=out.parent,
        env={**clean, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **(environment or {})},
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_tracker_reaches_nobody_and_mlflow_keeps_what_the_record_says(tmp_path):
    out = tmp_path / "run"
    done = as_command(out, "train", "--track=tensorboard,mlflow,theirs", "--out=run")
    assert (done.returncode, "spy:" in done.stderr, "warning:" in done.stderr) == (0, False, False), done.stderr
    record = RunRecord.read(out / "record.json")
    assert_tells_the_epochs_of(record, scalars(out / "trackers" / "tensorboard"))
    kept = in_mlflow(tmp_path)
    assert_tells_the_epochs_of(record, kept["metrics"])
    assert kept["status"] == "FINISHED" and kept["tags"]["dpquant.statement"] == record.statement
    assert kept["params"]["epochs"] == "2" and kept["params"]["track"] == "tensorboard,mlflow,theirs"
    assert kept["files"] == ["record.json", "report.html"]
    assert len(kept["times"]) == 1, "start and end of the run and all numbers have one time"
    assert kept["user"] == "unknown" and not any("source" in name or "user" in name for name in kept["tags"])


def in_mlflow(folder):
    """What the only run in mlflow.db says, read by MLflow in a process of its own."""
    script = """
import json, os, sys
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
from mlflow import MlflowClient
client = MlflowClient("sqlite:///mlflow.db")
(run,) = client.search_runs([one.experiment_id for one in client.search_experiments()])
histories = {name: client.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
times = {one.timestamp for history in histories.values() for one in history}
print(json.dumps({
    "metrics": {name: [[one.step, one.value] for one in history] for name, history in histories.items()},
    "times": list(times | {run.info.start_time, run.info.end_time}),
    "params": run.data.params, "tags": run.data.tags, "status": run.info.status, "user": run.info.user_id,
    "files": sorted(one.path for one in client.list_artifacts(run.info.run_id)),
}))
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], cwd=folder, capture_output=True, text=True)
    found = json.loads(done.stdout)
    for name, history in found["metrics"].items():
        found["metrics"][name] = dict(history)
        assert len(found["metrics"][name]) == len(history), name
    return found


def test_a_run_that_is_continued_is_one_run_in_mlflow(tmp_path):
    out = tmp_path / "run"
    stopped = as_command(out, "train", "--track=mlflow,stopping", "--checkpoint-every=1epoch", "--out=run")
    assert stopped.returncode == 130, stopped.stderr
    assert in_mlflow(tmp_path)["status"] == "KILLED"
    done = as_command(out, "resume", "run", "--no-report")
    assert done.returncode == 0, done.stderr
    kept = in_mlflow(tmp_path)
    assert_tells_the_epochs_of(RunRecord.read(out / "record.json"), kept["metrics"])
    assert kept["status"] == "FINISHED" and kept["files"] == ["record.json"]


def test_one_that_looks_up_a_name_would_be_caught(tmp_path):
    done = as_command(tmp_path / "run", "train", "--track=asking", "--out=run", "--no-report")
    assert done.returncode == 97 and "spy: getaddrinfo 'tracker.example'" in done.stderr, done.stderr


def test_a_server_that_is_not_there_is_one_warning(tmp_path):
    environment = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    done = as_command(tmp_path / "run", "train", "--track=mlflow", "--out=run", "--no-report", environment=environment)
    assert done.returncode == 0 and done.stderr.count("warning: Expected tracker mlflow") == 1, done.stderr
    assert (tmp_path / "run" / "record.json").exists()


def test_settings_of_trackers_without_a_tracker_are_refused(capsys):
    assert command(["plan", "--track-model"]) == 2
    assert "Expected no track_model with track=None" in capsys.readouterr().err
