# SPDX-License-Identifier: Apache-2.0
"""The settings that the scripts of benchmarks give to `dpquant train` are settings that it takes.

The scripts run for minutes to hours and are seldom run, so that settings that are refused would show late.
"""

import importlib.abc
import itertools
import sys

import pytest
from benchmarks import audit, before_after, end_to_end, kills, smoke
from experiments.runner import settings_of

from dpquant.errors import SettingError
from dpquant.runs.settings import TrainSettings, plan_of

WHOLE_RUN = "--data image-folder:GTSRB --records 39209 --model cnn --epsilon 8 --delta 1e-5"


@pytest.mark.parametrize(("epsilon", "quantized"), list(itertools.product(audit.EPSILONS, (True, False))))
def test_trainings_of_the_audit_have_a_plan(epsilon, quantized):
    chosen = audit.settings(epsilon, quantized)
    assert (chosen.policy != "none") == quantized
    assert plan_of(chosen).budget().events


def test_a_share_without_a_policy_would_be_seen():
    with pytest.raises(SettingError, match="no fraction with policy=none"):
        TrainSettings.chosen({**audit.TRAINING, "policy": "none", "fraction": 0.75})


@pytest.mark.parametrize("options", [*end_to_end.POLICIES.values(), [*kills.IMAGES, *kills.SMALL]], ids=str)
def test_runs_that_are_timed_or_killed_are_understood(options):
    assert settings_of(f"{WHOLE_RUN} {' '.join(options)}").epsilon == 8


def measured(*quotients):
    """A measurement that gives these quotients, one after the other, and the numbers of steps that were asked for."""
    left, steps = list(quotients), []

    def quotient(name, number):
        steps.append(number)
        return left.pop(0)

    return quotient, steps


def test_a_step_that_takes_longer_twice_is_a_regression():
    quotient, steps = measured(0.7, 0.75)
    (found,) = smoke.regressions(quotient, ["mlp"], 4)
    assert found == "mlp takes 1.33 times as long as before" and steps == [4, 8]


@pytest.mark.parametrize("quotients", [(0.84,), (1.3,), (0.5, 0.9)])
def test_noise_and_gains_are_none(quotients):
    quotient, steps = measured(*quotients)
    assert smoke.regressions(quotient, ["mlp"], 4) == [] and len(steps) == len(quotients)


class Finder(importlib.abc.MetaPathFinder):
    """Finds nothing."""


class EditableFinder(Finder):
    """Finds nothing, and counts as the finder of an editable installation."""


EditableFinder.__module__ = "_editable_finder"


def test_finders_that_appear_while_another_version_is_loaded_stay(monkeypatch):
    editable, added = EditableFinder(), Finder()
    monkeypatch.setattr(sys, "meta_path", [editable, *sys.meta_path])
    with before_after.without_editable_finder():
        assert editable not in sys.meta_path
        sys.meta_path.append(added)
    assert editable in sys.meta_path
    assert added in sys.meta_path
