# SPDX-License-Identifier: Apache-2.0
import errno
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_file

from dpquant.backends import choose
from dpquant.data import dataset as data
from dpquant.data import models
from dpquant.errors import DataError, DivergedError, DPQuantError, ModelError, SettingError
from dpquant.privacy.accounting import epsilon
from dpquant.privacy.events import Event
from dpquant.privacy.ledger import Ledger
from dpquant.runs import directory, objects
from dpquant.runs import train as train_module
from dpquant.runs.directory import Charged, charged
from dpquant.runs.evaluation import accuracy
from dpquant.runs.record import RunRecord, Timings
from dpquant.runs.settings import TrainSettings, from_toml, plan_of, policy_of
from dpquant.runs.train import train


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
        *("config.toml", "ledger.jsonl", "metrics.jsonl", "model.safetensors"),
        *("record.json", "choices.json", "timings.json"),
    }
    assert RunRecord.read(out / "record.json") == record
    assert TrainSettings.chosen(from_toml(out / "config.toml")) == settings(analysis_every=1)


def choices_of_two_runs(tmp_path, monkeypatch, given):
    """What a run decides, and what another one does on a machine that remembers nothing and times the other way round.

    All layers are quantized, so that both runs ask the same: which ones a policy favours is drawn anew in each run.
    """
    made = []
    for name, sign in (("first", 1), ("again", -1)):
        with monkeypatch.context() as patch:
            patch.setattr(choose, "_machines", {})
            patch.setattr(choose, "timed", lambda ways, sign=sign: {way: sign * i for i, way in enumerate(ways)})
            earlier = {"choices": str(tmp_path / "first" / "choices.json")} if name == "again" and given else {}
            train(settings(policy="all", epochs=1, backend="simulate", **earlier), tmp_path / name)
        made.append(json.loads((tmp_path / name / "choices.json").read_text())["choices"])
    return made


def test_a_run_that_is_given_anothers_choices_decides_alike(tmp_path, monkeypatch):
    first, again = choices_of_two_runs(tmp_path, monkeypatch, given=True)
    assert again and again.items() <= first.items()


def test_a_run_that_is_not_given_them_would_decide_otherwise(tmp_path, monkeypatch):
    first, again = choices_of_two_runs(tmp_path, monkeypatch, given=False)
    assert not again.items() <= first.items()


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


def test_shares_of_work_count_products_and_bits(tmp_path):
    given = {"epochs": 1, "backend": "simulate", "microbatch_size": 32}
    record = train(settings(**given, policy="all", format="full/luq-fp4/int8"), tmp_path / "run")
    assert record.quantized_fraction_macs == pytest.approx(2 / 3)
    assert record.four_bit_fraction_macs == pytest.approx(1 / 3)
    others = train(settings(**given, policy="none", rest="int8/luq-fp4/luq-fp4"), tmp_path / "others")
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
        assert set(line) == {"epoch", "epsilon", "accuracy_test", "layers_quantized"}


