# SPDX-License-Identifier: Apache-2.0
"""Runs on tables and texts by the command line, from a file to the record; what their losses and metrics are."""

import json
import math

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score
from torch import nn

from dpquant.app.cli import run
from dpquant.data.rows import Rows
from dpquant.data.task import UNREADABLE, Task
from dpquant.errors import DataError, ModelError, SettingError
from dpquant.runs.evaluation import check_evaluation, loss_of, metrics, rare_metrics
from dpquant.runs.settings import TrainSettings
from dpquant.runs.sinks import Sink
from dpquant.runs.sources import dataset_of
from dpquant.runs.train import train
from sources import SPEC, as_options, pretrained, regression, table, texts, texts_for


def test_a_table_is_trained_on_by_the_command_line(tmp_path, capsys):
    settings = table(tmp_path)
    assert run(["train", *as_options(settings), "--out", str(tmp_path / "r"), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["source"]["spec"] == SPEC and record["source"]["task"] == "rare positives"
    assert set(record["metrics_test"]) == {
        "accuracy",
        "balanced_accuracy",
        "average_precision",
        "recall_at_1_percent_fpr",
        "roc_auc",
    }
    assert record["accuracy_test"] == record["metrics_test"]["accuracy"]
    weights = (tmp_path / "r" / "model.safetensors").read_bytes()
    assert b"0.embedding.weight" in weights


def test_a_regression_has_no_accuracy_but_an_error_in_its_own_unit(tmp_path):
    settings = regression(tmp_path)
    record = train(TrainSettings.chosen(settings), tmp_path / "r")
    assert record.accuracy_test is None and 0 < record.metrics_test["mean_absolute_error"] < 1000
    assert record.source["task"] == "regression" and record.accuracy_per_epoch == []


def of_ones_own(folder, model):
    return TrainSettings.chosen(texts_for(folder, f"doubles:{model}"))


def test_a_network_of_ones_own_reads_texts(tmp_path):
    assert train(of_ones_own(tmp_path, "of_texts"), tmp_path / "run").steps > 0


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("of_texts_by_name", r"'attention_mask'.*texts.*: forward gets a dictionary of input_ids, attention_mask\.$"),
        ("of_longer_texts", "texts of 16 tokens to 2 logits; got RuntimeError: .* texts, which have 16 to 40 tokens"),
    ],
)
def test_a_network_that_cannot_read_texts_as_they_come_is_told_so_before_a_charge(tmp_path, model, said):
    with pytest.raises(ModelError, match=said):
        train(of_ones_own(tmp_path, model), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_texts_are_trained_on_by_the_command_line(tmp_path, capsys):
    settings = texts(tmp_path)
    assert run(["train", *as_options(settings), "--out", str(tmp_path / "r"), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["source"]["buckets"] == [16, 32, 40] and record["source"]["classes"] == ["ham", "spam"]
    assert len(record["source"]["tokenizer_sha256"]) == 64


def test_a_run_on_texts_continues_where_it_was(tmp_path):
    settings = TrainSettings.chosen({**texts(tmp_path), "epochs": 2, "checkpoint_every": "1steps"})

    class Stops(Sink):
        def stepped(self, progress):
            if progress.step == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(settings, tmp_path / "r", sinks=[Stops()])
    lines = (tmp_path / "t.jsonl").read_text()
    (tmp_path / "t.jsonl").write_text(lines.replace("good day", "bad day", 1))
    with pytest.raises(DataError, match="training records with which the run was begun"):
        train(settings, tmp_path / "r", resume=True)
    (tmp_path / "t.jsonl").write_text(lines)
    assert train(settings, tmp_path / "r", resume=True).steps <= 4


# Losses and metrics


class Fixed(nn.Module):
    """A model that returns what it is given."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return x * self.factor


def test_rare_positives_are_learned_from_logits_shifted_by_the_declared_shares():
    logits, targets = torch.tensor([[0.3, -0.2], [1.0, 2.0], [5.0, 1.0]]), torch.tensor([0, 1, UNREADABLE])
    found = loss_of(Task(kind="rare positives", prior=0.1))(Fixed(), (logits, targets))
    odds = [math.exp(-0.5) / 9, math.exp(1.0) / 9]
    expected = [math.log1p(odds[0]), math.log1p(1 / odds[1]), 0.0]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_a_regression_s_loss_is_zero_with_its_gradient_where_the_target_is_unknown():
    model, inputs = Fixed(), torch.tensor([[0.5], [2.0]])
    found = loss_of(Task(kind="regression"))(model, (inputs, torch.tensor([1.0, math.nan])))
    assert found.tolist() == [0.25, 0.0]
    assert torch.autograd.grad(found[1], model.factor)[0] == 0


def rows(inputs, targets, readable=None):
    ok = torch.ones(len(targets), dtype=torch.bool) if readable is None else torch.tensor(readable)
    return Rows(torch.tensor(inputs), torch.tensor(targets), ok)


def test_accuracies_of_a_classification():
    scores = [[2.0, 1.0], [0.0, 1.0], [3.0, 1.0], [1.0, 5.0], [9.0, 0.0]]
    split = rows(scores, [0, 0, 0, 1, UNREADABLE], [True, True, True, True, False])
    found = metrics(Fixed(), split, Task())
    assert found["accuracy"] == 3 / 5, "a record that cannot be used counts as wrong"
    assert found["balanced_accuracy"] == balanced_accuracy_score([0, 0, 0, 1], [0, 1, 0, 1])


def test_accuracy_of_rare_positives_takes_their_declared_share_into_account():
    split = rows([[0.0, 1.0], [0.0, 3.0]], [0, 1])
    assert metrics(Fixed(), split, Task(kind="rare positives", prior=0.1))["accuracy"] == 1.0
    assert metrics(Fixed(), split, Task(kind="rare positives", prior=0.5))["accuracy"] == 0.5


def test_recall_at_a_false_positive_rate_of_a_hundredth():
    negatives = np.arange(200.0)  # at most two of them may score higher than a positive that is found
    positives = np.array([197.5, 198.5, 1000.0, 3.0])
    scores, positive = np.concatenate([negatives, positives]), np.arange(204) >= 200
    assert rare_metrics(scores, positive)["recall_at_1_percent_fpr"] == 3 / 4
    assert rare_metrics(scores, positive)["average_precision"] == pytest.approx((1 / 1 + 2 / 3 + 3 / 5 + 4 / 201) / 4)


def test_an_error_of_clamped_values_in_the_targets_own_unit():
    split = rows([[3.0], [-0.5], [0.0]], [0.5, 0.0, math.nan], [True, True, False])
    found = metrics(Fixed(), split, Task(kind="regression", low=0, high=100))
    assert found == {"mean_absolute_error": pytest.approx(25.0)}


def test_a_test_set_of_one_class_is_refused_where_positives_are_rare():
    with pytest.raises(DataError, match="both classes"):
        check_evaluation(Fixed(), rows([[0.0, 1.0]], [0]), Task(kind="rare positives", prior=0.5))


# Pretrained networks


def test_a_pretrained_network_is_trained_by_adapters(tmp_path):
    pytest.importorskip("peft")
    record = train(TrainSettings.chosen({**pretrained(tmp_path), "lora": 2}), tmp_path / "r")
    assert any("lora_A" in layer.name for layer in record.layers) and record.accuracy_test is not None


def test_a_pretrained_network_is_trained_whole(tmp_path):
    from safetensors.torch import load_file

    settings = TrainSettings.chosen(pretrained(tmp_path))
    before = load_file(tmp_path / "model.safetensors")
    train(settings, tmp_path / "r")
    found = load_file(tmp_path / "r" / "model.safetensors")
    after = {name.removeprefix("network."): values for name, values in found.items()}
    assert before.keys() <= after.keys() and not any(
        torch.equal(after[name], values) for name, values in before.items()
    )


def test_only_named_parameters_of_a_pretrained_network_are_trained(tmp_path):
    from safetensors.torch import load_file

    settings = TrainSettings.chosen({**pretrained(tmp_path), "train_only": "*classifier*,*pooler*"})
    before = load_file(tmp_path / "model.safetensors")
    train(settings, tmp_path / "r")
    found = load_file(tmp_path / "r" / "model.safetensors")
    after = {name.removeprefix("network."): values for name, values in found.items()}
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved == {name for name in before if "classifier" in name or "pooler" in name}


# What has to be said of a file


def test_test_records_are_the_owner_s_choice(tmp_path):
    settings = table(tmp_path)
    del settings["test_share"]
    with pytest.raises(SettingError, match="Expected test or test_share"):
        dataset_of(TrainSettings.chosen(settings))
