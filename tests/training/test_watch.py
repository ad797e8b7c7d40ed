# SPDX-License-Identifier: Apache-2.0
"""What leaves a step that reads private records, beside its result: no text of an exception, no shape, no warning."""

import traceback
import warnings

import pytest
import torch

from dpquant.backends.choose import Choices
from dpquant.data import dataset as data
from dpquant.engine.passes import Objective
from dpquant.errors import DataError, ModelError, SettingError
from dpquant.runs.evaluation import accuracy
from dpquant.training.start import _first_records
from dpquant.training.watch import Watch, without_details
from networks import loss

SECRET = "diagnosis: none"


def quotes():
    raise ValueError(SECRET)


def is_caused():
    try:
        quotes()
    except ValueError as error:
        raise ModelError("Expected a module that can be evaluated; got one that cannot.") from error


def happens_while_handling():
    try:
        quotes()
    except ValueError:
        raise DataError("Expected a sound batch; got another.")  # noqa: B904


def names_a_length():
    raise SettingError(f"Expected one loss per example; got shape {(37,)} or {(64, 37, 5)}, at most 8.")


def warns():
    warnings.warn(SECRET, stacklevel=1)


def carefully(work):
    without_details(work, Choices(), torch.device("cpu"))


def carelessly(work):
    work()


def assert_nothing_is_told(work, within):
    """Not by a traceback as Python prints it, and not by a warning."""
    told = ""
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        try:
            within(work)
        except Exception as error:
            told = "".join(traceback.format_exception(error))
            assert isinstance(error, ModelError | DataError | SettingError)
    assert not shown and SECRET not in told and "37" not in told


WORKS = [quotes, is_caused, happens_while_handling, names_a_length, warns]


@pytest.mark.parametrize("work", WORKS)
def test_a_step_tells_nothing_of_records(work):
    assert_nothing_is_told(work, carefully)


@pytest.mark.parametrize("work", WORKS)
def test_what_a_step_would_tell_is_seen(work):
    with pytest.raises(AssertionError):
        assert_nothing_is_told(work, carelessly)


def test_an_error_of_ours_keeps_what_is_public():
    with pytest.raises(SettingError, match=r"one loss per example; got shape \(withheld\) or \(withheld\), at most 8"):
        carefully(names_a_length)


class Asked:
    """Records that keep the keys by which some are asked for, and on which no model runs."""

    def __init__(self):
        self.keys = []

    def batchmates(self, record_ids, count, key):
        self.keys.append(key)
        return None, None


class Once(Watch):
    def begin_epoch(self):
        """What is forgotten: another record is compared."""


def assert_compares_once_an_epoch(kind) -> None:
    records = Asked()
    watch = kind(Objective(torch.nn.Linear(1, 1), loss), records)
    for key in range(6):
        if key % 2 == 0:
            watch.begin_epoch()
        assert watch.coupling(torch.arange(3 * (key > 1)), key) == ""  # the first two batches are empty
    assert records.keys == [2, 4]


def test_a_record_is_compared_in_every_epoch_and_one_on_which_the_model_raises_says_nothing():
    assert_compares_once_an_epoch(Watch)


def test_comparing_one_record_in_all_would_be_seen():
    with pytest.raises(AssertionError):
        assert_compares_once_an_epoch(Once)


class Unreadable:
    """A data set whose first record cannot be read, and says why."""

    def __len__(self):
        return 5

    def __getitem__(self, index):
        quotes()


def test_a_first_record_that_cannot_be_read_is_not_quoted():
    assert_nothing_is_told(lambda: _first_records(Unreadable()), carelessly)


class QuotesALateRecord(torch.nn.Linear):
    """Fails on a record that the trial before the run does not reach."""

    def __init__(self):
        super().__init__(64, 10)
        self.calls = 0

    def forward(self, input):
        self.calls += 1
        if self.calls > 1:
            quotes()
        return super().forward(input.flatten(1))


def test_an_evaluation_that_fails_late_quotes_no_record():
    test = data.load("digits").test
    assert_nothing_is_told(lambda: accuracy(QuotesALateRecord(), test, batch_size=8, records=16), carelessly)
