# SPDX-License-Identifier: Apache-2.0
import dataclasses

import pytest

from dpquant.errors import SettingError
from dpquant.runs.settings import TrainSettings
from dpquant.runs.step_times import _DEPENDS_ON, keep, step_times
from dpquant.training.scaling import StepTimes

MEASURED = StepTimes(fixed=0.5, per_example=0.001, values=1000, source="measured here")


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("DPQUANT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def settings(**given):
    return TrainSettings.chosen(given)


def test_what_was_measured_is_found_under_its_settings_alone():
    keep(settings(), MEASURED)
    assert step_times(settings()) == MEASURED
    assert step_times(settings(epochs=3, lr=0.1, batch_size=64.0)) == MEASURED, "they change no line"
    assert step_times(settings(threads=1)) != MEASURED


def test_times_of_several_settings_are_kept_side_by_side():
    other = dataclasses.replace(MEASURED, fixed=0.25)
    keep(settings(), MEASURED)
    keep(settings(threads=1), other)
    assert (step_times(settings()), step_times(settings(threads=1))) == (MEASURED, other)


@pytest.mark.parametrize(("policy", "words"), [("none", "full precision"), ("all", "all layers quantized")])
def test_without_a_measurement_a_benchmark_is_assumed_and_says_so(policy, words):
    found = step_times(settings(model="resnet18-cifar", data="cifar10", policy=policy))
    assert found.source.startswith("assumed: ") and found.source.endswith(words)


@pytest.mark.parametrize("given", [{"model": "lenet"}, {"width": 2.0}, {"train_only": "*bias*"}])
def test_nothing_is_assumed_of_a_network_that_no_benchmark_had(given):
    with pytest.raises(SettingError, match="dpquant assess"):
        step_times(settings(**given))
    keep(settings(**given), MEASURED)
    assert step_times(settings(**given)) == MEASURED


@pytest.mark.parametrize("torn", ["{", '{"key": {"fixed": 1}}', "[]"])
def test_a_file_that_cannot_be_read_holds_no_times(own_cache, torn):
    own_cache.mkdir()
    (own_cache / "steps-1.json").write_text(torn)
    assert step_times(settings()).source.startswith("assumed")
    keep(settings(), MEASURED)
    assert step_times(settings()) == MEASURED


def test_off_keeps_nothing(monkeypatch):
    monkeypatch.setenv("DPQUANT_CACHE", "off")
    keep(settings(), MEASURED)
    assert step_times(settings()) != MEASURED


def test_what_a_step_depends_on_are_settings():
    assert set(_DEPENDS_ON) <= {field.name for field in dataclasses.fields(TrainSettings)}
