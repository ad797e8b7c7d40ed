# SPDX-License-Identifier: Apache-2.0
"""What a run directory holds at the end, after a failure, and where a run is refused."""

import errno
import functools
import json

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_file, save_model

from doubles import BUILT, Stops, Told
from dpquant.data import dataset as data
from dpquant.data import models
from dpquant.errors import DivergedError, ModelError, SettingError
from dpquant.privacy.accounting import epsilon
from dpquant.privacy.events import Event
from dpquant.privacy.ledger import Ledger
from dpquant.runs.directory import Charged, RunDirectory, charged
from dpquant.runs.evaluation import accuracy
from dpquant.runs.names import LEDGER, MODEL
from dpquant.runs.place import Place
from dpquant.runs.settings import TrainSettings, plan_of
from dpquant.runs.sinks import Sink
from dpquant.runs.timings import Timings
from dpquant.runs.train import train
from dpquant.training.checkpoint import Checkpoint, newest


def small(**given):
    return TrainSettings.chosen({"epochs": 2, "policy": "none", "microbatch_size": 64, "backend": "simulate", **given})


# What a run has spent is what its ledger says.


def test_a_run_without_a_ledger_has_spent_nothing(tmp_path):
    assert charged(tmp_path / "ledger.jsonl", plan_of(small())) == (0, 0.0, False)


def ledger_of_other_rates(path, research=False):
    """A ledger whose lines are not what the plan of these settings says."""
    ledger = Ledger(path, research=research)
    ledger.charge(kind="train", sample_rate=0.3, noise_multiplier=1.7, count=3)
    ledger.charge(kind="analysis", sample_rate=0.2, noise_multiplier=2.5)
    return path


def assert_reads_the_ledgers_own_lines(read, folder):
    events = [
        Event(kind="train", sample_rate=0.3, noise_multiplier=1.7, count=3),
        Event(kind="analysis", sample_rate=0.2, noise_multiplier=2.5, count=1),
    ]
    found = read(ledger_of_other_rates(folder / "ledger.jsonl"), plan_of(small(policy="dpquant")))
    assert found == (3, epsilon(events, 1e-4), False)
    assert read(
        ledger_of_other_rates(folder / "seeded.jsonl", research=True), plan_of(small(policy="dpquant"))
    ).research


def test_what_was_spent_is_read_from_the_ledgers_own_lines(tmp_path):
    assert_reads_the_ledgers_own_lines(charged, tmp_path)


def by_the_plan(ledger, plan):
    return Charged(3, plan.epsilon_spent(steps=3, analyses=1), any(c.research for c in Ledger.read(ledger)))


def without_research(ledger, plan):
    return charged(ledger, plan)._replace(research=False)


@pytest.mark.parametrize("planted", [by_the_plan, without_research])
def test_spending_that_is_not_the_ledgers_would_be_seen(planted, tmp_path):
    with pytest.raises(AssertionError):
        assert_reads_the_ledgers_own_lines(planted, tmp_path)


# Nothing is spent before everything was tried.


def assert_refused_before_any_charge(train, out, error, words, directory=RunDirectory, **given):
    """One error, no charge, no step, and nothing written."""
    told, charges = Told(), []

    class Watched(Place):
        def give_back(self):
            if (self.path / LEDGER).exists():  # else nothing can have been charged
                charges.extend(Ledger.read(self.path / LEDGER))
            super().give_back()

    with pytest.raises(Exception, match=r".") as found:  # what it is, below: a late one may be any
        train(small(**given), Watched(out), sinks=[told], directory=directory)
    assert charges == [], "something was charged"
    assert told.all == [], "the run had begun"
    assert isinstance(found.value, error) and words in str(found.value)
    assert "secret" not in str(found.value), "what a record made the model say"
    assert not out.exists()


