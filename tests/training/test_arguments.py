# SPDX-License-Identifier: Apache-2.0
"""Misuses of the library: each is one clear DPQuantError, before anything is computed, and not whatever comes of it."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dpquant
from dpquant.errors import DPQuantError

DATA = TensorDataset(torch.zeros(40, 4), torch.zeros(40, dtype=torch.int64))
BATCH = (torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64))
PLAN = dpquant.PrivacyPlan(
    noise_multiplier=1.0, delta=1e-5, max_grad_norm=1.0, sample_rate=0.2, expected_batch_size=8, steps=5
)
ANALYSIS = dpquant.AnalysisPlan(
    count=1, sample_rate=0.1, expected_batch_size=4, noise_multiplier=1.0, max_norm=1.0
)  # fmt: skip


def loss(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def of_outputs(outputs, targets):
    return nn.functional.cross_entropy(outputs, targets, reduction="none")


def make(model=..., optimizer=..., train_set=DATA, **changed):
    """`make_private` with some arguments replaced."""
    network = nn.Sequential(nn.Linear(4, 2))
    model = network if model is ... else model
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1) if optimizer is ... else optimizer
    arguments = {"loss_fn": loss, "plan": PLAN, "policy": dpquant.AllPolicy(), "backend": "simulate", **changed}
    return dpquant.make_private(model, optimizer, train_set, **arguments)


def prepared():
    return dpquant.prepare(nn.Sequential(nn.Linear(4, 2)), backend="simulate")


def clipped(**changed):
    arguments = {"max_grad_norm": 1.0, "record_ids": torch.arange(3), "step": 0, "seed": 0, **changed}
    return dpquant.clipped_sum(arguments.pop("model", None) or prepared(), loss, BATCH, **arguments)


MISUSES = {
    "a policy by its name": (lambda: make(policy="dpquant"), "Did you mean DPQuantPolicy"),
    "a policy's class": (lambda: make(policy=dpquant.DPQuantPolicy), "the class DPQuantPolicy. Call it"),
    "a policy without scores' class": (lambda: make(policy=dpquant.AllPolicy), "the class AllPolicy"),
    "no policy": (lambda: make(policy=None), "policy to be a policy; got None"),
    "a plan as a dict": (lambda: make(plan={"epsilon": 3}), "dpquant.PrivacyPlan; got a dict"),
    "no plan": (lambda: make(plan=None), "dpquant.PrivacyPlan; got None"),
    "an analysis for a plan": (lambda: make(plan=ANALYSIS), "got an AnalysisPlan"),
    "scores without an analysis": (lambda: make(policy=dpquant.DPQuantPolicy(fraction=0.5)), "Expected plan.analysis"),
    "a ledger by its name": (lambda: make(ledger="ledger.jsonl"), "ledger to be a pathlib.Path or None; got a str"),
    "a loss module": (lambda: make(loss_fn=nn.CrossEntropyLoss(reduction="none")), "takes outputs and targets"),
    "a loss of outputs": (lambda: make(loss_fn=of_outputs), r"loss_fn\(model, batch\).*test_arguments.py:"),
    "a loss of three": (lambda: make(loss_fn=lambda model, x, y: x), "missing a required argument: 'y'"),
    "a loss by its name": (lambda: make(loss_fn="cross_entropy"), "a function of the model and a batch; got a str"),
    "a mean loss": (lambda: make(loss_fn=lambda m, b: loss(m, b).mean()), "one loss per example"),
    "a DataLoader": (lambda: make(train_set=DataLoader(DATA)), "Pass loader.dataset"),
    "no data set": (lambda: make(train_set=None), "map-style"),
    "a data set of names": (lambda: make(train_set={"a": 1}), "got a dict with keys of its own"),
    "an empty data set": (lambda: make(train_set=[]), "at least one record"),
    "no model": (lambda: make(model=None), "torch.nn.Module; got None"),
    "a model's class": (lambda: make(model=nn.Linear), "torch.nn.Module; got the class Linear"),
    "a function for a model": (lambda: make(model=lambda x: x), "torch.nn.Module; got a function"),
    "no optimizer": (lambda: make(optimizer=None), "torch.optim.Optimizer; got None"),
    "an optimizer's class": (lambda: make(optimizer=torch.optim.SGD), "got the class SGD"),
    "another model's optimizer": (lambda: make(model=nn.Linear(4, 2)), "the model's own parameters"),
    "a data parallel model": (lambda: make(model=nn.DataParallel(nn.Linear(4, 2))), "model.module"),
    "no format": (lambda: make(format=None), "a name, a Recipe or a Precision; got None"),
    "a dtype for a format": (lambda: make(format=torch.int8), "got a dtype"),
    "bits for a format": (lambda: make(rest=8), "got an int"),
    "an unknown format": (lambda: make(format="int4"), "Did you mean int4-clip"),
    "an unknown backend": (lambda: make(backend="tpu"), "backend to be one of"),
    "no backend": (lambda: make(backend=None), "got None"),
    "a microbatch in words": (lambda: make(microbatch_size="4"), "microbatch_size='4'"),
    "a broken microbatch": (lambda: make(microbatch_size=4.5), "microbatch_size=4.5"),
    "memory in words": (lambda: make(memory="1GB"), "memory to be a number or None; got a str"),
    "less than no memory": (lambda: make(memory=-1.0), "memory=-1.0"),
    "a broken seed": (lambda: make(seed=0.5), "seed=0.5"),
    "a negative seed": (lambda: make(mechanism_seed=-1), "mechanism_seed=-1"),
    "no collate function": (lambda: make(collate_fn=None), "collate_fn to be a function"),
    "choices by their file": (lambda: make(choices=Path("choices.json")), "Choices or None"),
    "one example": (lambda: make(example=[DATA[0]]), "at least two records"),
    "examples that are none": (lambda: make(example=3), "a list or a data set"),
    "a fraction in words": (lambda: dpquant.RotatePolicy(fraction="half"), "fraction to be a number; got a str"),
    "beta in words": (lambda: dpquant.DPQuantPolicy(fraction=0.5, beta="much"), "beta to be a number"),
    "one name for many": (lambda: dpquant.set_policy(prepared(), "0"), "names='0'"),
    "no names": (lambda: dpquant.set_policy(prepared(), None), "names=None"),
    "layers of no model": (lambda: dpquant.quantizable_layers("model"), "got a str"),
    "a list to quantize": (lambda: dpquant.quantize([1.0, 2.0], "luq-fp4"), "x to be a tensor; got a list"),
    "records that are a list": (lambda: clipped(record_ids=[0, 1, 2]), "record_ids to be a tensor"),
    "a sum over no model": (lambda: clipped(model="model"), "torch.nn.Module; got a str"),
    "a recipe's name for a Recipe": (lambda: dpquant.Precision(forward="int8"), "forward to be a Recipe or None"),
    "a ledger's name to open": (lambda: dpquant.Ledger("ledger.jsonl"), "path to be a pathlib.Path"),
    "a ledger's name to read": (lambda: dpquant.Ledger.read("ledger.jsonl"), "path to be a pathlib.Path"),
    "a record's name to read": (lambda: dpquant.RunRecord.read("record.json"), "path to be a pathlib.Path"),
    "a ledger that is not there": (lambda: dpquant.Ledger.read(Path("nowhere.jsonl")), "Check the path"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISUSES)
def test_a_misuse_is_one_clear_error(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call, says = MISUSES[name]
    with pytest.raises(DPQuantError, match=says) as caught:
        call()
    assert str(caught.value).startswith("Expected ") and "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def private():
    return make(microbatch_size=4)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda run, folder: run.step(DATA[0]), "the batch that the epoch has just drawn"),
        (lambda run, folder: run.save("checkpoint"), "path to be a pathlib.Path; got a str"),
        (lambda run, folder: run.load("checkpoint"), "path to be a pathlib.Path; got a str"),
        (lambda run, folder: run.load(folder / "none"), "got No such file"),
        (lambda run, folder: run.save(folder / "one", scheduler=3), "scheduler to be an object with state_dict"),
    ],
)
def test_a_misuse_of_a_run_is_one_clear_error(call, says, private, tmp_path):
    with pytest.raises(DPQuantError, match=says) as caught:
        call(private, tmp_path)
    assert str(caught.value).count("Expected") == 1
    assert not list(tmp_path.iterdir())


def test_the_right_arguments_are_accepted(private):
    assert private.steps_taken == 0  # so that the refusals above are of what is wrong, and not of everything
