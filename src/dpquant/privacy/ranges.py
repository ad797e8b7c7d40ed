# SPDX-License-Identifier: Apache-2.0
"""Ranges of the settings of a plan, and the errors for values outside of them."""

from collections.abc import Mapping
from typing import Any, NamedTuple, get_args

from dpquant.errors import SettingError
from dpquant.privacy import accounting

MOST_STEPS = 10**6  # of a plan


class _Rule(NamedTuple):
    """Range of a setting, with the advice that its error message gives."""

    low: float
    high: float
    advice: str
    number: type[int] | type[float] = float


_NORM = _Rule(
    1e-15, 1e15, "Without a bound there is no sensitivity, and float32 must be able to hold it. Pass a clipping norm."
)
RULES: Mapping[str, _Rule] = {
    "epsilon": _Rule(1e-3, 500, "Less cannot be computed well, more promises nothing. Values from 1 to 10 are usual."),
    "noise_multiplier": _Rule(
        accounting.SMALLEST_NOISE,
        1e9,
        "It is noise over sensitivity; too little hides nothing. Values near 1 are usual.",
    ),
    "delta": _Rule(
        accounting.SMALLEST_DELTA,
        0.5,
        "It is delta of the (epsilon, delta) guarantee. Choose it far below 1 / records.",
    ),
    "max_grad_norm": _NORM,
    "max_norm": _NORM,
    "sample_rate": _Rule(
        1e-12,
        1,
        "It is the probability with which a record is drawn. Pass expected_batch_size over a public data set size.",
    ),
    "expected_batch_size": _Rule(
        1e-9, 1e15, "Noised sums are divided by it. Pass a public number: sample_rate times a public data set size."
    ),
    "steps": _Rule(1, MOST_STEPS, "They fix the privacy budget. Plan at least one.", int),
    "count": _Rule(0, 1e6, "It is the number of analyses. Plan one for every few epochs.", int),
    "records_per_person": _Rule(
        1, 64, "It is the number of records that one person has at most, as a public fact. Leave it out otherwise.", int
    ),
    "records": _Rule(1, 1e12, "It is a public, if need be approximate, number of training records.", int),
    "epochs": _Rule(1, MOST_STEPS, "An epoch is records over batch size steps. Plan at least one.", int),
    "repeats": _Rule(1, 1e4, "It is the number of roundings that are averaged. Use 1, or a few.", int),
}


def checked_choice(name: str, value: Any, choices: Any, advice: str) -> Any:
    """Return a setting that is one of a few words.

    Raises:
      SettingError: it is another.
    """
    words = get_args(choices)
    if value not in words:
        given = name.split(".")[-1]
        raise SettingError(f"Expected {name} to be one of {', '.join(words)}; got {given}={value!r}. {advice}")
    return value


def checked(name: str, value: Any, prefix: str = "") -> float:
    """Return a setting as a Python number.

    Raises:
      SettingError: it is out of range, or not a number of the right type.
    """
    rule = RULES[name]
    scalar = value.item() if getattr(value, "ndim", None) == 0 else value  # a scalar of numpy or torch
    if isinstance(scalar, bool) or not isinstance(scalar, int | rule.number) or not rule.low <= scalar <= rule.high:
        kind = "to be a whole number in" if rule.number is int else "in"
        raise SettingError(
            f"Expected {prefix}{name} {kind} [{rule.low:g}, {rule.high:g}]; got {name}={value!r}. {rule.advice}"
        )
    return rule.number(scalar)


def checked_rate(records: Any, batch_size: Any) -> float:
    """Return the sample rate of batches of an expected size.

    Raises:
      SettingError: a number is out of range, or a batch is larger than the data set.
    """
    number, size = checked("records", records), checked("expected_batch_size", batch_size)
    if size > number:
        raise SettingError(
            f"Expected batch_size of at most {number}, the records; got batch_size={size:g}. A record is drawn with "
            f"probability batch size over records. Give a smaller one, as {max(1, round(number / 10))}."
        )
    return size / number