REFUSED = {
    "no tensor in its state": ("doubles:with_a_word_in_its_state", ModelError, "save and load back"),
    "half a tensor": ("doubles:with_half_a_tensor", ModelError, "save and load back"),
    "comes back as another": ("doubles:that_saves_another", ModelError, "another"),
    "no evaluation": ("doubles:that_cannot_evaluate", ModelError, "to 10 logits"),
    "evaluation of another shape": ("doubles:that_evaluates_to_pairs", ModelError, "gave shape (2, 10, 2)"),
    "evaluation fails on records": (
        "doubles:that_fails_on_records",
        ModelError,
        "evaluation mode; got a ValueError",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_fail_after_an_epoch_is_tried_before_any_charge(name, tmp_path):
    model, error, words = REFUSED[name]
    assert_refused_before_any_charge(train, tmp_path / "run", error, words, model=model)


class WithoutTrial(RunDirectory):
    def try_saving(self, model):
        """What was done before: the model is saved for the first time after an epoch."""


class ChargesFirst(RunDirectory):
    def begin(self, model, choices, epochs):
        ledger_of_other_rates(self.path / "other").replace(self.path / LEDGER)
        super().begin(model, choices, epochs)


class FailsAfterAnEpoch(Sink):
    def epoch_ended(self, epoch):
        raise ValueError("save and load back")


def that_fails_late(settings, out, *, sinks, directory):
    sound = small(model="cnn")
    return train(sound, out, sinks=[*sinks, FailsAfterAnEpoch()], directory=directory)


@pytest.mark.parametrize(
    ("planted", "directory"), [(train, WithoutTrial), (train, ChargesFirst), (that_fails_late, RunDirectory)]
)
def test_a_failure_after_a_charge_would_be_seen(planted, directory, tmp_path):
    model, error, words = REFUSED["half a tensor"]
    with pytest.raises(AssertionError, match=r"charged|begun"):
        assert_refused_before_any_charge(planted, tmp_path / "run", error, words, directory, model=model)


class Failing(RunDirectory):
    """A disk that is full from some save on; the first is the trial."""

    def __init__(self, path, fault, at):
        super().__init__(path)
        self._fault, self._left = fault, at

    def save(self, model, path):
        self._left -= 1
        super().save(model, path) if self._left else self._fault()


def no_space():
    raise OSError(errno.ENOSPC, "No space left on device")


def no_space_for_safetensors():
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


class FullFromTheStart(Failing):
    def __init__(self, path):
        super().__init__(path, no_space, at=1)


class FullForSafetensors(Failing):
    def __init__(self, path):
        super().__init__(path, no_space_for_safetensors, at=1)


@pytest.mark.parametrize("directory", [FullFromTheStart, FullForSafetensors])
def test_a_place_without_room_for_the_model_is_refused_before_any_charge(directory, tmp_path):
    words = "No space left on device"
    assert_refused_before_any_charge(train, tmp_path / "run", SettingError, words, directory)


def test_a_directory_that_was_there_stays_when_a_run_is_refused(tmp_path):
    with pytest.raises(SettingError, match="No space left"):
        train(small(), tmp_path, directory=FullFromTheStart)
    assert list(tmp_path.iterdir()) == []


# Nothing is lost: after every epoch the last finite model is on disk.


def assert_keeps_the_last_good_model(out, epochs):
    """The saved model has not diverged and has the accuracy of the last metrics; nothing else is half-written."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == epochs
    assert all((tensor.abs() <= 1e12).all() for tensor in load_file(out / MODEL).values())
    model = models.build("cnn", num_classes=10, input_shape=(1, 8, 8))
    load_model(model, out / MODEL)
    assert accuracy(model, data.load("digits").test) == lines[-1]["accuracy_test"]
    assert len(Timings.read(out / "timings.json").seconds_at_epoch_ends) == epochs
    assert not list(out.glob("*.tmp")) and not (out / "record.json").exists()


EPOCH = 6  # steps of an epoch of digits
RUNS_AWAY = {"lr": 1.0, "momentum": 0.0, "weight_decay": 50.0}  # times -49 at every step: to 1e10 in the first epoch


@pytest.mark.parametrize(
    ("given", "sinks", "error"),
    [(RUNS_AWAY, [], DivergedError), ({}, [Stops(EPOCH + 2)], KeyboardInterrupt)],
    ids=["diverged", "stopped by the user"],
)
def test_a_run_that_ends_early_leaves_the_model_of_its_last_good_epoch(given, sinks, error, tmp_path):
    with pytest.raises(error):
        train(small(**given), tmp_path / "run", sinks=sinks)
    assert_keeps_the_last_good_model(tmp_path / "run", 1)


def test_a_run_that_diverges_keeps_checkpoints_of_finite_parameters(tmp_path):
    with pytest.raises(DivergedError):
        train(small(**RUNS_AWAY, checkpoint_every="1step"), tmp_path / "run")
    folder, refused = newest(tmp_path / "run" / "checkpoints")
    assert not refused and all((t.abs() <= 1e12).all() for t in Checkpoint.read(folder).parts["model"].values())


class AtStep:
    """A run that has taken so many steps, as far as its directory is concerned."""

    steps_taken = 3

    def save(self, path, **parts):
        Checkpoint(parts={"model": {"weight": torch.ones(3)}}, facts={}).write(path)


def test_a_checkpoint_that_does_not_hold_is_written_anew(tmp_path):
    files = RunDirectory(tmp_path)
    for _ in range(2):
        files.checkpoint(AtStep(), {})
        (tmp_path / "checkpoints" / "step-00000003" / "state.json").write_text("{}")
    files.checkpoint(AtStep(), {})
    assert newest(tmp_path / "checkpoints") == (tmp_path / "checkpoints" / "step-00000003", {})


class SavedAtTheEndOnly(RunDirectory):
    def keep(self, model, choices, timings):
        super().keep(model, choices, timings)
        (self.path / MODEL).unlink()


class SavedUnchecked(Sink):
    def __init__(self, out):
        self._out = out

    def stepped(self, progress):
        save_model(BUILT[-1], str(self._out / MODEL))


@pytest.mark.parametrize("planted", ["at the end only", "unchecked"])
def test_a_model_that_is_not_the_last_good_one_would_be_seen(planted, tmp_path):
    out = tmp_path / "run"
    wrong = {"at the end only": {"directory": SavedAtTheEndOnly}, "unchecked": {"sinks": [SavedUnchecked(out)]}}
    with pytest.raises(DivergedError):
        train(small(**RUNS_AWAY, model="doubles:observed"), out, **wrong[planted])
    with pytest.raises((AssertionError, FileNotFoundError)):
        assert_keeps_the_last_good_model(out, 1)


def test_a_disk_that_is_full_in_mid_run_ends_it_with_one_error(tmp_path):
    full = functools.partial(Failing, fault=no_space, at=3)
    with pytest.raises(SettingError, match=r"No space left on device.*stays charged: epsilon = \d\.\d{4}\."):
        train(small(), tmp_path / "run", directory=full)
    assert charged(tmp_path / "run" / LEDGER, plan_of(small())).steps == 2 * EPOCH
    assert_keeps_the_last_good_model(tmp_path / "run", 1)


# Weights that a model uses in several places.


SHARED = {"tied": "doubles:tied", "used twice": "doubles:used_twice", "both": "doubles:shared"}


def assert_comes_back(load, name, path, trained):
    """A fresh model with the saved parameters is the one that was trained."""
    model = models.build(SHARED[name], num_classes=10, input_shape=(1, 8, 8))
    load(model, path)
    inputs, _ = data.load("digits").test.batch(torch.arange(20))
    torch.testing.assert_close(model.eval()(inputs), trained.eval()(inputs))


class Remembering(RunDirectory):
    """Keeps the model that it saved last."""

    def save(self, model, path):
        self.saved = model
        super().save(model, path)


@pytest.mark.parametrize("name", SHARED)
def test_a_model_that_shares_weights_is_saved_and_comes_back(name, tmp_path):
    files = Remembering(tmp_path / "run")
    train(small(model=SHARED[name]), tmp_path / "run", directory=lambda out: files)
    assert_comes_back(load_model, name, tmp_path / "run" / MODEL, files.saved)
    with pytest.raises(AssertionError):  # a model that nothing was loaded into would be seen
        assert_comes_back(lambda model, path: None, name, tmp_path / "run" / MODEL, files.saved)


class AsBefore(RunDirectory):
    def save(self, model, path):
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)


@pytest.mark.parametrize("name", SHARED)
def test_saving_shared_weights_the_former_way_is_refused_before_any_charge(name, tmp_path):
    words = "save and load back"
    assert_refused_before_any_charge(train, tmp_path / "run", ModelError, words, AsBefore, model=SHARED[name])


def test_parameters_that_run_away_end_the_run_with_one_error(tmp_path):
    with pytest.raises(DivergedError, match="stay finite"):
        train(small(epochs=1, lr=1e10, weight_decay=1e30), tmp_path / "run")
