# SPDX-License-Identifier: Apache-2.0
"""Reads the columns of a file of records: CSV, TSV, JSON lines or Parquet.

A row that has not as many fields as the header, and a line that is no JSON object, is still a record: all its values
are `BROKEN`. Bytes that are not UTF-8 become U+FFFD, the replacement character, in the value that has them. So no
record decides whether another one is read. What a file must have as a whole, a header, the columns, closed quotes, is
not a record's: if it is missing, one error says so.

Messages name files and columns, and never a value. Loads no torch.
"""

import collections
import csv
import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dpquant.errors import DataError, did_you_mean


class _Broken:
    """Type of the value of a record that cannot be read."""


BROKEN = _Broken()
REPLACED = "\N{REPLACEMENT CHARACTER}"
_SEPARATORS = (",", ";", "\t", "|")
_LONGEST_FIELD = 2**31 - 1  # of a CSV file; Python's own limit is 131,072 characters


@dataclasses.dataclass(frozen=True, kw_only=True)
class Columns:
    """Some columns of a file.

    Attributes:
      path: of the file.
      names: of all columns in the file, in its order; for JSON lines those that were asked for.
      values: {column: its values in the order of the records}: text, numbers, None or BROKEN.
      first_line: number of the first record's line in the file, 1 for a file without a header.
    """

    path: Path
    names: tuple[str, ...]
    values: dict[str, list[Any]]
    first_line: int

    @property
    def mending(self) -> str:
        """What to do about a record of a file of this kind that cannot be read."""
        if self.path.suffix.lower() == ".jsonl":
            return "Write each record as one JSON object on one line, with these keys"
        return "Give each record as many fields as the header, in quotes where a text has separators or line ends"

    def __len__(self) -> int:
        return len(next(iter(self.values.values())))


def read_columns(path: Path, wanted: Sequence[str] | None, suffixes: Sequence[str]) -> Columns:
    """Read columns of a file.

    Args:
      path: of the file; its suffix names its kind.
      wanted: names of columns; None: all.
      suffixes: kinds that are accepted here, of `.csv`, `.tsv`, `.jsonl` and `.parquet`.
    Raises:
      DataError: the file is missing or of another kind, it cannot be read as a whole, it has no record, or a column is
        missing.
    Privacy: per example, but for the number of records and for what makes a file one of its kind.
    """
    check_file(path, suffixes)
    try:
        columns = _READERS[path.suffix.lower()](path, wanted)
    except DataError:
        raise
    except UnicodeDecodeError as error:
        raise DataError(
            f"Expected {path} to be UTF-8 text; its first line is not. Names of columns could not be read. Convert it, "
            "as by iconv -t UTF-8."
        ) from error
    except (OSError, csv.Error, ValueError) as error:
        raise DataError(
            f"Expected {path} to be a whole file of records; got {type(error).__name__}. It is damaged or of another "
            "kind. Write it again."
        ) from None  # its text may quote a record
    if len(columns) == 0:
        raise DataError(f"Expected {path} to hold at least one record; it holds none. There is nothing to learn from.")
    return columns


def check_file(path: Path, suffixes: Sequence[str]) -> None:
    """Check that a file is there and of one of these kinds, by its name. It is not opened.

    Raises:
      DataError: it is not.
    """
    if path.suffix.lower() not in suffixes:
        raise DataError(
            f"Expected a file that ends in {', '.join(suffixes)}; got {path}. The end of its name says how it is read. "
            "Convert it, or rename it."
        )
    if not path.is_file():
        found = "a folder" if path.is_dir() else "not there"
        raise DataError(f"Expected {path} to be a file of records; it is {found}. Check the path.")


def check_names(path: Path, names: Sequence[str], wanted: Sequence[str]) -> None:
    """Check that a file has some columns.

    Raises: DataError: a name is missing, or is there twice.
    """
    for name in wanted:
        if name not in names:
            raise DataError(
                f"Expected {path} to have a column {name}; its columns are {', '.join(names)}. "
                f"{did_you_mean(name, names)}Name one of them."
            )
    if twice := [name for name in names if names.count(name) > 1]:
        raise DataError(
            f"Expected the columns of {path} to have names of their own; got {twice[0]} twice. It would not be known "
            "which is meant. Rename one."
        )


