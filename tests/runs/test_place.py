# SPDX-License-Identifier: Apache-2.0
"""A run's directory is taken with its settings in it, and given back if the run is refused before its first charge."""

import contextlib
import shutil

import pytest

from dpquant.errors import SettingError
from dpquant.privacy.ledger import Ledger
from dpquant.runs.names import CHECKPOINTS, CHOICES, CONFIG, LEDGER, METRICS, PROGRESS, RECORDS
from dpquant.runs.place import Place
from dpquant.runs.settings import TrainSettings

SETTINGS = TrainSettings.chosen({"epochs": 2})


def refused(place, work, *, resume=False):
    """Take a place, let a run put its files there, and refuse it."""
    with contextlib.suppress(ZeroDivisionError), place.taken(SETTINGS, resume=resume):
        work(place.path)
        raise ZeroDivisionError


def begins(path):
    """All that a run writes before its first charge."""
    Ledger(path / LEDGER).close()
    (path / CHECKPOINTS / "step-00000000").mkdir(parents=True)
    for name in (CHOICES, METRICS, PROGRESS, RECORDS):
        (path / name).write_text("{}")


def charges(path):
    begins(path)
    (path / LEDGER).unlink()
    with contextlib.closing(Ledger(path / LEDGER)) as ledger:
        ledger.charge(kind="train", sample_rate=0.3, noise_multiplier=1.7)


def is_damaged(path):
    begins(path)
    (path / LEDGER).write_text("no ledger\n")


def finds_a_file_of_others(path):
    begins(path)
    (path.parent / "theirs").write_text("")


def assert_gives_back_what_is_its_own(kind, home) -> None:
    refused(kind(home / "new" / "run"), begins)
    assert list(home.iterdir()) == []
    refused(kind(home / "new" / "run"), finds_a_file_of_others)
    assert [path.name for path in (home / "new").iterdir()] == ["theirs"]
    (home / "empty").mkdir()
    refused(kind(home / "empty"), begins)
    assert list((home / "empty").iterdir()) == []
    for work in (charges, is_damaged):
        refused(kind(home / work.__name__), work)
        assert {CONFIG, LEDGER, RECORDS, CHECKPOINTS} <= {path.name for path in (home / work.__name__).iterdir()}
    kind(home / "stopped").make(SETTINGS)
    refused(kind(home / "stopped"), begins, resume=True)
    assert (home / "stopped" / CONFIG).exists() and (home / "stopped" / RECORDS).exists()


def test_a_place_gives_back_what_is_its_own_and_nothing_that_is_charged(tmp_path):
    assert_gives_back_what_is_its_own(Place, tmp_path)


class Keeps(Place):
    def give_back(self):
        pass


class TakesAll(Place):
    def give_back(self):
        shutil.rmtree(self.path)


class TakesWhatIsCharged(Place):
    def _is_charged(self):
        return False


class TakesWhatContinues(Place):
    def _held(self, *, continues):
        return super()._held(continues=False)


@pytest.mark.parametrize("kind", [Keeps, TakesAll, TakesWhatIsCharged, TakesWhatContinues])
def test_a_place_that_keeps_or_takes_too_much_would_be_seen(kind, tmp_path):
    with pytest.raises((AssertionError, FileNotFoundError)):
        assert_gives_back_what_is_its_own(kind, tmp_path)


class FullDisk:
    """Settings for which there is no room."""

    def to_toml(self):
        raise OSError(28, "No space left on device")


def test_a_directory_is_never_there_without_its_settings(tmp_path):
    with pytest.raises(SettingError, match="No space left"):
        Place(tmp_path / "run").make(FullDisk())
    assert list(tmp_path.iterdir()) == []
