# SPDX-License-Identifier: Apache-2.0
"""A salted fingerprint of a run's training records, by which a run that continues knows them again.

Of packed records it also holds the hash of their manifest, so that no file need be read whole.

Privacy: the file is for the operator only. It is in no checkpoint and no export: whoever has salt and hash can test
guesses of the records.
"""

import hashlib
import json
import os
import secrets
from pathlib import Path

from torch import Tensor

from dpquant.data.packed import Packed
from dpquant.engine.batches import leaves
from dpquant.errors import DataError
from dpquant.runs.record import write_whole
from dpquant.runs.timings import NOT_FOR_RELEASE
from dpquant.training.records import MapDataset

_COMPARED = 64  # records, evenly spaced


def write(path: Path, train_set: MapDataset) -> None:
    """Write the fingerprint of a data set, readable by the owner of the file alone.

    Raises:
      OSError: the file cannot be written.
    """
    salt = secrets.token_hex(16)
    write_whole(path, json.dumps({"note": NOT_FOR_RELEASE, "salt": salt, "sha256": _hash(train_set, salt)}) + "\n")
    os.chmod(path, 0o600)


def check(path: Path, train_set: MapDataset) -> None:
    """Check that a data set is the one whose fingerprint a file holds.

    Raises:
      DataError: it is another one, or the file cannot be read.
    """
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        same = saved["sha256"] == _hash(train_set, saved["salt"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"Expected {path} to tell which records the run was begun with; got {type(error).__name__}. Without it "
            "nobody knows whether they are still the same. Restore the file, or begin a new run."
        ) from error
    if not same:
        raise DataError(
            "Expected the training records with which the run was begun; got others. Its charges and its model belong "
            "to those. Restore the data set, or begin a new run."
        )


def _hash(train_set: MapDataset, salt: str) -> str:
    """Hash the number of records and some of the records; one that cannot be read counts as such."""
    found = hashlib.sha256(f"{salt} {len(train_set)}".encode())
    if isinstance(train_set, Packed):
        found.update(train_set.manifest.encode())
    for index in sorted({place * len(train_set) // _COMPARED for place in range(_COMPARED)}):
        try:
            parts = train_set[index]
        except Exception as error:  # a user's data set may raise anything
            parts = (type(error).__name__,)
        for _, part in leaves(parts):
            found.update(part.numpy().tobytes() if isinstance(part, Tensor) else repr(part).encode())
    return found.hexdigest()
