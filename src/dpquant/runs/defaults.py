# SPDX-License-Identifier: Apache-2.0
"""Defaults of settings that depend on others, and where each comes from. Loads no torch.

`BY_DATA` has values that were found to work for some data sets, `GENERAL` those for the others. Where the number of
records is public, batches and delta follow from it. Whoever names a policy, or something that only policies of the
paper have, gets the paper's format; whoever names neither gets `auto`.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from dpquant.data.manifest import kind_of
from dpquant.data.sizes import (
    FOLDER_IMAGE_SIZE,
    FOLDER_PREFIX,
    OWN_PREFIXES,
    PACKED_PREFIX,
    PUBLIC_SIZES,
    TABLE_PREFIX,
    TEXT_PREFIX,
)
from dpquant.formats import AUTO
from dpquant.runs.effects import SCORED, settings_of_policies

GENERAL: Mapping[str, Any] = {
    "model": "resnet18-cifar",
    "epochs": 20,
    "batch_size": 1024.0,
    "delta": 1e-5,
    "max_grad_norm": 1.0,
    "optimizer": "adam",
    "lr": 1e-3,
    "momentum": 0.0,
}
_FASHION: Mapping[str, Any] = {
    "model": "cnn",
    "epochs": 25,
    "batch_size": 2048.0,
    "max_grad_norm": 0.1,
    "optimizer": "sgd",
    "lr": 4.0,
    "momentum": 0.9,
}
# trains in minutes on a CPU, where the general network takes hours; the best of three rates on three data sets
_IMAGES: Mapping[str, Any] = {"model": "cnn", "lr": 0.01}
BY_DATA: Mapping[str, Mapping[str, Any]] = {
    "digits": {
        "model": "cnn",
        "epochs": 40,
        "batch_size": 256.0,
        "delta": 1e-4,
        "optimizer": "sgd",
        "lr": 0.2,
        "momentum": 0.9,
    },
    "mnist": _FASHION,
    "fashion-mnist": _FASHION,
    "cifar10": _IMAGES,
    "gtsrb": {"image_size": FOLDER_IMAGE_SIZE, **_IMAGES},
    FOLDER_PREFIX: {"image_size": FOLDER_IMAGE_SIZE, **_IMAGES},
    TABLE_PREFIX: {"model": "mlp", "lr": 0.01},
    TEXT_PREFIX: {"model": "embedding-mean", "lr": 0.02, "max_length": 128},
}
_OF_PACKED: Mapping[str | None, Mapping[str, Any]] = {
    "images": _IMAGES,
    "rows": BY_DATA[TABLE_PREFIX],
    "texts": {name: value for name, value in BY_DATA[TEXT_PREFIX].items() if name != "max_length"},
}
EPOCH_STEPS = 10  # of a data set too small for the general batch size
_FREE = "int8"  # the recipe that costs no measurable accuracy (README.md, experiments)
_FEWEST_ANALYSED = 16.0  # records of an analysis, where a small batch has as many; a sixteenth of it says nothing


@dataclasses.dataclass(frozen=True)
class Default:
    """Default of a setting.

    Attributes:
      value: of the setting.
      origin: where it comes from, in a few words; empty where it is the same for every run.
    """

    value: Any
    origin: str


def defaults(given: Mapping[str, Any]) -> dict[str, Default]:
    """Return {setting: its default} for all settings whose default depends on others.

    Args:
      given: {setting: value}, unchecked; None counts as not given.
    """
    given = {name: value for name, value in given.items() if value is not None}
    data = given.get("data", "digits")
    found = {name: Default(value, "general") for name, value in GENERAL.items()}
    records = given.get("records", PUBLIC_SIZES.get(data))
    found |= _by_records(records)
    found |= {name: Default(value, f"from {_kind(data)}") for name, value in _by_data(data, given).items()}
    if "noise_multiplier" not in given:
        found["epsilon"] = Default(8.0, "general")
    if "macs" not in given and "layers" not in given:
        found["fraction"] = Default(0.75, "general")
    found |= _by_policy(given)
    size, policy = found["batch_size"], given.get("policy", found["policy"].value)
    if "batch_size" not in given and size.origin == _from_records(records) and policy in SCORED:
        found["analysis_batch_size"] = Default(min(size.value, max(size.value / 16, _FEWEST_ANALYSED)), size.origin)
    return found


def _from_records(records: int | None) -> str:
    return "" if records is None else f"from {records:,} records"


def _by_records(records: int | None) -> dict[str, Default]:
    """Return what follows from a public number of records: batches of a tenth of them, and a delta below 1 / records.

    Small data sets get smaller batches than `GENERAL`, large ones a smaller delta.
    """
    found: dict[str, Default] = {}
    if records is None:
        return found
    origin = _from_records(records)
    if records < EPOCH_STEPS * GENERAL["batch_size"]:
        size = max(1.0, float(round(records / EPOCH_STEPS)))
        found["batch_size"] = Default(size, origin)
    if records * GENERAL["delta"] >= 1:
        found["delta"] = Default(float(f"1e-{math.floor(math.log10(records)) + 1}"), origin)
    return found


def _by_policy(given: Mapping[str, Any]) -> dict[str, Default]:
    """Return the defaults of format and policy."""
    of_policies = next((name for name in given if name in settings_of_policies()), None)
    format = Default("luq-fp4", f"as {of_policies} is given") if of_policies else Default(AUTO, "general")
    policy, name = Default("dpquant", "general"), given.get("format", format.value)
    if name == AUTO or (name == _FREE and not of_policies):  # no layer costs anything
        policy = Default("all", f"as format is {name}")
    return {"format": format, "policy": policy}


def _by_data(data: str, given: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the defaults of a data set, by its name, its kind of file or, of packed records, its manifest.

    A rate that was found with the general optimizer is for that and the data's own network alone.
    """
    found = _OF_PACKED.get(kind_of(data), {}) if data.startswith(PACKED_PREFIX) else BY_DATA.get(_kind(data), {})
    others = {"model": found.get("model"), "optimizer": GENERAL["optimizer"]}
    if "optimizer" not in found and any(given.get(name, usual) != usual for name, usual in others.items()):
        return {name: value for name, value in found.items() if name != "lr"}
    return found


def _kind(data: str) -> str:
    """Return the name of a data set, without the path of a user's own."""
    return next((prefix for prefix in OWN_PREFIXES if data.startswith(prefix)), data)
