# SPDX-License-Identifier: Apache-2.0
"""One of several processes takes and writes the run directory, and all fail where it does. They are threads here."""

import json
import platform

import pytest
import torch
from torch import nn

from dpquant.backends.choose import Choices
from dpquant.errors import DPQuantError, LedgerError, ModelError, SettingError
from dpquant.runs.directory import RunDirectory
from dpquant.runs.place import Place
from dpquant.runs.settings import TrainSettings
from dpquant.runs.shared import SharedDirectory, SharedPlace, group_record, shared
from dpquant.training.distributed import Alone
from groups import each

SETTINGS = TrainSettings.chosen({})


def taken(out, resume=False, settings=SETTINGS):
    """What two processes come to that take a place, each with what it has found there."""

    def take(group):
        place = SharedPlace(out, group)
        try:
            with place.taken(settings, resume=resume) as continues, place.taken(settings) as again:
                assert again == continues
                return continues, sorted(path.name for path in out.iterdir())
        except DPQuantError as error:
            return error

    results, made = each(2, take)
    assert made[0] == made[1], "a process would wait for an exchange to which the other never comes"
    return results


def test_both_get_the_place_that_the_first_has_taken(tmp_path):
    assert taken(tmp_path / "run") == [(False, ["config.toml"])] * 2
    assert taken(tmp_path / "run", resume=True) == [(True, ["config.toml"])] * 2


def test_a_refusal_is_the_same_on_both(tmp_path):
    (tmp_path / "other").write_text("")
    first, second = taken(tmp_path)
    assert isinstance(first, SettingError) and type(second) is type(first) and str(second) == str(first)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_other_settings_and_a_touched_ledger_are_refused_on_both(tmp_path):
    Place(tmp_path / "run").make(SETTINGS)
    other = taken(tmp_path / "run", resume=True, settings=TrainSettings.chosen({"lr": 3.0}))
    assert all(isinstance(one, SettingError) and "lr=0.2" in str(one) for one in other)
    (tmp_path / "run" / "ledger.jsonl").write_text('{"seq": 0}\n')
    assert all(isinstance(one, LedgerError) for one in taken(tmp_path / "run", resume=True))


def test_a_place_that_was_taken_twice_would_be_seen(tmp_path):
    """The control: without the shared place, the second process finds the files of the first."""

    def take(group):
        group.from_first(b"") if group.rank else None
        with Place(tmp_path / "run").taken(SETTINGS):
            group.from_first(b"") if not group.rank else None
            return group.rank

    results, _ = each(2, take)
    assert any(isinstance(one, SettingError) for one in results)


def test_settings_and_end_of_a_run_are_those_that_the_first_finds(tmp_path):
    Place(tmp_path / "run").make(SETTINGS)

    def ask(group):
        place = SharedPlace(tmp_path / "run" if group.rank == 0 else tmp_path / "not there", group)
        return place.settings() == SETTINGS, place.has_ended(SETTINGS)

    assert each(2, ask)[0] == [(True, False)] * 2


class Counting(RunDirectory):
    """Writes down who writes, and fails at `begin` if it is full."""

    def __init__(self, path, rank, writers, full=False):
        super().__init__(path)
        self.rank, self.writers, self.full = rank, writers, full

    def begin(self, model, choices, epochs):
        self.writers.append(self.rank)
        if self.full:
            raise OSError(28, "No space left on device")

    def choices(self):
        self.writers.append(self.rank)
        return Choices()


@pytest.mark.parametrize("full", [False, True])
def test_the_first_writes_and_both_fail_where_it_does(tmp_path, full):
    writers = []

    def write(group):
        files = SharedDirectory(tmp_path, Counting(tmp_path, group.rank, writers, full), group)
        found = files.choices(), files.newest_checkpoint(), files.past_timings(0)
        try:
            files.begin(nn.Linear(1, 1), Choices(), [])
        except Exception as error:
            return error
        return found[0] is not None, *found[1:]

    results, made = each(2, write)
    assert writers == [0, 0] and made[0] == made[1]
    if full:
        assert isinstance(results[0], OSError) and isinstance(results[1], ModelError)
        assert "OSError on process 0" in str(results[1]) and "device" not in str(results[1])
    else:
        assert results == [(True, None, None), (False, None, None)]


def test_one_process_has_its_own_place_and_directory(tmp_path):
    place, files = shared(tmp_path, RunDirectory, Alone())
    assert type(place) is Place and type(files) is RunDirectory


def test_the_record_of_a_group_has_every_process_and_names_no_host():
    found = group_record(Alone(), torch.device("cpu"))
    assert (found.world_size, found.backend, len(found.processes)) == (1, "", 1)
    assert found.processes[0].threads == torch.get_num_threads() and found.processes[0].device == "cpu"
    assert platform.node() not in json.dumps(found.processes[0].__dict__)
