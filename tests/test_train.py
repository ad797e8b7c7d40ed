# SPDX-License-Identifier: Apache-2.0
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dpquant import data, models
from dpquant import train as train_module
from dpquant.errors import DataError, ModelError, SettingError
from dpquant.ledger import Ledger
from dpquant.record import RunRecord
from dpquant.settings import TrainSettings, from_toml
from dpquant.train import accuracy, charged, plan_of, policy_of, train


def settings(**given):
    return TrainSettings.chosen({"epochs": 2, **given})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One short run on digits: (its directory, its record)."""
    out = tmp_path_factory.mktemp("runs") / "run"
    seen = []
    record = train(settings(analysis_every=1), out, command="dpquant train", watch=seen.append)
    return out, record, seen


def test_a_run_directory_holds_all_that_is_promised(run):
    out, record, _ = run
    assert {p.name for p in out.iterdir()} == {
        "config.toml", "ledger.jsonl", "metrics.jsonl", "model.safetensors", "record.json"
    }  # fmt: skip
    assert RunRecord.read(out / "record.json") == record
    assert TrainSettings.chosen(from_toml(out / "config.toml")) == settings(analysis_every=1)


def test_the_ledger_and_the_record_agree_with_the_plan(run):
    out, record, _ = run
    plan = plan_of(settings(analysis_every=1))
    counts = {kind: 0 for kind in ("train", "analysis")}
    for charge in Ledger.read(out / "ledger.jsonl"):
        counts[charge.kind] += charge.count
    assert counts == {"train": plan.steps, "analysis": 2}
    assert record.epsilon == pytest.approx(plan.epsilon_spent()) and record.epsilon <= 8
    assert 0 < record.epsilon_analysis_share < 0.1


def test_the_record_counts_what_ran_quantized(run):
    _, record, _ = run
    assert record.quantized_fraction_layers == pytest.approx(0.8)  # 4 of 5
    assert sum(layer.times_quantized for layer in record.layers) == 8
    scored = [layer for layer in record.layers if layer.last_score is not None]
    assert len(scored) >= 4 and all(math.isfinite(layer.last_score) for layer in scored)
    if record.backend == "int8":
        assert all(layer.gain is not None and layer.gain > 0 for layer in record.layers)


def test_shares_of_work_count_products_and_bits(tmp_path):
    record = train(settings(epochs=1, policy="all", format="full/luq-fp4/int8", microbatch_size=32), tmp_path / "run")
    assert record.quantized_fraction_macs == pytest.approx(2 / 3)
    assert record.four_bit_fraction_macs == pytest.approx(1 / 3)
    others = train(
        settings(epochs=1, policy="none", rest="int8/luq-fp4/luq-fp4", microbatch_size=32), tmp_path / "others"
    )
    assert (others.quantized_fraction_macs, others.four_bit_fraction_macs) == pytest.approx((1.0, 2 / 3))


@pytest.mark.parametrize("name", ["format", "rest"])
def test_a_format_that_cannot_be_read_is_named(name):
    with pytest.raises(SettingError, match=rf"Expected {name} to be one of"):
        settings(**{name: "fp3"})


def test_an_average_of_the_parameters_is_tested_and_saved(tmp_path):
    """The average by hand, from what the run itself went through."""
    seen = []
    original = train_module._Tested.update

    def watched(self, model):
        original(self, model)
        seen.append({name: p.detach().clone() for name, p in model.named_parameters()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module._Tested, "update", watched)
        record = train(settings(epochs=1, policy="none", average=0.8, microbatch_size=32), tmp_path / "run")
    expected = seen[0]
    for parameters in seen[1:]:
        expected = {name: 0.8 * old + 0.2 * parameters[name] for name, old in expected.items()}
    saved = load_file(tmp_path / "run" / "model.safetensors")
    for name, parameter in expected.items():
        torch.testing.assert_close(saved[name], parameter)
    assert record.average == 0.8 and not all(torch.equal(saved[name], seen[-1][name]) for name in expected)


def test_the_saved_model_is_the_users_own_and_as_good_as_the_record_says(run):
    out, record, _ = run
    dataset = data.load("digits")
    model = models.build("cnn", num_classes=10, input_shape=dataset.input_shape)
    model.load_state_dict(load_file(out / "model.safetensors"))
    assert accuracy(model, dataset.test) == record.accuracy_test > 0.3


def test_metrics_hold_nothing_from_private_data(run):
    out, _, _ = run
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2
    for line in lines:
        assert set(line) == {"epoch", "epsilon", "accuracy_test", "layers_quantized", "seconds", "examples_per_second"}


def test_unsafe_metrics_mark_the_run(tmp_path):
    record = train(settings(epochs=1, policy="none", unsafe_metrics=True), tmp_path / "run")
    assert record.unsafe_metrics and record.statement.startswith("NOT COVERED")
    assert "nonprivate_accuracy_train" in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_progress_counts_every_step(run):
    _, record, seen = run
    assert [progress.step for progress in seen] == list(range(1, record.steps + 1))
    assert seen[0].accuracy_test is None and seen[-1].accuracy_test == record.accuracy_per_epoch[0]


def test_the_size_of_a_private_folder_has_to_be_given():
    with pytest.raises(SettingError, match="records"):
        plan_of(settings(data="image-folder:photos"))
    assert plan_of(settings(data="image-folder:photos", records=10_000)).sample_rate == pytest.approx(0.1024)


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


def test_a_run_can_measure_gradients(tmp_path):
    record = train(settings(analysis_every=1, analysis_score="gradient"), tmp_path / "run", command="dpquant train")
    scores = [layer.last_score for layer in record.layers]
    assert all(score is not None for score in scores) and len(set(scores)) == len(scores)


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


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"data": "image-folder:/nowhere", "records": 5_000}, DataError),
        ({"model": "no_such_module:build"}, ModelError),
        ({"model": "test_train:with_batch_norm"}, ModelError),
        ({"model": "test_train:with_too_few_outputs"}, ModelError),
        ({"model": "test_train:for_larger_images"}, ModelError),
    ],
)
def test_bad_input_writes_nothing(tmp_path, given, error):
    with pytest.raises(error):
        train(settings(**given), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_fix_makes_a_model_with_batch_norm_trainable(tmp_path):
    record = train(settings(epochs=1, model="test_train:with_batch_norm", fix=True), tmp_path / "run")
    assert math.isfinite(record.accuracy_test)


def test_a_directory_in_use_is_refused(run):
    out, _, _ = run
    with pytest.raises(SettingError, match="new or empty"):
        train(settings(), out)


def test_a_directory_that_cannot_be_made_is_refused_before_any_work(monkeypatch):
    monkeypatch.setattr("dpquant.data.load", lambda *a, **k: pytest.fail("data was read"))
    with pytest.raises(SettingError, match="cannot be written to"):
        train(settings(), Path(__file__) / "run")


def test_a_run_without_a_ledger_has_spent_nothing(tmp_path):
    assert charged(tmp_path / "ledger.jsonl", plan_of(settings())) == (0, 0.0)


def test_a_ledger_tells_what_its_run_has_spent(run):
    out, record, _ = run
    assert charged(out / "ledger.jsonl", plan_of(settings(analysis_every=1))) == (record.steps, record.epsilon)


def test_parameters_that_run_away_end_the_run_with_one_error(tmp_path):
    with pytest.raises(SettingError, match="stay finite"):
        train(settings(epochs=1, lr=1e10, weight_decay=1e30, policy="none"), tmp_path / "run")


def with_batch_norm(num_classes, input_shape):
    return torch.nn.Sequential(
        torch.nn.Conv2d(input_shape[0], 8, 3),
        torch.nn.BatchNorm2d(8),
        torch.nn.Flatten(),
        torch.nn.Linear(8 * 6 * 6, num_classes),
    )


def with_too_few_outputs():
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 9))


def for_larger_images():
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(1024, 10))
