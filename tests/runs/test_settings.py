# SPDX-License-Identifier: Apache-2.0
import dataclasses
import subprocess
import sys
import tomllib

import pytest

from dpquant.backends.registry import BACKENDS
from dpquant.errors import SettingError
from dpquant.formats import RECIPES
from dpquant.runs.defaults import BY_DATA, GENERAL, Default, defaults
from dpquant.runs.ranges import BACKENDS as SETTING_BACKENDS
from dpquant.runs.ranges import CHOICES
from dpquant.runs.settings import TrainSettings, from_toml, plan_of, policy_of
from dpquant.training.partition import PARTITIONS


def test_defaults_are_valid_for_every_data_set():
    for name in (*BY_DATA, "cifar10"):
        settings = TrainSettings.chosen({"data": name})
        assert settings.epsilon == 8.0 and settings.fraction == 0.75
        assert settings.batch_size == BY_DATA.get(name, GENERAL).get("batch_size", GENERAL["batch_size"])


def test_what_is_given_wins_over_defaults():
    settings = TrainSettings.chosen({"noise_multiplier": 1.5, "macs": 0.9, "lr": 3})
    assert (settings.epsilon, settings.fraction, settings.lr) == (None, None, 3)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"epochs": 0}, "epochs >= 1"),
        ({"lr": -1.0}, "lr > 0"),
        ({"lr": float("nan")}, "lr > 0"),
        ({"momentum": 1.0}, "momentum in"),
        ({"sample_rate": 0.0}, "sample_rate in"),
        ({"sample_rate": float("nan")}, "sample_rate in"),
        ({"sample_rate": 1.5}, "sample_rate in"),
        ({"threads": 10**11}, "threads in"),
        ({"policy": "dpquan"}, "Did you mean dpquant"),
        ({"format": "fp4"}, "format to be one of"),
        ({"fracton": 0.5}, "Did you mean fraction"),
        ({"epochs": "3"}, "epochs of type"),
        ({"fix": 1}, "fix of type"),
        ({"seed": True}, "seed of type"),
        ({"epsilon": 3.0, "noise_multiplier": 1.0}, "one of epsilon and noise_multiplier"),
        ({"fraction": 0.5, "macs": 0.5}, "one of fraction and macs"),
        ({"sample_rate": 0.1, "records": 100}, "one of sample_rate and records"),
        ({"policy": "static", "fraction": 0.5, "layers": "0"}, "one of fraction and layers"),
        ({"layers": "0"}, "policy=static with layers"),
    ],
)
def test_a_bad_setting_is_named_with_its_rule(given, words):
    with pytest.raises(SettingError, match=words):
        TrainSettings.chosen(given)


def test_settings_come_back_from_their_toml(tmp_path):
    settings = TrainSettings.chosen({"data": 'image-folder:a "b"\\c\n', "records": 7, "unsafe_metrics": True})
    (tmp_path / "config.toml").write_text(settings.to_toml())
    assert TrainSettings.chosen(from_toml(tmp_path / "config.toml")) == settings


def test_all_that_is_set_is_in_the_toml():
    settings = TrainSettings.chosen({"policy": "dpquant", "track": "mlflow"})  # with these every setting has an effect
    written = tomllib.loads(settings.to_toml())
    assert written == {name: value for name, value in dataclasses.asdict(settings).items() if value is not None}


def test_a_file_that_is_no_toml_is_one_error(tmp_path):
    (tmp_path / "bad.toml").write_text("lr = = 3")
    for path in (tmp_path / "bad.toml", tmp_path / "missing.toml"):
        with pytest.raises(SettingError, match="readable TOML"):
            from_toml(path)


def test_names_agree_with_the_library():
    assert (
        all(TrainSettings.chosen({"format": name}).format == name for name in RECIPES)
        and ("auto", *BACKENDS) == SETTING_BACKENDS
        and CHOICES["partition"] == PARTITIONS
    )


