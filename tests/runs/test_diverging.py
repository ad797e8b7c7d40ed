# SPDX-License-Identifier: Apache-2.0
"""A run that diverges keeps what was good, says why it ends, and is not continued; one that is useless says so."""

import pytest
import torch
from safetensors.torch import load_file

from doubles import BUILT
from dpquant.data.split import Split
from dpquant.errors import DivergedError, SettingError
from dpquant.privacy.ledger import Ledger
from dpquant.runs.directory import RunDirectory
from dpquant.runs.evaluation import warn_of_guessing
from dpquant.runs.settings import TrainSettings
from dpquant.runs.sinks import Sink
from dpquant.runs.train import train

SETTINGS = TrainSettings.chosen(
    {
        "epochs": 3,
        "policy": "none",
        "model": "doubles:observed",
        "microbatch_size": 64,
        "backend": "simulate",
        "checkpoint_every": "3steps",
    }
)


class Ruins(Sink):
    """Gives one parameter a value after so many steps: six are an epoch."""

    def __init__(self, steps, value):
        self._steps, self._value = steps, value

    def stepped(self, progress):
        if progress.step == self._steps:
            with torch.no_grad():
                next(BUILT[-1].parameters()).view(-1)[0] = self._value


def diverged(out, steps=10, value=float("nan"), **options):
    """The message of a run that is ruined after so many steps."""
    with pytest.raises(DivergedError) as caught:
        train(SETTINGS, out, sinks=[Ruins(steps, value)], **options)
    return str(caught.value)


@pytest.fixture(scope="module")
def ruined(tmp_path_factory):
    """A run that diverged in its second epoch: its directory, and what it said."""
    out = tmp_path_factory.mktemp("runs") / "run"
    return out, diverged(out)


def is_finite(file):
    return all(bool(tensor.isfinite().all()) for tensor in load_file(file).values())


def test_the_model_of_the_last_finite_epoch_and_the_checkpoints_are_kept(ruined):
    out, _ = ruined
    checkpoints = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert checkpoints == ["step-00000006", "step-00000009"]
    assert all(is_finite(out / "checkpoints" / name / "model.safetensors") for name in checkpoints)
    assert is_finite(out / "model.safetensors") and not (out / "record.json").exists()


def test_the_message_says_when_what_was_spent_what_is_kept_and_what_to_do(ruined):
    out, said = ruined
    assert all(
        words in said
        for words in (
            "stay finite",
            "after 12 steps",
            "epsilon = ",
            "model.safetensors is the model of epoch 1",
            "lower lr",
        )
    )
    assert (out / "diverged.txt").read_text().strip() == said
    assert Ledger.verify(out / "ledger.jsonl").charged("train") == 12


def test_it_is_not_continued_and_nothing_is_charged(ruined):
    out, said = ruined
    before = (out / "ledger.jsonl").read_bytes()
    with pytest.raises(SettingError, match="Expected a run that has not diverged") as refused:
        train(SETTINGS, out, resume=True)
    assert said in str(refused.value) and (out / "ledger.jsonl").read_bytes() == before


def test_a_run_that_diverges_at_once_has_no_model(tmp_path):
    assert "No epoch had ended" in diverged(tmp_path / "run", steps=1)
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_parameters_that_are_too_large_for_any_output_have_diverged(tmp_path):
    assert "at most 1e+12" in diverged(tmp_path / "run", steps=1, value=1e13)


def test_keeping_a_ruined_checkpoint_would_be_seen(tmp_path):
    class Keeps(RunDirectory):
        def note_divergence(self, reason):
            super().note_divergence(reason)
            torch.save({}, self.path / "checkpoints" / "step-00000012")

    out = tmp_path / "run"
    diverged(out, directory=Keeps)
    with pytest.raises(AssertionError):
        test_the_model_of_the_last_finite_epoch_and_the_checkpoints_are_kept((out, ""))


def labelled(*classes):
    return Split(torch.zeros(len(classes), 1, 2, 2, dtype=torch.uint8), torch.tensor(classes))


@pytest.mark.parametrize("accuracy", [0.0, 0.5])
def test_a_model_that_is_no_better_than_guessing_is_warned_of(accuracy):
    with pytest.warns(UserWarning, match=r"no better than guessing: .* 50\.0%"):
        warn_of_guessing(accuracy, labelled(0, 1, 1, 2))


def test_a_model_that_is_better_is_not(recwarn):
    warn_of_guessing(0.51, labelled(0, 1, 1, 2))
    assert not recwarn.list
