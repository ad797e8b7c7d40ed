# SPDX-License-Identifier: Apache-2.0
"""The public description of a table: what its columns hold and what is to be predicted. Loads no torch.

It is a TOML file that the data's owner writes from public knowledge (a code book, a form), because a range or a list of
categories that was read from the records would tell of them:

    task = "rare positives"        # or "classification", "regression"
    classes = ["no", "yes"]        # for rare positives the rare one is the last; for regression: range = [0, 100]
    prior = 0.01                   # public share of the rare class

    [columns.amount]
    kind = "number"
    range = [0, 10000]             # values outside are clamped
    scale = "log"                  # of 1 + value - low; "linear" if left out
    missing = ["", "NA"]           # texts that stand for a missing value; none if left out

    [columns.country]
    kind = "category"
    values = ["AT", "DE"]
    other = true                   # all other values have one code of their own; if false, they make a record unusable

    [columns.opened]
    kind = "date"                  # in ISO 8601, with or without a time; scaled by its range as a number is
    range = [2000-01-01, 2030-12-31]

    [columns.id]
    kind = "ignored"
"""

import dataclasses
import datetime
import math
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self, cast, get_args

from dpquant.data.task import Kind, Task
from dpquant.data.values import days_of, number_of
from dpquant.errors import DataError, did_you_mean