def loads(module, code):
    """Whether a fresh interpreter has loaded a module once it has run some code."""
    program = f"import sys; {code}; sys.exit({module!r} in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], stdout=subprocess.DEVNULL, check=False)
    assert result.returncode in (0, 1)
    return result.returncode == 1


@pytest.mark.parametrize("module", ["torch", "dp_accounting"])
def test_the_command_line_loads_neither_torch_nor_the_accountant(module):
    assert not loads(module, "import dpquant.app.cli")


@pytest.mark.parametrize("options", [["--data", "image-folder:x", "--records", "9000"], ["--data", "cifar10"]])
def test_planning_loads_no_torch(options):
    assert not loads("torch", f"from dpquant.app.cli import run; assert run({['plan', *options]}) == 0")


@pytest.mark.parametrize("module", ["torch", "dpquant.runs.train", "dpquant.data.dataset"])
def test_loading_torch_would_be_seen(module):
    assert loads("torch", f"import {module}")


def test_delta_is_explained_as_what_it_is():
    help = {field.name: field.metadata["help"] for field in dataclasses.fields(TrainSettings)}["delta"]
    assert "(epsilon, delta) guarantee" in help and "far below 1 / records" in help


# The policy and the plan that settings name.


def settings(**given):
    return TrainSettings.chosen({"epochs": 2, "policy": "dpquant", **given})


@pytest.mark.parametrize("name", ["format", "rest"])
def test_a_format_that_cannot_be_read_is_named(name):
    with pytest.raises(SettingError, match=rf"Expected {name} to be one of"):
        settings(**{name: "fp3"})


def test_the_size_of_a_private_folder_has_to_be_given():
    with pytest.raises(SettingError, match="records"):
        plan_of(settings(data="image-folder:photos"))
    assert plan_of(settings(data="image-folder:photos", records=20_000)).sample_rate == pytest.approx(0.0512)


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(SettingError, match="at most 1442, the records"):
        plan_of(settings(batch_size=2_000.0))


def test_an_analysis_of_gradients_is_smaller_and_clips_at_one():
    plans = {score: plan_of(settings(batch_size=80.0, analysis_score=score)).analysis for score in ("loss", "gradient")}
    assert [(p.score, p.expected_batch_size, p.max_norm) for p in plans.values()] == [
        ("loss", 40.0, 0.25),
        ("gradient", 5.0, 1.0),
    ]
    given = plan_of(settings(analysis_score="gradient", analysis_batch_size=20.0, analysis_max_norm=0.5)).analysis
    assert (given.expected_batch_size, given.max_norm) == (20.0, 0.5)
    with pytest.raises(SettingError, match="max_norm"):
        plan_of(settings(analysis_max_norm=0.0))
    with pytest.raises(SettingError, match=r"analysis_score.* loss, gradient"):
        settings(analysis_score="gradients")


def test_an_analysis_batch_larger_than_the_data_is_refused():
    with pytest.raises(SettingError, match="at most 200, the records"):
        plan_of(settings(data="image-folder:photos", sample_rate=0.5, batch_size=100.0, analysis_batch_size=201.0))


@pytest.mark.parametrize("name", ["none", "all", "static", "rotate", "prioritise", "dpquant"])
def test_every_policy_can_be_named(name):
    policy = policy_of(settings(policy=name))
    chosen = policy.choose({"a": 1.0, "b": 1.0, "c": 1.0, "d": 1.0}, None, epoch=0, key=0)
    assert len(chosen) == {"none": 0, "all": 4}.get(name, 3)


def test_a_static_policys_layers_can_be_named():
    policy = policy_of(settings(policy="static", layers="b, d"))
    assert policy.choose({"a": 1.0, "b": 1.0, "c": 1.0, "d": 1.0}, None, epoch=0, key=0) == ("b", "d")


# Defaults that depend on other settings.


