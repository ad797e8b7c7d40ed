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
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from dpquant.data.packed import Packed
from dpquant.engine.batches import leaves
from dpquant.errors import DataError
from dpquant.runs.record import write_whole
from dpquant.runs.timings import NOT_FOR_RELEASE
from dpquant.training.records import MapDataset

_COMPARED = 64  # records, evenly spaced


def salt_in(path: Path) -> str:
    """Return the salt of the file, or a new one if there is no file.

    Raises:
      DataError: the file cannot be read.
    """
    return _saved(path)["salt"] if path.exists() else secrets.token_hex(16)


def joined(hashes: Sequence[str]) -> str:
    """Return one hash for the records of several processes, whichever of them is which."""
    return hashlib.sha256(" ".join(sorted(hashes)).encode()).hexdigest()


def know(path: Path, salt: str, found: str) -> None:
    """Write the fingerprint with this salt, readable by the owner of the file alone; if there is a file, check it.

    Raises:
      DataError: the file holds another fingerprint, or cannot be read.
      OSError: the file cannot be written.
    """
    if not path.exists():
        write_whole(path, json.dumps({"note": NOT_FOR_RELEASE, "salt": salt, "sha256": found}) + "\n")
        os.chmod(path, 0o600)
    elif _saved(path)["sha256"] != found:
        raise DataError(
            "Expected the training records with which the run was begun; got others. Its charges and its model belong "
            "to those. Restore the data set, or begin a new run."
        )


def _saved(path: Path) -> dict[str, str]:
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        return {name: saved[name] for name in ("salt", "sha256")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"Expected {path} to tell which records the run was begun with; got {type(error).__name__}. Without it "
            "nobody knows whether they are still the same. Restore the file, or begin a new run."
        ) from error


def hash_of(train_set: MapDataset, salt: str) -> str:
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