_KINDS = ("number", "date", "category", "ignored")
_KEYS = {
    "number": {"kind", "range", "scale", "missing"},
    "date": {"kind", "range", "missing"},
    "category": {"kind", "values", "other", "missing"},
    "ignored": {"kind"},
}
_SCALES = ("linear", "log")
_TASK_KEYS = {
    "classification": {"task", "classes", "columns", "draft"},
    "rare positives": {"task", "classes", "prior", "columns", "draft"},
    "regression": {"task", "range", "columns", "draft"},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Number:
    """A column of numbers, or of dates.

    Attributes:
      low, high: public range, of dates in days since 1970-01-01; values outside are clamped.
      log: whether 1 + value - low is scaled by its logarithm.
      missing: texts that stand for a missing value, which becomes the middle of the range and sets an indicator.
      date: whether values are dates.
    """

    low: float
    high: float
    log: bool = False
    missing: frozenset[str] = frozenset()
    date: bool = False

    def value_of(self, text: str) -> float | None:
        """Return what a text stands for, of a date its days since 1970-01-01; None if it is no such value."""
        return days_of(text) if self.date else number_of(text)

    def scaled(self, value: float) -> float:
        """Return a value, clamped to the range and scaled to -1 .. 1."""
        above = min(max(value, self.low), self.high) - self.low
        whole = self.high - self.low
        return 2 * (math.log1p(above) / math.log1p(whole) if self.log else above / whole) - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Category:
    """A column of categories.

    Attributes:
      values: public list; a value's code is its place.
      other: whether all other values have a code of their own.
      missing: texts that stand for a missing value, which has a code of its own.
    """

    values: tuple[str, ...]
    other: bool = True
    missing: frozenset[str] = frozenset()

    @property
    def size(self) -> int:
        """Return the number of codes."""
        return len(self.values) + self.other + bool(self.missing)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """The public description of a table.

    Attributes:
      task: what is to be predicted.
      classes: in the order of the targets; () for a regression.
      columns: {name: what it holds}, without the label; None: ignored.
      text: of the file.
    """

    task: Task
    classes: tuple[str, ...]
    columns: Mapping[str, Number | Category | None]
    text: str

    @property
    def numbers(self) -> dict[str, Number]:
        """Return the columns of numbers and of dates."""
        return {name: column for name, column in self.columns.items() if isinstance(column, Number)}

    @property
    def categories(self) -> dict[str, Category]:
        """Return the columns of categories."""
        return {name: column for name, column in self.columns.items() if isinstance(column, Category)}

    @property
    def width(self) -> int:
        """Return the number of inputs: numbers, their indicators of missing values, and a code for each category."""
        return len(self.numbers) + sum(bool(c.missing) for c in self.numbers.values()) + len(self.categories)

    @property
    def inputs(self) -> list[str]:
        """Return what the numbers of an input are, in their order."""
        indicators = [f"{name} is missing" for name, column in self.numbers.items() if column.missing]
        return [*self.numbers, *indicators, *self.categories]

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read the file of a spec.

        Raises:
          DataError: it cannot be read, is a draft, or has something that is unknown, missing or contradictory.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"Expected a readable TOML file in spec; got {path}: {error}. Check the path.") from error
        return cls.of_text(text, path)

    @classmethod
    def of_text(cls, text: str, path: Path) -> Self:
        """Return the spec that a text holds; `path` names it in errors, which are those of `read`."""
        try:
            found = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise DataError(f"Expected a readable TOML file in spec; got {path}: {error}. Mend it there.") from error
        return cls.parsed(found, text, path)

    @classmethod
    def parsed(cls, found: Mapping[str, Any], text: str, path: Path) -> Self:
        """Return the spec in a parsed file; errors as for `read`."""
        if found.get("draft"):
            raise DataError(
                f"Expected a spec of public knowledge; got {path}, a draft whose values were read from the records. "
                "They would tell of them. Replace them by what is known publicly, and delete the line draft = true."
            )
        kind = _one_of(f"task of {path}", found.get("task"), get_args(Kind))
        _known(str(path), found, _TASK_KEYS[kind])
        columns = found.get("columns")
        if not isinstance(columns, dict) or not columns:
            raise DataError(
                f"Expected {path} to describe columns, each in a table [columns.NAME]; it describes none. Write them, "
                "or let dpquant init draft them."
            )
        parsed = {name: _column(f"column {name} of {path}", one) for name, one in columns.items()}
        if all(column is None for column in parsed.values()):
            raise DataError(
                f"Expected a column in {path} that is not ignored; got none. There is nothing to learn from."
            )
        if kind == "regression":
            low, high = _range(f"range of {path}", found.get("range"))
            return cls(task=Task(kind=kind, low=low, high=high), classes=(), columns=parsed, text=text)
        classes = _texts(f"classes of {path}", found.get("classes"))
        prior = found.get("prior")
        if len(classes) < 2 or (kind == "rare positives" and len(classes) != 2):
            rule = "two classes, the rare one last," if kind == "rare positives" else "two classes or more"
            raise DataError(
                f"Expected {rule} in {path}; got {len(classes)}. There is nothing to tell apart. Write classes = "
                '["no", "yes"].'
            )
        if kind == "rare positives" and not (_is_number(prior) and 0 < float(prior or 0) < 1):
            raise DataError(
                f"Expected a prior in (0, 1) in {path}; got prior={prior!r}. It is the share of the rare class, a "
                "public number: that of the records is private. Write prior = 0.01."
            )
        return cls(task=Task(kind=cast("Kind", kind), prior=prior), classes=classes, columns=parsed, text=text)

    def check_columns(self, path: Path, names: Sequence[str], label: str) -> None:
        """Check that the spec describes each column of a file but the label, and no other.

        Raises: DataError: it does not.
        """
        if label not in names:
            raise DataError(
                f"Expected {path} to have the label_column {label}; its columns are {', '.join(names)}. "
                f"{did_you_mean(label, names)}Name one of them."
            )
        if label in self.columns:
            raise DataError(
                f"Expected no column {label} in the spec; got one. It is the label, which would be learned from "
                "itself. Leave it out."
            )
        for name in names:
            if name != label and name not in self.columns:
                raise DataError(
                    f"Expected the spec to describe column {name} of {path}; it does not. "
                    f'{did_you_mean(name, self.columns)}Add [columns.{name}], with kind = "ignored" if it is not used.'
                )
        for name, column in self.columns.items():
            if name not in names and column is not None:
                raise DataError(
                    f"Expected {path} to have column {name}, which the spec describes; its columns are "
                    f"{', '.join(names)}. {did_you_mean(name, names)}Take it out, or name it as in the file."
                )