@pytest.mark.parametrize(
    ("given", "format", "policy"),
    [
        ({}, "auto", "all"),
        ({"format": "auto"}, "auto", "all"),
        ({"format": "luq-fp4"}, "luq-fp4", "dpquant"),
        ({"policy": "rotate"}, "luq-fp4", "rotate"),
        ({"policy": "all"}, "luq-fp4", "all"),
        ({"macs": 0.9}, "luq-fp4", "dpquant"),
        ({"rest": "full/int8/int8"}, "luq-fp4", "dpquant"),
        ({"analysis_every": 2}, "luq-fp4", "dpquant"),
        ({"fraction": None}, "auto", "all"),
        ({"format": "int8"}, "int8", "all"),
        ({"format": "int8", "fraction": 0.5}, "int8", "dpquant"),
        ({"format": "int8", "policy": "rotate"}, "int8", "rotate"),
    ],
)
def test_who_names_nothing_of_a_policy_gets_what_the_machine_gains_by(given, format, policy):
    found = TrainSettings.chosen(given)
    assert (found.format, found.policy) == (format, policy)
    assert policy_of(found).needs_scores == (plan_of(found).analysis is not None) == (policy == "dpquant")


@pytest.mark.parametrize(
    "given",
    [
        {"format": "auto", "policy": "dpquant"},
        {"format": "auto", "fraction": 0.5},
        {"format": "auto", "rest": "full/int8/int8"},
    ],
)
def test_auto_leaves_no_choice_to_a_policy(given):
    with pytest.raises(SettingError, match=r"format=auto|policy=all"):
        TrainSettings.chosen(given)


@pytest.mark.parametrize(
    ("records", "batch", "analysis", "delta"),
    [
        (1, 1.0, 1.0, 1e-5),
        (100, 10.0, 10.0, 1e-5),
        (480, 48.0, 16.0, 1e-5),
        (9_000, 900.0, 56.25, 1e-5),
        (40_000, 1024.0, None, 1e-5),
        (100_000, 1024.0, None, 1e-6),
        (999_999, 1024.0, None, 1e-6),
        (1_000_000, 1024.0, None, 1e-7),
    ],
)
def test_batches_and_delta_follow_from_the_number_of_records(records, batch, analysis, delta, tmp_path):
    found = TrainSettings.chosen({"data": "image-folder:x", "records": records, "policy": "dpquant"})
    assert (found.batch_size, found.analysis_batch_size, found.delta) == (batch, analysis, delta)
    assert delta < 1 / records or records == 1
    (tmp_path / "config.toml").write_text(found.to_toml())
    assert TrainSettings.chosen({}, from_toml(tmp_path / "config.toml")) == found
    assert TrainSettings.chosen({"data": "image-folder:x", "records": records}).analysis_batch_size is None


def test_the_learning_rate_of_a_kind_of_data_is_for_its_own_network_and_optimizer():
    for data, lr in (("table:t.csv", 0.01), ("text:t.csv", 0.02), ("image-folder:x", 0.01), ("cifar10", 0.01)):
        assert TrainSettings.chosen({"data": data}).lr == lr
        assert TrainSettings.chosen({"data": data, "optimizer": "adam"}).lr == lr
        for given in ({"model": "my:network"}, {"model": "hf:bert"}, {"optimizer": "sgd"}):
            assert TrainSettings.chosen({"data": data, **given}).lr == GENERAL["lr"]
    assert TrainSettings.chosen({"data": "digits", "model": "mlp"}).lr == BY_DATA["digits"]["lr"]


def test_a_default_says_where_it_comes_from():
    found = defaults({"data": "image-folder:x", "records": 480})
    assert found["batch_size"] == Default(48.0, "from 480 records") and found["epochs"].origin == "general"
    assert found["model"] == Default("cnn", "from image-folder:") and found["lr"] == Default(0.01, "from image-folder:")
    assert defaults({})["lr"] == Default(0.2, "from digits")
    assert defaults({"format": "luq-fp4"})["policy"] == Default("dpquant", "general")
    assert defaults({"beta": 2.0})["format"] == Default("luq-fp4", "as beta is given")
