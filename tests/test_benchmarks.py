# SPDX-License-Identifier: Apache-2.0
"""The settings that the scripts of benchmarks give to `dpquant train` are settings that it takes.

The scripts run for minutes to hours and are seldom run, so that settings that are refused would show late.
"""

import itertools

import pytest
from benchmarks import audit, end_to_end, kills
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