def _column(what: str, found: Any) -> Number | Category | None:
    if not isinstance(found, dict):
        raise DataError(f'Expected {what} to be a table with a kind; got {found!r}. Write kind = "number".')
    kind = _one_of(f"kind of {what}", found.get("kind"), _KINDS)
    _known(what, found, _KEYS[kind])
    missing = frozenset(_texts(f"missing of {what}", found.get("missing", []))) if kind != "ignored" else frozenset()
    match kind:
        case "number":
            low, high = _range(f"range of {what}", found.get("range"))
            log = _one_of(f"scale of {what}", found.get("scale", "linear"), _SCALES) == "log"
            return Number(low=low, high=high, log=log, missing=missing)
        case "date":
            low, high = _dates(f"range of {what}", found.get("range"))
            return Number(low=low, high=high, missing=missing, date=True)
        case "category":
            other = found.get("other", True)
            if not isinstance(other, bool):
                raise DataError(f"Expected other of {what} to be true or false; got {other!r}. Write other = true.")
            values = _texts(f"values of {what}", found.get("values"))
            if not values:
                raise DataError(
                    f"Expected values of {what} to name at least one category; got none. All would be the same. List "
                    "the values that are publicly known."
                )
            if both := missing & set(values):
                raise DataError(
                    f"Expected values of {what} that differ from its missing ones; got {min(both)!r} in both. It would "
                    "have two codes. Take it out of one."
                )
            return Category(values=values, other=other, missing=missing)
    return None


def _one_of(what: str, value: Any, allowed: Sequence[str]) -> str:
    if value not in allowed:
        raise DataError(
            f"Expected {what} to be one of {', '.join(allowed)}; got {value!r}. {did_you_mean(value, allowed)}It says "
            "how values are read. Write one of them."
        )
    return value


def _known(what: str, found: Mapping[str, Any], known: set[str]) -> None:
    for name in found:
        if name not in known:
            raise DataError(
                f"Expected {', '.join(sorted(known))} in {what}; got {name}. It would be ignored. "
                f"{did_you_mean(name, known)}Take it out."
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _range(what: str, value: Any) -> tuple[float, float]:
    if not (
        isinstance(value, list)
        and len(value) == 2
        and all(map(_is_number, value))
        and 0 < value[1] - value[0] < math.inf
    ):
        raise DataError(
            f"Expected {what} to be [low, high] with low < high; got {value!r}. Values are clamped to it and scaled by "
            "it, so it has to be public: those of the records are not. Write range = [0, 100]."
        )
    return float(value[0]), float(value[1])


def _dates(what: str, value: Any) -> tuple[float, float]:
    """Return a range of dates, of TOML's own or of texts, in days since 1970-01-01."""
    ends = value if isinstance(value, list) and all(isinstance(v, str | datetime.date) for v in value) else []
    match [days_of(str(end)) for end in ends]:
        case [float(low), float(high)] if low < high:
            return low, high
    raise DataError(
        f"Expected {what} to be [first, last], two dates in ISO 8601; got {value!r}. Dates are clamped to it and "
        "scaled by it, so it has to be public: those of the records are not. Write range = [2000-01-01, 2030-12-31]."
    )


def _texts(what: str, value: Any) -> tuple[str, ...]:
    """Return a list's texts; whole numbers count as their digits, as a CSV file has them."""
    fits = isinstance(value, list) and all(isinstance(v, str | int) and not isinstance(v, bool) for v in value)
    if not fits:
        raise DataError(f'Expected {what} to be a list of texts; got {value!r}. Write it as ["a", "b"].')
    texts = tuple(str(one).strip() for one in value)
    if twice := [one for one in texts if texts.count(one) > 1]:
        raise DataError(f"Expected {what} to differ; got {twice[0]!r} twice. It would have two codes. Take one out.")
    return texts
