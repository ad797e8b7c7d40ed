# SPDX-License-Identifier: Apache-2.0
"""Settings without effect: refused where they were given, and neither written nor refused where they are defaults."""

import dataclasses

import pytest

from dpquant.errors import SettingError
from dpquant.runs.effects import _RULES
from dpquant.runs.ranges import POLICIES
from dpquant.runs.settings import TrainSettings, from_toml


@pytest.mark.parametrize(
    "given",
    [
        {"optimizer": "adam", "momentum": 0.5},
        {"policy": "none", "fraction": 0.75},
        {"policy": "none", "format": "luq-fp4"},
        {"policy": "rotate", "beta": 3.0},
        {"policy": "static", "ema": 0.5},
        {"policy": "all", "analysis_repeats": 1},
        {"records": 1442},
        {"data_dir": "."},
    ],
)
def test_what_was_given_without_effect_is_refused_even_if_it_is_the_default(given):
    name = list(given)[-1]
    with pytest.raises(SettingError, match=rf"Expected no {name} with .*Leave it out\."):
        TrainSettings.chosen(given)


@pytest.mark.parametrize(
    "given",
    [
        {"optimizer": "adam", "momentum": 0.0},  # none, whatever the optimizer
        {"policy": "prioritise", "ema": 0.3, "analysis_every": 2, "fraction": 0.5},
        {"policy": "rotate", "macs": 0.5},
        {"policy": "all", "format": "int8"},
        {"policy": "none", "rest": "full/int8/int8"},
        {"data": "image-folder:x", "records": 9000},
        {"data": "mnist", "data_dir": "."},
    ],
)
def test_what_has_an_effect_is_accepted(given):
    settings = TrainSettings.chosen(given)
    assert all(getattr(settings, name) == value for name, value in given.items())


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_the_settings_of_every_run_can_be_given_again_from_its_file(policy, optimizer, tmp_path):
    settings = TrainSettings.chosen({"policy": policy, "optimizer": optimizer})
    (tmp_path / "config.toml").write_text(settings.to_toml())
    found = from_toml(tmp_path / "config.toml")
    assert TrainSettings.chosen({}, found) == TrainSettings.chosen(found) == settings
    assert ("momentum" in found) == (optimizer == "sgd") and ("beta" in found) == (policy == "dpquant")


def test_a_file_from_before_may_name_defaults_that_have_no_effect():
    written = dataclasses.asdict(TrainSettings.chosen({"policy": "none", "optimizer": "adam"}))
    known = {name: value for name, value in written.items() if value is not None}
    assert TrainSettings.chosen({}, known).policy == "none"
    with pytest.raises(SettingError, match="Expected no momentum"):
        TrainSettings.chosen({}, {**known, "momentum": 0.3})


def test_an_option_may_take_the_effect_of_what_a_file_says():
    file = {"fraction": 0.5, "analysis_every": 2}
    assert TrainSettings.chosen({"policy": "none"}, file).fraction == 0.5
    with pytest.raises(SettingError, match="Expected no fraction"):
        TrainSettings.chosen({}, {**file, "policy": "none"})


@pytest.mark.parametrize(("batch", "largest"), [(256.0, 384), (8.0, 64), (0.5, 64)])
def test_a_microbatch_may_be_as_large_as_any_batch(batch, largest):
    assert TrainSettings.chosen({"batch_size": batch, "microbatch_size": largest}).microbatch_size == largest
    with pytest.raises(
        SettingError, match=f"Expected microbatch_size <= {largest}, .*got microbatch_size={largest + 1}"
    ):
        TrainSettings.chosen({"batch_size": batch, "microbatch_size": largest + 1})


def test_every_rule_is_of_a_setting_that_exists():
    names = {field.name for field in dataclasses.fields(TrainSettings)}
    assert names >= _RULES.keys() | {decider for decider, *_ in _RULES.values()}
