# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path

import pytest

from dpquant.app.assess import Usage, assess
from dpquant.app.cli import run
from dpquant.errors import DataError, SettingError
from dpquant.runs.settings import TrainSettings
from dpquant.runs.sources import dataset_of
from dpquant.runs.step_times import step_times
from dpquant.runs.train import train
from dpquant.training.policies import RotatePolicy
from sources import images, pretrained, regression, table, texts

SMALL = {"policy": "dpquant", "batch_size": 64.0, "backend": "simulate", "microbatch_size": 32}


def settings(**given):
    return TrainSettings.chosen({**SMALL, **given})


def test_it_predicts_and_measures_the_same_policies():
    found = assess(settings(), rounds=1)
    assert [policy.share_of_macs for policy in found.policies][::3] == [0, pytest.approx(1)]
    assert all(policy.measured is not None and policy.measured > 0 for policy in found.policies)
    assert found.policies[0].predicted == found.full_step == found.policies[0].measured
    assert len(found.layers) == len(found.policies[-1].layers) == 5 and found.impacts == {}
    assert found.analysis > 0 and json.loads(found.to_json())["model"] == "cnn"
    assert found.saved is None


def test_the_times_of_a_step_are_kept_for_plans_of_many_workers(monkeypatch, tmp_path):
    monkeypatch.setenv("DPQUANT_CACHE", str(tmp_path))
    given = settings(policy="rotate", fraction=0.6)
    assess(given, hardware="fp4", rounds=1)
    assert step_times(given).source.startswith("assumed"), "times of imagined hardware are no measurement"
    found, times = assess(given, rounds=1), step_times(given)
    assert times.source.startswith("measured on this machine") and times.values == 30_794
    assert found.full_step / (times.fixed + 64 * times.per_example) == pytest.approx(found.speedup)


def test_the_prediction_is_made_of_what_was_measured():
    found = assess(settings(policy="all"), rounds=1, usage=Usage(runs_per_month=30, cost_per_hour=2))
    saved = found.batch_size * sum(layer.full - layer.quantized for layer in found.layers.values())
    assert found.policies[-1].predicted == pytest.approx(found.full_step - saved)
    assert found.speedup == pytest.approx(found.full_step / found.policies[-1].predicted)
    steps = 40 * round(1442 / 64)
    assert found.saved is not None and found.saved.hours == pytest.approx(steps * saved / 3600 * 30)
    assert found.saved.money == pytest.approx(2 * found.saved.hours)


def test_a_share_of_layers_is_not_a_share_of_work():
    """Three of five layers, other ones in every epoch: the run takes the mean of what each epoch's layers take."""
    given = settings(policy="rotate", fraction=0.6, epochs=4)
    found = assess(given, rounds=1)
    macs = {name: layer.macs for name, layer in found.layers.items()}
    epochs = [RotatePolicy(fraction=0.6).choose(macs, None, epoch=epoch, key=0) for epoch in range(4)]
    assert {len(names) for names in epochs} == {3}
    saved = [sum(found.layers[name].full - found.layers[name].quantized for name in names) for names in epochs]
    step = found.full_step - found.batch_size * sum(saved) / 4
    assert found.speedup == pytest.approx(found.full_step / step)


def test_imagined_hardware_is_predicted_and_not_measured():
    found = assess(settings(policy="all"), hardware="fp4", rounds=1)
    assert all(layer.gain == pytest.approx(4) for layer in found.layers.values())
    assert all(policy.measured is None for policy in found.policies)
    assert found.paper[2.21] == pytest.approx(0.189, abs=1e-3)


def test_impacts_come_from_a_run(tmp_path):
    train(settings(epochs=1), tmp_path / "run")
    found = assess(settings(), run=tmp_path / "run", rounds=1)
    assert found.impacts.keys() == found.layers.keys()


KINDS = {"images": images, "a table": table, "regression": regression, "texts": texts, "pretrained": pretrained}


def closed(settings):
    """Take all records away, and leave what is public: folders of classes, spec, tokenizer and network."""
    kind, _, place = str(settings["data"]).partition(":")
    if kind == "image-folder":
        for path in Path(place).rglob("*.png"):
            path.write_bytes(b"no image")
    else:
        Path(place).unlink()


@pytest.mark.parametrize("kind", KINDS)
def test_no_record_is_read(kind, tmp_path):
    given = KINDS[kind](tmp_path)
    closed(given)
    found = assess(TrainSettings.chosen({**given, "batch_size": 4.0}), rounds=1)
    assert found.full_step > 0 and found.layers


@pytest.mark.parametrize("kind", KINDS)
def test_that_a_record_is_read_would_be_seen(kind, tmp_path):
    """The planted bug: the data are loaded, of which only the form is used."""
    given = KINDS[kind](tmp_path)
    closed(given)
    with pytest.raises(DataError):
        dataset_of(TrainSettings.chosen(given))


def test_a_rest_that_it_does_not_time_is_refused():
    with pytest.raises(SettingError, match="rest=full"):
        assess(settings(rest="int8"))


@pytest.mark.parametrize("change", [{"hardware": "tpu"}, {"rounds": 0}])
def test_bad_arguments_are_refused(change):
    with pytest.raises(SettingError, match=next(iter(change))):
        assess(settings(), **change)


@pytest.mark.parametrize("change", [{"runs_per_month": -1.0}, {"cost_per_hour": float("inf")}])
def test_bad_usage_is_refused(change):
    with pytest.raises(SettingError, match=next(iter(change))):
        Usage(**change)
    options = [f"--{name.replace('_', '-')}={value}" for name, value in change.items()]
    assert run(["assess", *options]) == 2


def test_the_verb_prints_layers_steps_and_the_papers_model(capsys):
    options = ["--batch-size", "64", "--backend", "simulate", "--microbatch-size", "32", "--rounds", "1"]
    options += ["--format", "luq-fp4"]
    assert run(["assess", "lenet", *options, "--runs-per-month", "9", "--cost-per-hour", "1"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for words in ("lenet, luq-fp4, batch 64", "share of time", "predicted s", "1.75 times if 37%", "In a month"):
        assert words in printed
    assert run(["assess", "--json", *options]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == "cnn"
    assert run(["assess", "unknown"]) == 2
