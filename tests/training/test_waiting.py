# SPDX-License-Identifier: Apache-2.0
"""How long exchanges wait; `tests/distributed` lets a real process hang."""

import datetime

import pytest

from dpquant.training import waiting
from dpquant.training.waiting import TIMEOUT, in_time, of_step


@pytest.mark.parametrize(("step", "seconds"), [(0.001, 60), (3, 60), (3.1, 62), (90, 1800)])
def test_within_a_step_it_is_twenty_of_them_and_a_minute_at_least(step, seconds):
    assert of_step(step) == datetime.timedelta(seconds=seconds)


class Run:
    step_seconds = 5.0

    def __init__(self, fails=False):
        self.fails = fails

    @in_time
    def step(self, batch):
        if self.fails:
            raise ValueError(batch)
        return batch


@pytest.fixture
def told(monkeypatch):
    """The timeouts that the default group is given; it has been initialised by dpquant."""
    found = []
    monkeypatch.setattr(waiting, "_set", found.append)
    monkeypatch.setattr(waiting, "_own", TIMEOUT)
    return found


@pytest.mark.parametrize("fails", [False, True])
def test_after_a_step_exchanges_wait_as_before(fails, told):
    """Process 0 tests and writes a model for longer than steps take; else it would count as lost."""
    if fails:
        with pytest.raises(ValueError):
            Run(fails=True).step("batch")
    else:
        assert Run().step("batch") == "batch"
    assert told == [datetime.timedelta(seconds=100), TIMEOUT]


def test_a_group_of_the_users_own_and_steps_that_were_not_measured_are_left_alone(told, monkeypatch):
    unmeasured = Run()
    unmeasured.step_seconds = 0.0
    unmeasured.step("batch")
    monkeypatch.setattr(waiting, "_own", None)
    Run().step("batch")
    assert told == []
