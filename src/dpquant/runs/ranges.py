# SPDX-License-Identifier: Apache-2.0
"""Which values a setting may have: its type, its range, or a list of words. Loads no torch."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from dpquant.errors import SettingError, did_you_mean
from dpquant.runs.source_settings import AUGMENTS, PARTITIONS, SOURCE_RANGES, Range

OPTIMIZERS = ("sgd", "adam", "adamw")
LR_SCHEDULES = ("constant", "linear", "cosine")
POLICIES = ("none", "all", "static", "rotate", "prioritise", "dpquant")
BACKENDS = ("auto", "simulate", "int8", "cuda")
ANALYSIS_SCORES = ("loss", "gradient")
NOISES = ("gaussian", "discrete")
CHOICES: Mapping[str, tuple[str, ...]] = {
    "optimizer": OPTIMIZERS,
    "lr_schedule": LR_SCHEDULES,
    "policy": POLICIES,
    "backend": BACKENDS,
    "analysis_score": ANALYSIS_SCORES,
    "noise": NOISES,
    "augment": AUGMENTS,
    "partition": PARTITIONS,
}

_AT_LEAST_ONE: Range = (">= 1", lambda x: x >= 1)
_POSITIVE: Range = ("> 0 and finite", lambda x: 0 < x < math.inf)
_NOT_NEGATIVE: Range = (">= 0 and finite", lambda x: 0 <= x < math.inf)


def tracker_names(track: str | None) -> tuple[str, ...]:
    """Return the names in the setting `track`."""
    return () if track is None else tuple(name.strip() for name in track.split(","))


def _names_each_once(text: str) -> bool:
    names = tracker_names(text)
    return len(set(names)) == len(names) and all(re.fullmatch(r"[\w.-]+", name) for name in names)


RANGES: Mapping[str, Range] = {
    **SOURCE_RANGES,
    "epochs": _AT_LEAST_ONE,
    "batch_size": _POSITIVE,
    "sample_rate": ("in (0, 1]", lambda x: 0 < x <= 1),
    "records_per_person": ("in 1 .. 64", lambda x: 1 <= x <= 64),
    "records": ("in 1 .. 10^12", lambda x: 1 <= x <= 10**12),
    "lr": _POSITIVE,
    "momentum": ("in [0, 1)", lambda x: 0 <= x < 1),
    "average": ("in [0, 1)", lambda x: 0 <= x < 1),
    "weight_decay": _NOT_NEGATIVE,
    "beta": _NOT_NEGATIVE,
    "analysis_every": _AT_LEAST_ONE,
    "analysis_batch_size": _POSITIVE,
    "seed": ("in 0 .. 2^63 - 1", lambda x: 0 <= x < 2**63),
    "threads": ("in 1 .. 4096", lambda x: 1 <= x <= 4096),
    "microbatch_size": _AT_LEAST_ONE,
    "memory": _POSITIVE,
    "track": ("to be names with commas between them, each once", _names_each_once),
}


def check_type(name: str, value: Any, annotation: str) -> None:
    """Check that a value has the type of the field's annotation; an int is accepted for a float."""
    names = annotation.replace("<class '", "").replace("'>", "").split(" | ")
    allowed = tuple({"str": str, "int": int, "float": (int, float), "bool": bool, "None": type(None)}[n] for n in names)
    if not isinstance(value, allowed) or (isinstance(value, bool) and "bool" not in names):
        raise SettingError(f"Expected {name} of type {annotation}; got {name}={value!r}. See dpquant train --help.")


def check_range(name: str, value: Any) -> None:
    """Check that a number is in the setting's range.

    Raises:
      SettingError: names the range.
    """
    rule, holds = RANGES[name]
    if not holds(value):
        raise SettingError(f"Expected {name} {rule}; got {name}={value}. See dpquant train --help.")


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Check that a setting is one of the allowed words."""
    if value not in allowed:
        raise SettingError(
            f"Expected {name} to be one of {', '.join(allowed)}; got {name}={value}. {did_you_mean(value, allowed)}See "
            "dpquant train --help."
        )


def unknown(name: str, value: Any, known: Iterable[str]) -> str:
    """Return the error for a setting that does not exist."""
    if isinstance(value, dict):
        return (
            f"Expected settings outside of tables; got a table [{name}]. Settings have no groups. Write them as lines "
            "NAME = VALUE, above any table."
        )
    hint = did_you_mean(name, known)
    return f"Expected known settings; got {name}. It would be ignored. {hint}See dpquant train --help."