def _check_encoding(path: Path, start: bytes) -> None:
    """Refuse a file that begins as UTF-16 or UTF-32 does, which text in UTF-8 never does."""
    if b"\0" in start or start.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(
            f"Expected {path} to be UTF-8 text; it begins as UTF-16 does, with zero bytes or its mark. Names and texts "
            "could not be read. Convert it, as by iconv -f UTF-16 -t UTF-8."
        )


def _separated(path: Path, wanted: Sequence[str] | None, separator: str) -> Columns:
    with path.open("rb") as raw:
        header = raw.readline(_LONGEST_FIELD).split(b"\r")[0]
    _check_encoding(path, header)  # which no record decides
    header.decode()
    csv.field_size_limit(_LONGEST_FIELD)
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        rows = csv.reader(file, delimiter=separator, strict=True)
        names = [name.strip() for name in next(rows, [])]
        if not any(names):
            raise DataError(
                f"Expected {path} to begin with a line of column names; it begins with none. Add a header, public "
                "names with separators between them."
            )
        if len(names) == 1 and (other := next((one for one in _SEPARATORS if one in names[0]), None)):
            raise DataError(
                f"Expected the columns of {path} to have {separator!r} between them, as the end of its name says; got "
                f"a header with {other!r}. It would be one column. Write it with {separator!r}, or rename it."
            )
        wanted = names if wanted is None else wanted
        check_names(path, names, wanted)
        places = {name: names.index(name) for name in wanted}
        values: dict[str, list[Any]] = {name: [] for name in wanted}
        for row in rows:
            if not row:  # a blank line
                continue
            whole = len(row) == len(names)
            for name, place in places.items():
                values[name].append(row[place] if whole else BROKEN)
    return Columns(path=path, names=tuple(names), values=values, first_line=2)


def _json_lines(path: Path, wanted: Sequence[str] | None) -> Columns:
    names = tuple(wanted or ())
    values: dict[str, list[Any]] = {name: [] for name in names}
    known: collections.Counter[str] = collections.Counter()
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        for line in file:
            if not line.strip():
                continue
            record = _parsed(line)
            known.update(record.keys())
            for name in names:
                values[name].append(record.get(name, BROKEN))
    lines = len(values[names[0]]) if names else 0
    if lines and not known:
        with path.open("rb") as raw:
            _check_encoding(path, raw.readline(_LONGEST_FIELD))
        raise DataError(
            f"Expected each line of {path} to be a JSON object; none is. The end of its name says that it holds JSON "
            "lines. Write one object on each line, or name the file as what it is."
        )
    for name in names:
        if known and name not in known:
            usual = [key for key, count in known.items() if 2 * count > lines]  # of the file, not of a record
            raise DataError(
                f"Expected lines of {path} to have the key {name}; none has. There is nothing to learn from. "
                f"{did_you_mean(name, usual)}Name a key that its objects have."
            )
    return Columns(path=path, names=names, values=values, first_line=1)


def _parsed(line: str) -> dict[str, Any]:
    """Return the object of a line; an empty one where it is none."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _parquet(path: Path, wanted: Sequence[str] | None) -> Columns:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(
            f"Expected pyarrow, to read {path}; it is not installed. Install it by pip install 'dpquant[arrow]', or "
            "write the records as CSV."
        ) from error
    try:
        file = parquet.ParquetFile(path)
        names = tuple(file.schema_arrow.names)
        wanted = names if wanted is None else wanted
        check_names(path, names, wanted)
        table = file.read(columns=list(wanted))
        values = {name: _values(table.column(name)) for name in wanted}
    except pyarrow.ArrowException as error:
        raise ValueError(str(error)) from error
    return Columns(path=path, names=names, values=values, first_line=1)


def _values(column: Any) -> list[Any]:
    """Return the values of a column of Parquet. Bytes that are not UTF-8 change their own value alone."""
    import pyarrow

    if pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type):
        raw = column.cast(pyarrow.large_binary()).to_pylist()
        return [None if value is None else value.decode(errors="replace") for value in raw]
    return column.to_pylist()


_READERS: dict[str, Callable[[Path, Sequence[str] | None], Columns]] = {
    ".csv": lambda path, wanted: _separated(path, wanted, ","),
    ".tsv": lambda path, wanted: _separated(path, wanted, "\t"),
    ".jsonl": _json_lines,
    ".parquet": _parquet,
}


def records_of(columns: Columns) -> Iterator[tuple[Any, ...]]:
    """Yield the values of each record, in the order of the columns."""
    yield from zip(*columns.values.values(), strict=True)
