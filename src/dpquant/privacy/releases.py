# SPDX-License-Identifier: Apache-2.0
"""The releases of a run's test records, one line each, written before the records are used.

Test records belong to other people than training records, so they have a ledger of their own. Each line charges one
release by its epsilon, with delta = 0, and pure epsilons of the same people add up. Lines are chained by hashes like
those of `ledger.py`, and a torn last line charges nothing, since nothing had been released under it.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from dpquant.errors import LedgerError
from dpquant.privacy.disk import DISK, AppendFile, Disk
from dpquant.privacy.entries import NO_HASH, line_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Release:
    """One release.

    Attributes:
      what: was released.
      epsilon: that it cost the test records, at delta = 0.
      records: public number of test records, by which a count was divided.
    """

    what: str
    epsilon: float
    records: int


def charge(path: Path, release: Release, *, disk: Disk = DISK) -> list[Release]:
    """Write down a release that is about to happen, and return all of the file once it is on disk.

    Args:
      path: of the file, which is made if there is none.
      release: that is about to happen.
      disk: makes all calls of the operating system.
    Raises:
      LedgerError: the file is not as it was written, is in use, or cannot be written. No record may be used then.
    Privacy: charges the release.
    """
    file = AppendFile(path, disk, new=True)
    try:
        past, head, torn = _verified(path, data := file.read())
        if torn:
            file.cut(file.length - torn)
        elif data and not data.endswith(b"\n"):  # a whole last line that lacks its end of line
            file.append(b"\n")
        line, _ = line_of({"seq": len(past), **dataclasses.asdict(release), "previous": head})
        file.append(line + b"\n")
        file.keep_name()
    finally:
        file.close()
    return [*past, release]


def read(path: Path) -> list[Release]:
    """Return the releases that a file holds; none if there is no file.

    Raises:
      LedgerError: the file cannot be read, or a line is not as it was written.
    """
    if not path.exists():
        return []
    try:
        return _verified(path, path.read_bytes())[0]
    except OSError as error:
        raise LedgerError(f"Expected {path} to be readable; got {error.strerror or error}. Check the path.") from error


def together(releases: Sequence[Release]) -> float:
    """Return the epsilon of several releases of the same records, at delta = 0."""
    exact = sum((Fraction(one.epsilon) for one in releases), Fraction())
    nearest = float(exact)
    return nearest if nearest >= exact else math.nextafter(nearest, math.inf)


def _verified(path: Path, data: bytes) -> tuple[list[Release], str, int]:
    """Return the releases of complete lines, the hash of the last one, and the length of a torn line."""
    *lines, tail = data.split(b"\n")
    if b"}" in tail.rpartition(b'"hash": ')[2]:  # only its end of line is missing: it is verified
        lines.append(tail)
        tail = b""
    found, head = [], NO_HASH
    for seq, line in enumerate(lines):
        try:
            entry = json.loads(line)
            written, digest = line_of({name: value for name, value in entry.items() if name != "hash"})
            if line != written or entry["seq"] != seq or entry["previous"] != head:
                raise ValueError("a line that was changed")
            fields = {field.name: entry[field.name] for field in dataclasses.fields(Release)}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise LedgerError(
                f"Expected line {seq + 1} of {path} as it was written; got another. What was released from the test "
                "records is not known any more. Restore it from a copy."
            ) from error
        found.append(Release(**fields))
        head = digest
    return found, head, len(tail)
