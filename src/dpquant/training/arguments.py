# SPDX-License-Identifier: Apache-2.0
"""Types of `make_private`'s arguments, checked before anything else: what is confused with what has an answer here."""

import inspect
import operator
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from dpquant.backends.choose import Choices
from dpquant.errors import DataError, ModelError, SettingError, did_you_mean, expect, kind_of
from dpquant.formats import AUTO
from dpquant.privacy.plan import PrivacyPlan
from dpquant.training import policies
from dpquant.training.policies import AllPolicy, NonePolicy, Policy
from dpquant.training.records import MapDataset

_SEEDS = 2**64
_MOST_WORKERS = 64
_LOSS = "It is called with the model and a batch, and returns one loss per example, as in lambda model, batch: "
_LOSS += "cross_entropy(model(batch[0]), batch[1], reduction='none')"


def check_arguments(given: Mapping[str, Any]) -> None:
    """Check the types of all arguments of `make_private`, and the signature of its loss.

    Raises:
      ModelError: of the model.
      DataError: of the data set.
      SettingError: of any other.
    Privacy: reads no data.
    """
    expect("model", given["model"], nn.Module, "a torch.nn.Module", "Pass the model itself", ModelError)
    _check_train_set(given["train_set"])
    _check_loss(given["loss_fn"])
    todo = "Make one by dpquant.PrivacyPlan(epsilon=..., ...)"
    expect("plan", given["plan"], PrivacyPlan, "a dpquant.PrivacyPlan", todo)
    _check_policy(given["policy"])
    _check_auto(given)
    _check_number("seed", given["seed"])
    _check_number("mechanism_seed", given["mechanism_seed"], or_none=True)
    _check_number("microbatch_size", given["microbatch_size"], or_none=True)
    _check_number("workers", given["workers"])
    if not 1 <= given["workers"] <= _MOST_WORKERS:
        raise SettingError(
            f"Expected workers in 1 .. {_MOST_WORKERS}; got workers={given['workers']}. Each is a thread that reads a "
            "microbatch ahead. Leave it out for one."
        )
    todo = "Give GiB, as in memory=8"
    expect("memory", given["memory"], (int, float, type(None)), "a number or None", todo)
    if given["memory"] is not None and not given["memory"] > 0:
        raise SettingError(f"Expected memory > 0; got memory={given['memory']}. It counts GiB. {todo}.")
    todo = "Give pathlib.Path('ledger.jsonl'), or None to keep charges in memory"
    expect("ledger", given["ledger"], (Path, type(None)), "a pathlib.Path or None", todo)
    todo = "Read a run's choices.json by Choices.read, or leave it out"
    expect("choices", given["choices"], (Choices, type(None)), "Choices or None", todo)
    for name in ("exact_sums", "shard_optimizer"):
        if not isinstance(given[name], bool):
            raise SettingError(f"Expected {name} to be True or False; got {kind_of(given[name])}.")
    if not callable(given["collate_fn"]):
        raise SettingError(
            f"Expected collate_fn to be a function from a list of records to a batch; got "
            f"{kind_of(given['collate_fn'])}. Leave it out for torch's own."
        )
    if given["backend"] is None or isinstance(given["backend"], type):
        raise SettingError(
            f"Expected backend to be a name or a backend; got {given['backend']}. Give 'auto', or leave it out."
        )


def _check_train_set(train_set: object) -> None:
    if isinstance(train_set, DataLoader):
        raise DataError(
            "Expected train_set to be a data set; got a DataLoader. Poisson sampling draws records by index, and makes "
            "batches of its own. Pass loader.dataset, and loader.collate_fn as collate_fn."
        )
    if isinstance(train_set, Mapping):
        raise DataError(
            f"Expected train_set to be map-style (__len__ and __getitem__) with indices from 0; got "
            f"{kind_of(train_set)} with keys of its own. Give a list of records, or a torch.utils.data.Dataset."
        )