def test_times_are_kept_apart_for_the_operator(run):
    out, record, _ = run
    timings = Timings.read(out / "timings.json")
    assert 0 < timings.seconds_train + timings.seconds_analysis < timings.seconds_total
    assert len(timings.seconds_at_epoch_ends) == record.epochs and timings.examples_per_second > 0
    assert timings.seconds_at_epoch_ends == sorted(timings.seconds_at_epoch_ends)


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
        ({"model": "runs.test_train:with_batch_norm"}, ModelError),
        ({"model": "runs.test_train:with_too_few_outputs"}, ModelError),
        ({"model": "runs.test_train:for_larger_images"}, ModelError),
    ],
)
def test_bad_input_writes_nothing(tmp_path, given, error):
    with pytest.raises(error):
        train(settings(**given), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_fix_makes_a_model_with_batch_norm_trainable(tmp_path):
    record = train(settings(epochs=1, model="runs.test_train:with_batch_norm", fix=True), tmp_path / "run")
    assert math.isfinite(record.accuracy_test)


def test_a_directory_in_use_is_refused(run):
    out, _, _ = run
    with pytest.raises(SettingError, match="new or empty"):
        train(settings(), out)


def test_a_directory_that_cannot_be_made_is_refused_before_any_work(monkeypatch):
    monkeypatch.setattr("dpquant.data.dataset.load", lambda *a, **k: pytest.fail("data was read"))
    with pytest.raises(SettingError, match="cannot be written to"):
        train(settings(), Path(__file__) / "run")


def test_a_run_without_a_ledger_has_spent_nothing(tmp_path):
    assert charged(tmp_path / "ledger.jsonl", plan_of(settings())) == (0, 0.0, False)


def test_a_ledger_tells_what_its_run_has_spent(run):
    out, record, _ = run
    plan = plan_of(settings(analysis_every=1))
    assert charged(out / "ledger.jsonl", plan) == (record.steps, record.epsilon, False)


def ledger_of_other_rates(path, research=False):
    """A ledger whose lines are not what the plan of these settings says."""
    ledger = Ledger(path, research=research)
    ledger.charge(kind="train", sample_rate=0.3, noise_multiplier=1.7, count=3)
    ledger.charge(kind="analysis", sample_rate=0.2, noise_multiplier=2.5)
    return path


def assert_reads_the_ledgers_own_lines(read, folder):
    events = [
        Event(kind="train", sample_rate=0.3, noise_multiplier=1.7, count=3),
        Event(kind="analysis", sample_rate=0.2, noise_multiplier=2.5, count=1),
    ]
    found = read(ledger_of_other_rates(folder / "ledger.jsonl"), plan_of(settings()))
    assert found == (3, epsilon(events, 1e-4), False)
    assert read(ledger_of_other_rates(folder / "seeded.jsonl", research=True), plan_of(settings())).research


def test_what_was_spent_is_read_from_the_ledgers_own_lines(tmp_path):
    assert_reads_the_ledgers_own_lines(charged, tmp_path)


def by_the_plan(ledger, plan):
    return Charged(3, plan.epsilon_spent(steps=3, analyses=1), any(c.research for c in Ledger.read(ledger)))


def without_research(ledger, plan):
    return charged(ledger, plan)._replace(research=False)


@pytest.mark.parametrize("planted", [by_the_plan, without_research])
def test_spending_that_is_not_the_ledgers_would_be_seen(planted, tmp_path):
    with pytest.raises(AssertionError):
        assert_reads_the_ledgers_own_lines(planted, tmp_path)


# Nothing is spent before everything was tried.

SMALL = {"epochs": 2, "policy": "none", "microbatch_size": 64, "backend": "simulate"}


def small(**given):
    return settings(**{**SMALL, **given})


def assert_refused_before_any_charge(out, error, words, **given):
    """One error, no charge, and nothing written."""
    charges = []
    honest = Ledger.charge
    with pytest.MonkeyPatch.context() as patch, pytest.raises(DPQuantError) as found:
        patch.setattr(Ledger, "charge", lambda self, **charge: (charges.append(charge), honest(self, **charge)))
        train(small(**given), out)
    assert charges == [], "something was charged"
    assert isinstance(found.value, error) and words in str(found.value)
    assert "secret" not in str(found.value), "what a record made the model say"
    assert not out.exists()


REFUSED = {
    "no tensor in its state": ("runs.test_train:with_a_word_in_its_state", ModelError, "save and load back"),
    "half a tensor": ("runs.test_train:with_half_a_tensor", ModelError, "save and load back"),
    "comes back as another": ("runs.test_train:that_saves_another", ModelError, "another"),
    "no evaluation": ("runs.test_train:that_cannot_evaluate", ModelError, "to 10 logits"),
    "evaluation of another shape": ("runs.test_train:that_evaluates_to_pairs", ModelError, "gave shape (2, 10, 2)"),
    "evaluation fails on records": (
        "runs.test_train:that_fails_on_records",
        ModelError,
        "evaluation mode; got a ValueError",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_fail_after_an_epoch_is_tried_before_any_charge(name, tmp_path):
    model, error, words = REFUSED[name]
    assert_refused_before_any_charge(tmp_path / "run", error, words, model=model)


@pytest.mark.parametrize("name", ["no tensor in its state", "evaluation fails on records"])
def test_a_failure_after_an_epoch_would_be_seen(name, tmp_path, monkeypatch):
    monkeypatch.setattr(train_module, "check_saving", lambda *a: None)
    monkeypatch.setattr(train_module, "check_evaluation", lambda *a: None)
    model, error, words = REFUSED[name]
    with pytest.raises((AssertionError, AttributeError, ValueError)):
        assert_refused_before_any_charge(tmp_path / "run", error, words, model=model)


def no_space(*arguments):
    raise OSError(errno.ENOSPC, "No space left on device")


def no_space_for_safetensors(*arguments):
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("fault", [no_space, no_space_for_safetensors])
def test_a_place_without_room_for_the_model_is_refused_before_any_charge(fault, tmp_path, monkeypatch):
    monkeypatch.setattr(directory, "save_model", fault)
    assert_refused_before_any_charge(tmp_path / "run", SettingError, "No space left on device")


def test_a_directory_that_was_there_stays_when_a_run_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(directory, "save_model", no_space)
    with pytest.raises(SettingError, match="No space left"):
        train(small(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def nan_at_the_end(schedule, steps):
    return lambda step: math.nan if step == steps else 1.0


def negative(schedule, steps):
    return lambda step: 0.5 - step / steps


def fails_at_the_end(schedule, steps):
    return lambda step: 1 / (steps - step)


@pytest.mark.parametrize("planted", [nan_at_the_end, negative, fails_at_the_end])
def test_a_learning_rate_that_fails_at_some_step_is_refused_before_any_charge(planted, tmp_path, monkeypatch):
    monkeypatch.setattr(train_module, "lr_factor", planted)
    assert_refused_before_any_charge(tmp_path / "run", SettingError, "lr_schedule")


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_learning_rates_begin_at_the_whole_and_end_where_they_should(schedule):
    factor = objects.lr_factor(schedule, 10)
    objects.check_lr_factor(factor, 10)
    assert factor(0) == 1 and factor(10) == pytest.approx(1 if schedule == "constant" else 0)


# Nothing is lost: after every epoch the last finite model is on disk.


def assert_keeps_the_last_good_model(out, epochs):
    """The saved model is the one whose accuracy the last line of the metrics states; nothing else is half-written."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == epochs
    model = models.build("cnn", num_classes=10, input_shape=(1, 8, 8))
    load_model(model, out / "model.safetensors")
    assert accuracy(model, data.load("digits").test) == lines[-1]["accuracy_test"]
    assert len(Timings.read(out / "timings.json").seconds_at_epoch_ends) == epochs
    assert not list(out.glob("*.tmp")) and not (out / "record.json").exists()


EPOCH = 6  # steps of an epoch of digits


def in_the_second_epoch(spoil):
    """A `_Tested.update` that spoils the model at a step of the second epoch."""
    honest, count = train_module._Tested.update, 0

    def update(self, model):
        nonlocal count
        honest(self, model)
        count += 1
        if count == EPOCH + 2:
            spoil(model)

    return update


def run_away(model):
    with torch.no_grad():
        next(model.parameters()).fill_(math.inf)


def stopped_by_the_user(model):
    raise KeyboardInterrupt


@pytest.mark.parametrize(("spoil", "error"), [(run_away, DivergedError), (stopped_by_the_user, KeyboardInterrupt)])
def test_a_run_that_ends_early_leaves_the_model_of_its_last_good_epoch(spoil, error, tmp_path, monkeypatch):
    monkeypatch.setattr(train_module._Tested, "update", in_the_second_epoch(spoil))
    with pytest.raises(error):
        train(small(), tmp_path / "run")
    assert_keeps_the_last_good_model(tmp_path / "run", 1)


def saved_at_the_end_only(model, path):
    """What was done before: nothing after an epoch."""


def test_a_model_that_is_saved_at_the_end_only_would_be_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(train_module._Tested, "update", in_the_second_epoch(run_away))
    monkeypatch.setattr(train_module, "save_parameters", saved_at_the_end_only)
    with pytest.raises(DivergedError):
        train(small(), tmp_path / "run")
    with pytest.raises((AssertionError, FileNotFoundError)):
        assert_keeps_the_last_good_model(tmp_path / "run", 1)


def test_a_model_that_is_saved_before_it_is_checked_would_be_seen(tmp_path, monkeypatch):
    honest, out = train_module._check_finite, tmp_path / "run"
    monkeypatch.setattr(train_module._Tested, "update", in_the_second_epoch(run_away))
    monkeypatch.setattr(
        train_module,
        "_check_finite",
        lambda private: (directory.save_parameters(private.model, out / "model.safetensors"), honest(private)),
    )
    with pytest.raises(DivergedError):
        train(small(), out)
    with pytest.raises(AssertionError):
        assert_keeps_the_last_good_model(out, 1)


def test_a_disk_that_is_full_in_mid_run_ends_it_with_one_error(tmp_path, monkeypatch):
    honest, saves = directory.save_parameters, []

    def save(model, path):
        saves.append(path)
        no_space() if len(saves) == 2 else honest(model, path)

    monkeypatch.setattr(train_module, "save_parameters", save)
    with pytest.raises(SettingError, match=r"No space left on device.*stays charged: epsilon = \d\.\d{4}\."):
        train(small(), tmp_path / "run")
    assert charged(tmp_path / "run" / "ledger.jsonl", plan_of(small())).steps == 2 * EPOCH
    assert_keeps_the_last_good_model(tmp_path / "run", 1)


SHARED = {"tied": "runs.test_train:tied", "used twice": "runs.test_train:used_twice", "both": "runs.test_train:shared"}


def assert_comes_back(load, name, path, trained):
    """A fresh model with the saved parameters is the one that was trained."""
    model = models.build(SHARED[name], num_classes=10, input_shape=(1, 8, 8))
    load(model, path)
    inputs, _ = data.load("digits").test.batch(torch.arange(20))
    torch.testing.assert_close(model.eval()(inputs), trained.eval()(inputs))


@pytest.mark.parametrize("name", SHARED)
def test_a_model_that_shares_weights_is_saved_and_comes_back(name, tmp_path, monkeypatch):
    honest, saved = directory.save_parameters, []
    monkeypatch.setattr(train_module, "save_parameters", lambda model, path: (saved.append(model), honest(model, path)))
    train(small(model=SHARED[name]), tmp_path / "run")
    path = tmp_path / "run" / "model.safetensors"
    assert_comes_back(load_model, name, path, saved[-1])
    with pytest.raises(AssertionError):  # a model that nothing was loaded into would be seen
        assert_comes_back(lambda model, path: None, name, path, saved[-1])


def the_former_way(model, path):
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)


@pytest.mark.parametrize("name", SHARED)
def test_saving_shared_weights_the_former_way_is_refused_before_any_charge(name, tmp_path, monkeypatch):
    monkeypatch.setattr(directory, "save_model", the_former_way)
    assert_refused_before_any_charge(tmp_path / "run", ModelError, "save and load back", model=SHARED[name])


def test_parameters_that_run_away_end_the_run_with_one_error(tmp_path):
    with pytest.raises(DivergedError, match="stay finite"):
        train(settings(epochs=1, lr=1e10, weight_decay=1e30, policy="none"), tmp_path / "run")


# Evaluation


def frozen_in_evaluation_mode():
    """A network whose last dropout its user keeps in evaluation mode, and whose first one not."""
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Flatten(), torch.nn.Dropout(), torch.nn.Linear(64, 10))
    model[2].eval()
    return model.requires_grad_(True)


def assert_gives_back_every_mode(evaluate):
    model, test = frozen_in_evaluation_mode(), data.load("digits").test
    modes = [module.training for module in model.modules()]
    assert evaluate(model, test) == evaluate(model, test), "evaluation drew at random"
    assert [module.training for module in model.modules()] == modes


def test_evaluation_gives_every_module_its_own_mode_back():
    assert_gives_back_every_mode(accuracy)


def with_one_mode_for_all(model, split):
    training = model.training
    found = accuracy(model, split)
    model.train(training)
    return found


def in_training_mode(model, split):
    inputs, targets = split.batch(torch.arange(len(split)))
    return float((model(inputs).argmax(1) == targets).float().mean())


@pytest.mark.parametrize("planted", [with_one_mode_for_all, in_training_mode])
def test_modes_that_are_not_given_back_would_be_seen(planted):
    with pytest.raises(AssertionError):
        assert_gives_back_every_mode(planted)


def test_evaluation_takes_no_more_records_at_once_than_it_is_given(monkeypatch):
    test, sizes = data.load("digits").test, []
    honest = type(test).batch
    monkeypatch.setattr(type(test), "batch", lambda self, ids: (sizes.append(len(ids)), honest(self, ids))[1])
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    assert accuracy(model, test, batch_size=100) == accuracy(model, test) and max(sizes[:-1]) == 100
    sizes.clear()
    accuracy(model, test, records=8)
    assert sizes == [8]


@pytest.mark.parametrize(("memory", "microbatch", "expected"), [(None, 32, 500), (2.0, 32, 32), (2.0, 4096, 500)])
def test_where_memory_is_limited_evaluation_takes_a_microbatch_at_once(memory, microbatch, expected):
    private = SimpleNamespace(execution=SimpleNamespace(microbatch_size=microbatch))
    assert train_module._evaluation_batch(settings(memory=memory), private) == expected


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


class SharedNet(torch.nn.Module):
    """Two convolutions of one weight, one of them used twice, as asked for."""

    def __init__(self, tied, twice):
        super().__init__()
        self.a, self.b, self.c = (torch.nn.Conv2d(n, 8, 3, padding=1) for n in (1, 8, 8))
        self.head = torch.nn.Linear(8, 10)
        if tied:
            self.c.weight = self.b.weight
        if twice:
            self.again = self.b
        self.last = self.b if twice else torch.nn.Identity()

    def forward(self, x):
        for layer in (self.a, self.b, self.c, self.last):
            x = torch.relu(layer(x))
        return self.head(x.mean((2, 3)))


def tied():
    return SharedNet(tied=True, twice=False)


def used_twice():
    return SharedNet(tied=False, twice=True)


def shared():
    return SharedNet(tied=True, twice=True)


class Plain(torch.nn.Module):
    """A network for digits, with something wrong in a subclass."""

    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(64, 10)

    def forward(self, x):
        return self.head(x.flatten(1))


class with_a_word_in_its_state(Plain):
    def get_extra_state(self):
        return "a word"

    def set_extra_state(self, state):
        pass


class with_half_a_tensor(Plain):
    def __init__(self):
        super().__init__()
        whole = torch.zeros(8)
        self.register_buffer("low", whole[:5])
        self.register_buffer("high", whole[3:])


class that_saves_another(Plain):
    def __init__(self):
        super().__init__()
        self.register_state_dict_post_hook(lambda module, state, prefix, _: state.update(fixed(state)))


def fixed(state):
    """Other values than the parameters', shapes as they are."""
    return {"head.bias": state["head.bias"] + 1}


class that_cannot_evaluate(Plain):
    def forward(self, x):
        return super().forward(x if self.training else x[0, 0, 0, 0])


class that_evaluates_to_pairs(Plain):
    def forward(self, x):
        found = super().forward(x)
        return found if self.training else torch.stack([found, found], 2)


class that_fails_on_records(Plain):
    def forward(self, x):
        if not self.training and (x == -1).any():  # as the background of a digit is
            raise ValueError(f"secret {x.flatten()[:3].tolist()}")
        return super().forward(x)
