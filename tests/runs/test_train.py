# SPDX-License-Identifier: Apache-2.0
import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from doubles import BUILT, Told
from dpquant.data import dataset as data
from dpquant.data import models
from dpquant.errors import DataError, ModelError, SettingError
from dpquant.privacy.ledger import Ledger
from dpquant.runs import objects
from dpquant.runs.directory import charged
from dpquant.runs.evaluation import accuracy
from dpquant.runs.record import RunRecord
from dpquant.runs.settings import TrainSettings, from_toml, plan_of
from dpquant.runs.sinks import Sink
from dpquant.runs.timings import Timings
from dpquant.runs.train import train


def settings(**given):
    return TrainSettings.chosen({"epochs": 2, **given})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One short run on digits: (its directory, its record, what sinks are told)."""
    out, told = tmp_path_factory.mktemp("runs") / "run", Told()
    record = train(settings(analysis_every=1), out, command="dpquant train", sinks=[told])
    return out, record, told


def test_a_run_directory_holds_all_that_is_promised(run):
    out, record, _ = run
    assert {p.name for p in out.iterdir()} == {
        *("config.toml", "ledger.jsonl", "metrics.jsonl", "model.safetensors"),
        *("record.json", "model.json", "choices.json", "timings.json", "records.json", "checkpoints"),
    }
    assert RunRecord.read(out / "record.json") == record
    assert TrainSettings.chosen(from_toml(out / "config.toml")) == settings(analysis_every=1)


def otherwise(choices):
    """The same questions, each with another answer, if it names one; backward passes half as large."""
    answers = {}
    for question, answer in choices.items():
        ways = set(re.findall(r"'([\w ]+)'", question.partition(", ")[2])) - {answer}
        answers[question] = answer // 2 if isinstance(answer, int) else min(ways, default=answer)
    return answers


def assert_decides_alike(given, made):
    """What another run had been asked is answered as it was there."""
    assert len(made.keys() & given.keys()) > 1
    assert not [question for question in made.keys() & given.keys() if made[question] != given[question]]


@pytest.fixture(scope="module")
def decided(tmp_path_factory):
    """What a run has decided, turned round. All its layers are quantized, so that another one asks the same."""
    out = tmp_path_factory.mktemp("runs") / "first"
    train(settings(policy="all", epochs=1, backend="simulate"), out)
    written = json.loads((out / "choices.json").read_text())
    return {**written, "choices": otherwise(written["choices"])}


@pytest.mark.parametrize("given", [True, False], ids=["given", "not given"])
def test_a_run_that_is_given_choices_decides_by_them_and_only_then(given, decided, tmp_path):
    (tmp_path / "other.json").write_text(json.dumps(decided))
    choices = {"choices": str(tmp_path / "other.json")} if given else {}
    train(settings(policy="all", epochs=1, backend="simulate", **choices), tmp_path / "again")
    made = json.loads((tmp_path / "again" / "choices.json").read_text())["choices"]
    if given:
        assert_decides_alike(decided["choices"], made)
    else:
        with pytest.raises(AssertionError):
            assert_decides_alike(decided["choices"], made)


def test_choices_that_cannot_be_read_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(DataError, match="choices"):
        train(settings(choices=str(tmp_path / "none.json")), tmp_path / "run")
    assert not list(tmp_path.iterdir())


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


def assert_keeps_every_epoch(record, out):
    """Layers, epsilon and scores of each, as the file of metrics, the ledger and the layers' own counts have them."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    plan, (first, second) = plan_of(settings()), record.per_epoch
    assert [epoch.index for epoch in record.per_epoch] == [line["epoch"] for line in lines] == [0, 1]
    assert [epoch.layers_quantized for epoch in record.per_epoch] == [line["layers_quantized"] for line in lines]
    for layer in record.layers:
        assert layer.times_quantized == sum(layer.name in epoch.layers_quantized for epoch in record.per_epoch)
    half = plan.epsilon_spent(steps=plan.epoch_steps, analyses=1)
    assert [epoch.epsilon for epoch in record.per_epoch] == pytest.approx([half, record.epsilon])
    assert first.scores.keys() == second.scores.keys() == {layer.name for layer in record.layers}
    assert second.scores == {layer.name: layer.last_score for layer in record.layers} != first.scores
    assert record.accuracy_per_epoch[-1] == record.accuracy_test