def _check_loss(loss_fn: object) -> None:
    if isinstance(loss_fn, nn.Module):
        raise SettingError(
            f"Expected loss_fn to be a function of the model and a batch; got the module {type(loss_fn).__name__}, "
            f"which takes outputs and targets. {_LOSS}."
        )
    if not callable(loss_fn):
        raise SettingError(
            f"Expected loss_fn to be a function of the model and a batch; got {kind_of(loss_fn)}. {_LOSS}."
        )
    try:
        inspect.signature(loss_fn).bind(None, None)
    except ValueError:  # built-in functions may have no signature
        return
    except TypeError as error:
        raise SettingError(
            f"Expected loss_fn to be a function of the model and a batch; got one that cannot be called with two "
            f"arguments ({error}). {_LOSS}."
        ) from error


def _check_policy(policy: object) -> None:
    if isinstance(policy, Policy):
        return
    known = [name for name in vars(policies) if name.endswith("Policy") and name[0] != "_" and name != "Policy"]
    got, hint = kind_of(policy), ""
    if isinstance(policy, type):
        hint = "Call it. "
    elif isinstance(policy, str):
        got, hint = f"policy={policy!r}", did_you_mean(f"{policy}Policy", known)
    raise SettingError(
        f"Expected policy to be a policy; got {got}. {hint}Make one of {', '.join(sorted(known))}, as in "
        "dpquant.DPQuantPolicy(fraction=0.75)."
    )


def _check_auto(given: Mapping[str, Any]) -> None:
    """Refuse what `format=auto` decides itself."""
    if given["format"] != AUTO:
        return
    if not isinstance(given["policy"], AllPolicy | NonePolicy):
        raise SettingError(
            f"Expected policy to be dpquant.AllPolicy() with format='auto'; got {kind_of(given['policy'])}. auto "
            "quantizes the layers that get faster, in a format that costs no accuracy; no choice is left. Give a "
            "format, as luq-fp4, for another policy."
        )
    if given["rest"] != "full":
        raise SettingError(
            f"Expected rest='full' with format='auto'; got rest={given['rest']!r}. Layers that do not get faster stay "
            "in full precision. Leave rest out."
        )


def _check_number(name: str, value: object, *, or_none: bool = False) -> None:
    """Check a whole number in 0 .. 2^64 - 1, of Python or numpy."""
    if value is None and or_none:
        return
    try:
        number = operator.index(value)  # pyright: ignore[reportArgumentType]
    except TypeError:
        number = -1
    if isinstance(value, bool) or not 0 <= number < _SEEDS:
        raise SettingError(
            f"Expected {name} to be a whole number in 0 .. 2^64 - 1{' or None' if or_none else ''}; got "
            f"{name}={value!r}. Pass an int."
        )


def check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer that holds other parameters, lacks a trainable one, or needs several gradients a step."""
    todo = "Make one of the model's parameters, as torch.optim.SGD(model.parameters(), lr=0.1)"
    expect("optimizer", optimizer, torch.optim.Optimizer, "a torch.optim.Optimizer", todo)
    if isinstance(optimizer, torch.optim.LBFGS):
        raise SettingError("Expected an optimizer that needs one gradient a step; got LBFGS, which evaluates more.")
    held = {p for group in optimizer.param_groups for p in group["params"]}
    names = {p: name for name, p in model.named_parameters()}
    if any(p not in names for p in held):
        raise SettingError(
            "Expected optimizer to hold the model's own parameters; got one that holds others. It would train another "
            "model. Make the optimizer from model.parameters() after dpquant.fix, .to() and the like."
        )
    if missing := [name for p, name in names.items() if p.requires_grad and p not in held]:
        raise SettingError(
            f"Expected optimizer to hold every trainable parameter; it lacks {missing[0]}. It would take part in "
            "clipping and never move. Give it to the optimizer, or freeze it with requires_grad_(False)."
        )


def check_data_set(train_set: MapDataset, *, may_be_empty: bool = False) -> None:
    """Refuse a data set that is not map-style, or is empty."""
    if isinstance(train_set, IterableDataset) or not (
        hasattr(train_set, "__getitem__") and hasattr(train_set, "__len__")
    ):
        raise DataError(
            f"Expected train_set to be map-style (__len__ and __getitem__); got a {type(train_set).__name__}. "
            "Poisson sampling draws records by index. Give a torch.utils.data.Dataset with stable indices."
        )
    if len(train_set) == 0 and not may_be_empty:
        raise DataError(
            "Expected train_set to hold at least one record; got an empty data set. A process may have none with "
            "partition='range' and example=, which tells what the records of the others look like."
        )
