# SPDX-License-Identifier: Apache-2.0
"""Drafts the spec of a table from its file, for the owner to replace what was read by what is publicly known.

Privacy: not private. The draft says of every value that it was read from the records, and no run accepts it before the
owner has taken the line `draft = true` out. Loads no torch.
"""

import json
import math
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dpquant.data.columns import BROKEN, Columns, read_columns
from dpquant.data.tables import SUFFIXES, text_of
from dpquant.data.values import days_of, number_of
from dpquant.errors import DataError, did_you_mean

_MOST_CATEGORIES = 30  # different values of a column that is taken for one of categories
_FEWEST_DISTINCT = 20  # records of which each has a value of its own, until a column is taken for an identifier
_RARE_BELOW = 0.2  # share of the rarer of two classes, until it is taken for a rare positive
_NEAR_LOW_BELOW = 0.2  # place of the median in the range, below which a logarithm spreads most values out
_OF_IDENTIFIERS = {"id", "uuid", "guid", "email", "phone", "ssn", "iban", "surname", "username"}
_MISSING = {"na", "n/a", "nan", "null", "none", "nil", "-", "?", "."}  # among numbers and dates; in lower case
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")  # of a name: customerID and customer_id have two
_IGNORED_ABOVE = 0.5  # share of different texts among the records: names and identifiers


def drafted(path: Path, label: str) -> str:
    """Return the draft of a spec, as TOML.

    Args:
      path: of the table.
      label: name of the label's column.
    Raises:
      DataError: the table cannot be read, or has no such column.
    """
    columns = read_columns(path, None, SUFFIXES)
    if label not in columns.names:
        raise DataError(
            f"Expected {path} to have the label_column {label}; its columns are {', '.join(columns.names)}. "
            f"{did_you_mean(label, columns.names)}Name one of them."
        )
    return "\n".join(_lines(columns, label)) + "\n"


def _lines(columns: Columns, label: str) -> Iterator[str]:
    yield f"# Draft of a spec for {columns.path.name}. NOT PRIVATE: it names values of the records."
    yield "# Taken from the header: the names of the columns. Taken from the records: everything marked with (read)."
    yield "# Replace what is marked by what is publicly known, as from a code book. Then delete the next line."
    yield "# A range need not hold every value: those outside are clamped. One far wider than most values hides them."
    yield "draft = true"
    labels = _present(columns.values[label])
    numbers = _numbers(labels)
    classes = sorted(set(labels))
    if numbers is not None and len(classes) > _MOST_CATEGORIES:
        yield 'task = "regression"'
        yield f"range = {_range(numbers)}  # (read)"
    else:
        if len(classes) < 2:
            yield "# The label has a single value in this file. There is nothing to tell apart before you name another."
        rare = min(classes, key=labels.count, default="")
        share = labels.count(rare) / max(len(labels), 1)
        if len(classes) == 2 and share < _RARE_BELOW:
            classes = [*(one for one in classes if one != rare), rare]
            yield 'task = "rare positives"  # (read) one class is rare; or "classification", without prior'
            yield f"classes = {_list(classes)}  # (read) the rare one last"
            yield f"prior = {share:.2g}  # (read) share of the rare one"
        else:
            yield 'task = "classification"  # or "rare positives", with prior = the public share of the last class'
            yield f"classes = {_list(classes)}  # (read)"
    for name in columns.names:
        if name != label:
            yield ""
            yield f"[columns.{json.dumps(name)}]"
            yield from _column(name, columns.values[name])


def _column(name: str, values: Sequence[Any]) -> Iterator[str]:
    """Yield the lines of a column. Of one that looks like an identifier no value is named but a number's range."""
    texts = _present(values)
    why = _identifies(name, texts)
    if not why:
        yield from _described(values)
        return
    yield f'kind = "ignored"  # (read) looks like an identifier, {why}: it would tell who a record is'
    if _numbers(texts) is not None:
        yield "# If it is a number to learn from, write instead:"
        yield from (f"# {line}" for line in _described(values))


def _identifies(name: str, texts: Sequence[str]) -> str:
    """Return why a column is taken for an identifier; "" if it is not."""
    words = {word.lower() for word in _WORD.findall(name.replace("-", ""))}
    if words & _OF_IDENTIFIERS or name.lower() == "name":
        return "by its name"
    whole = all(text.lstrip("-").isdigit() for text in texts)
    names = _numbers(texts) is None and _numbers(texts, days_of) is None
    if len(texts) >= _FEWEST_DISTINCT and len(set(texts)) == len(texts) and (whole or names):
        return "as every record has a value of its own"
    return ""


def _described(values: Sequence[Any]) -> Iterator[str]:
    texts = _present(values)
    said = [text for text in texts if text.lower() not in _MISSING]
    dates = _numbers(said, days_of)
    if (numbers := _numbers(said)) is not None:
        yield 'kind = "number"  # (read) every value that is there is one'
        yield f"range = {_range(numbers)}  # (read) smallest and largest value"
        low, high = min(numbers), max(numbers)
        if statistics.median(numbers) - low < _NEAR_LOW_BELOW * (high - low):
            yield 'scale = "log"  # (read) most values are near the smallest'
    elif dates is not None:
        first, last = said[dates.index(min(dates))], said[dates.index(max(dates))]
        yield 'kind = "date"  # (read) every value that is there is one'
        yield f"range = {_list([first, last])}  # (read) first and last"
    else:
        said, different = texts, sorted(set(texts))
        if len(different) > max(_MOST_CATEGORIES, _IGNORED_ABOVE * len(texts)):
            yield 'kind = "ignored"  # (read) nearly every record has a value of its own'
            return
        yield 'kind = "category"'
        yield f"values = {_list(different)}  # (read)"
        yield "other = true"
    missing = ([""] if len(texts) < len(values) else []) + sorted(set(texts) - set(said))
    if missing:
        yield f"missing = {_list(missing)}  # (read) some values are {'empty' if missing == [''] else 'these'}"


def _present(values: Sequence[Any]) -> list[str]:
    """Return the texts of the values that are there."""
    texts = (text_of(value) for value in values if value is not BROKEN)
    return [text for text in texts if text]


def _numbers(texts: Sequence[str], read: Callable[[str], float | None] = number_of) -> list[float] | None:
    """Return what texts stand for, numbers or dates; None if there are none, or one is none."""
    found = [read(text) for text in texts]
    numbers = [one for one in found if one is not None]
    return numbers if numbers and len(numbers) == len(found) else None


def _range(numbers: Sequence[float]) -> str:
    low, high = min(numbers), max(numbers)
    return f"[{low!r}, {high if high > low else math.nextafter(low, math.inf)!r}]"


def _list(texts: Sequence[str]) -> str:
    return json.dumps(list(texts), ensure_ascii=False)
