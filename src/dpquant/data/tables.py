# SPDX-License-Identifier: Apache-2.0
"""Tables: rows of a CSV or Parquet file, encoded by a public spec (`spec.py`).

A row becomes float32 [columns]: first the numbers and dates, clamped to their public ranges and scaled to -1 .. 1,
then, for each column of them that may be missing, whether it is, then a code for each category, a whole number in
[0, size). No range, mean or list of categories is taken from the records.

A row of which a value or the label is not what the spec says stays a record: its inputs are zeros and its target is
UNREADABLE or NaN, so that its loss and its gradient are zero and it contributes nothing. No message names or counts
these rows. A test file of its own is not protected, so there the first such row is named by its place and column.

Importing this file loads no torch, which reading does.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpquant.data.columns import BROKEN, REPLACED, Columns, read_columns, records_of
from dpquant.data.held import is_for_test
from dpquant.data.spec import Category, Number, Spec
from dpquant.data.task import UNREADABLE
from dpquant.data.values import number_of
from dpquant.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

    from dpquant.data.rows import Rows

SUFFIXES = (".csv", ".parquet")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableSource:
    """Where a table lies, and what is publicly known of it.

    Attributes:
      path: of the file with the training records.
      label: name of the label's column.
      spec: of the columns.
      test: file of the test records; None: `test_share` of the table.
      test_share: of the records that are held out for test, by a hash of each one's content.
    """

    path: Path
    label: str
    spec: Spec
    test: Path | None
    test_share: float | None


def load_table(source: TableSource) -> "tuple[Rows, Rows]":
    """Read training and test records.

    Raises:
      DataError: a file cannot be read, its columns are not those of the spec, none of its records can be used, or a
        record of the test file cannot.
    Privacy: per example; which error is raised does not depend on a single training record.
    """
    columns = _columns(source, source.path)
    if source.test is not None:
        test = _rows(source, _columns(source, source.test), strict=True)
        return _usable(_rows(source, columns), source.path), test
    share = source.test_share or 0.0
    held_out = [is_for_test([text_of(value) for value in record], share) for record in records_of(columns)]
    train, test = (_chosen(columns, [one is chosen for one in held_out]) for chosen in (False, True))
    return tuple(_usable(_rows(source, part), source.path) for part in (train, test))  # pyright: ignore[reportReturnType]


def rows_of(path: Path, spec: Spec, label: str, *, strict: bool) -> "Rows":
    """Read a file of test records.

    Args:
      path: of the file.
      spec: of its columns.
      label: name of the label's column.
      strict: name the first record that cannot be used, as is right where test records are not protected. Without it
        such a record has the target UNREADABLE, and no error depends on a single record.
    Raises:
      DataError: the file cannot be read, its columns are not those of the spec, or a record cannot be used.
    """
    source = TableSource(path=path, label=label, spec=spec, test=None, test_share=None)
    return _rows(source, _columns(source, path), strict=strict)


def inputs_of(path: Path, spec: Spec) -> "tuple[Tensor, dict[int, str]]":
    """Encode the rows of a file for a prediction. They need no label, and other columns are left aside.

    Returns: float32 (N, columns), and {row that cannot be used: the column in which it is not as the spec says}.
    Raises:
      DataError: the file cannot be read, or lacks a column of the spec.
    """
    used = [name for name, column in spec.columns.items() if column is not None]
    return _encoded(spec, read_columns(path, used, SUFFIXES))


def _columns(source: TableSource, path: Path) -> Columns:
    """Read the columns that are used, after a check of their names."""
    names = read_columns(path, None, SUFFIXES)
    source.spec.check_columns(path, names.names, source.label)
    used = [name for name in names.names if name == source.label or source.spec.columns[name] is not None]
    return dataclasses.replace(names, values={name: names.values[name] for name in used})


def _chosen(columns: Columns, chosen: Sequence[bool]) -> Columns:
    values = {
        name: [value for value, takes in zip(column, chosen, strict=True) if takes]
        for name, column in columns.values.items()
    }
    return dataclasses.replace(columns, values=values)


def _usable(rows: "Rows", path: Path) -> "Rows":
    if not bool(rows.readable.any()):
        raise DataError(
            f"Expected {path} to hold at least one record, for training and for test each, that is as the spec says; "
            "it holds none. There is nothing to learn from. Compare kinds, ranges, categories and classes with the "
            "file."
        )
    return rows


def _rows(source: TableSource, columns: Columns, *, strict: bool = False) -> "Rows":
    """Encode records; with `strict` raise DataError for the first one that cannot be used."""
    import torch  # slow to import

    from dpquant.data.rows import Rows

    spec = source.spec
    inputs, unusable = _encoded(spec, columns)
    labels = [_target(value, spec) for value in columns.values[source.label]]
    for row, value in enumerate(labels):
        if value is None:
            unusable.setdefault(row, source.label)
    if unusable and strict:
        row = min(unusable)
        raise _unusable(columns, row, unusable[row])
    readable = torch.ones(len(columns), dtype=torch.bool)
    readable[list(unusable)] = False
    regression = spec.task.kind == "regression"
    nothing = math.nan if regression else UNREADABLE
    targets = torch.tensor(
        [nothing if value is None else value for value in labels],
        dtype=torch.float32 if regression else torch.int64,
    )
    inputs[~readable] = 0.0
    targets[~readable] = nothing
    return Rows(inputs, targets, readable)


def _encoded(spec: Spec, columns: Columns) -> "tuple[Tensor, dict[int, str]]":
    """Return inputs, and {row that cannot be used: its first column that is not as the spec says}."""
    import torch

    inputs = torch.zeros(len(columns), spec.width, dtype=torch.float32)
    unusable: dict[int, str] = {}

    def fill(place: int, name: str, encoded: list[float | None]) -> None:
        for row, value in enumerate(encoded):
            if value is None:
                unusable.setdefault(row, name)
        inputs[:, place] = torch.tensor([0.0 if value is None else value for value in encoded])

    indicators = [name for name, column in spec.numbers.items() if column.missing]
    for place, (name, column) in enumerate(spec.numbers.items()):
        fill(place, name, [_number(value, column) for value in columns.values[name]])
    for place, name in enumerate(indicators, len(spec.numbers)):
        missing = spec.numbers[name].missing
        inputs[:, place] = torch.tensor([float(text_of(value) in missing) for value in columns.values[name]])
    for place, (name, column) in enumerate(spec.categories.items(), len(spec.numbers) + len(indicators)):
        fill(place, name, _codes(columns.values[name], column))
    return inputs, unusable


def _unusable(columns: Columns, row: int, name: str) -> DataError:
    value = columns.values[name][row]
    what, remedy = f"another value in column {name}", "Mend the record, or the spec: a range, values, other, missing"
    if value is BROKEN:
        what, remedy = "too few or too many fields", columns.mending
    elif REPLACED in text_of(value):
        what = f"bytes that are not UTF-8 in column {name}"
        remedy = "Convert the file, as by iconv -f LATIN1 -t UTF-8"
    elif not text_of(value):
        what, remedy = f"an empty value in column {name}", 'Mend the record, or write missing = [""] into the spec'
    return DataError(
        f"Expected every record of {columns.path} to be as the spec says; got {what} of record {row + 1}. A test "
        f"record that cannot be used would count as an error of the model. {remedy}."
    )


def text_of(value: Any) -> str:
    """Return a value as text, without blanks around it; None is empty."""
    return "" if value is None or value is BROKEN else str(value).strip()


def _number(value: Any, column: Number) -> float | None:
    """Return a scaled number, 0 for one that is declared to be missing; None if it is none."""
    if value is BROKEN:
        return None
    text = text_of(value)
    if text in column.missing:
        return 0.0
    number = column.value_of(text)
    return None if number is None else column.scaled(number)


def _codes(values: Sequence[Any], column: Category) -> list[float | None]:
    """Return the codes of categories; None for one that has none."""
    codes = {text: float(code) for code, text in enumerate(column.values)}
    codes |= dict.fromkeys(column.missing, float(column.size - 1))
    otherwise = float(len(column.values)) if column.other else None

    def code(value: Any) -> float | None:
        text = text_of(value)
        return None if value is BROKEN or REPLACED in text else codes.get(text, otherwise)

    return [code(value) for value in values]


def _target(value: Any, spec: Spec) -> float | None:
    """Return a class or a scaled number; None if the value is neither."""
    if value is BROKEN:
        return None
    text = text_of(value)
    if spec.task.kind == "regression":
        number = number_of(text)
        return None if number is None else spec.task.scaled(number)
    return spec.classes.index(text) if text in spec.classes else None