def test_a_record_keeps_every_epoch(run):
    out, record, _ = run
    assert_keeps_every_epoch(record, out)


def in_the_first_epoch(record, **changes):
    first, second = record.per_epoch
    return dataclasses.replace(record, per_epoch=[dataclasses.replace(first, **changes), second])


PLANTED = {
    "the last scores in every epoch": lambda record: in_the_first_epoch(record, scores=record.per_epoch[1].scores),
    "the last epsilon in every epoch": lambda record: in_the_first_epoch(record, epsilon=record.epsilon),
    "one epoch's layers in another": lambda record: in_the_first_epoch(record, layers_quantized=["0"]),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_an_epoch_that_is_not_kept_as_it_was_would_be_seen(planted, run):
    out, record, _ = run
    with pytest.raises(AssertionError):
        assert_keeps_every_epoch(PLANTED[planted](record), out)


def test_an_epoch_without_an_analysis_has_no_scores(tmp_path):
    given = {"backend": "simulate", "microbatch_size": 64}
    record = train(settings(analysis_every=2, **given), tmp_path / "run")
    assert [epoch.scores is None for epoch in record.per_epoch] == [False, True]
    record = train(settings(policy="rotate", epochs=1, **given), tmp_path / "rotated")
    assert record.per_epoch[0].scores is None


def test_shares_of_work_count_products_and_bits(tmp_path):
    given = {"epochs": 1, "backend": "simulate", "microbatch_size": 32}
    record = train(settings(**given, policy="all", format="full/luq-fp4/int8"), tmp_path / "run")
    assert record.quantized_fraction_macs == pytest.approx(2 / 3)
    assert record.four_bit_fraction_macs == pytest.approx(1 / 3)
    others = train(settings(**given, policy="none", rest="int8/luq-fp4/luq-fp4"), tmp_path / "others")
    assert (others.quantized_fraction_macs, others.four_bit_fraction_macs) == pytest.approx((1.0, 2 / 3))


def test_a_run_in_blocks_is_analysed_and_recorded(tmp_path):
    given = {"epochs": 1, "analysis_every": 1, "fraction": 0.5, "microbatch_size": 64, "format": "mxfp4"}
    record = train(settings(**given), tmp_path / "run")
    assert RunRecord.read(tmp_path / "run" / "record.json") == record
    assert (record.format, record.backend) == ("mxfp4", "simulate") and "scales per block" in record.execution
    assert all(epoch.scores and epoch.layers_quantized for epoch in record.per_epoch)
    assert record.four_bit_fraction_macs == pytest.approx(record.quantized_fraction_macs * 2 / 3)


class Watches(Sink):
    """Copies the parameters of a `doubles:observed` model after every step."""

    def __init__(self):
        self.seen = []

    def stepped(self, progress):
        self.seen.append({name: p.detach().clone() for name, p in BUILT[-1].named_parameters()})


def test_an_average_of_the_parameters_is_tested_and_saved(tmp_path):
    """The average by hand, from what the run itself went through."""
    watch = Watches()
    given = {"epochs": 1, "policy": "none", "average": 0.8, "microbatch_size": 32, "model": "doubles:observed"}
    record = train(settings(**given), tmp_path / "run", sinks=[watch])
    expected = watch.seen[0]
    for parameters in watch.seen[1:]:
        expected = {name: 0.8 * old + 0.2 * parameters[name] for name, old in expected.items()}
    saved = load_file(tmp_path / "run" / "model.safetensors")
    for name, parameter in expected.items():
        torch.testing.assert_close(saved[name], parameter)
    assert record.average == 0.8 and not all(torch.equal(saved[name], watch.seen[-1][name]) for name in expected)


def test_the_saved_model_is_the_users_own_and_as_good_as_the_record_says(run):
    out, record, _ = run
    dataset = data.load("digits")
    model = models.build("cnn", num_classes=10, input_shape=dataset.input_shape)
    model.load_state_dict(load_file(out / "model.safetensors"))
    assert accuracy(model, dataset.test) == record.accuracy_test > 0.3


def test_times_are_kept_apart_for_the_operator(run):
    out, record, _ = run
    timings = Timings.read(out / "timings.json")
    assert 0 < timings.seconds_train + timings.seconds_analysis < timings.seconds_total
    assert len(timings.seconds_at_epoch_ends) == record.epochs and timings.examples_per_second > 0
    assert timings.seconds_at_epoch_ends == sorted(timings.seconds_at_epoch_ends)


def test_unsafe_metrics_mark_the_run(tmp_path):
    record = train(settings(epochs=1, policy="none", unsafe_metrics=True), tmp_path / "run")
    assert record.unsafe_metrics and record.statement.startswith("NOT COVERED")
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert 0 < line["nonprivate_accuracy_train"] == record.per_epoch[0].nonprivate_accuracy_train


def test_a_run_can_measure_gradients(tmp_path):
    record = train(settings(analysis_every=1, analysis_score="gradient"), tmp_path / "run", command="dpquant train")
    scores = [layer.last_score for layer in record.layers]
    assert all(score is not None for score in scores) and len(set(scores)) == len(scores)


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"data": "image-folder:/nowhere", "records": 5_000}, DataError),
        ({"model": "no_such_module:build"}, ModelError),
        ({"model": "doubles:with_batch_norm"}, ModelError),
        ({"model": "doubles:with_too_few_outputs"}, ModelError),
        ({"model": "doubles:for_larger_images"}, ModelError),
    ],
)
def test_bad_input_writes_nothing(tmp_path, given, error):
    with pytest.raises(error):
        train(settings(**given), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_fix_makes_a_model_with_batch_norm_trainable(tmp_path):
    record = train(settings(epochs=1, model="doubles:with_batch_norm", fix=True), tmp_path / "run")
    assert math.isfinite(record.accuracy_test)


def test_a_directory_in_use_is_refused(run):
    out, _, _ = run
    with pytest.raises(SettingError, match="new or empty"):
        train(settings(), out)


def test_a_directory_that_cannot_be_made_is_refused_before_any_work():
    unreadable = settings(data="image-folder:/nowhere", records=5_000)
    with pytest.raises(SettingError, match="cannot be written to"):
        train(unreadable, Path(__file__) / "run")


def test_a_ledger_tells_what_its_run_has_spent(run):
    out, record, _ = run
    plan = plan_of(settings(analysis_every=1))
    assert charged(out / "ledger.jsonl", plan) == (record.steps, record.epsilon, False)


# Learning rates


def nan_at_the_end(schedule, steps):
    return lambda step: math.nan if step == steps else 1.0


def negative(schedule, steps):
    return lambda step: 0.5 - step / steps


def fails_at_the_end(schedule, steps):
    return lambda step: 1 / (steps - step)


@pytest.mark.parametrize("planted", [nan_at_the_end, negative, fails_at_the_end])
def test_a_learning_rate_that_fails_at_some_step_is_refused(planted):
    with pytest.raises(SettingError, match="lr_schedule"):
        objects.check_lr_factor(planted("linear", 10), 10)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_learning_rates_begin_at_the_whole_and_end_where_they_should(schedule):
    factor = objects.lr_factor(schedule, 10)
    objects.check_lr_factor(factor, 10)
    assert factor(0) == 1 and factor(10) == pytest.approx(1 if schedule == "constant" else 0)
