# SPDX-License-Identifier: Apache-2.0
"""The manifest of packed records: what its files are, and what is publicly known of the records. Loads no torch.

A record's id is its row in the files, so whoever has the same manifest has the same records in the same order.

Privacy: sizes and hashes of the files follow from the records, so the manifest is the operator's own, as the records
are. Its hash confirms a guess of the whole data set, so neither a run's record nor its ledger holds it; a run that
continues knows its records by a salted fingerprint (`runs/fingerprint.py`).
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self, get_args

from dpquant.data.sizes import PACKED_PREFIX
from dpquant.data.task import Task
from dpquant.errors import DataError

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"  # of texts; folders that earlier versions have packed lack it
FORMAT = 1
NOTE = "The operator's own, as the records are: sizes and hashes of files tell of the records. Not for release."

Kind = Literal["images", "rows", "texts"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """A manifest.

    Attributes:
      kind: of the records.
      files: {path within the folder: its bytes and its SHA-256}.
      num_classes, input_shape, class_names, task, categories, vocabulary, padding, facts: as of `Dataset`.
      reading: how rows become inputs: full scale, mean and std of images; buckets of texts; names of synthetic inputs.
      sha256: of the manifest's own file.
    """

    kind: Kind
    files: Mapping[str, Mapping[str, Any]]
    num_classes: int
    input_shape: tuple[int, ...]
    class_names: tuple[str, ...]
    task: Task
    categories: tuple[int, ...]
    vocabulary: int | None
    padding: int | None
    facts: Mapping[str, Any]
    reading: Mapping[str, Any]
    sha256: str = ""

    def to_json(self) -> str:
        """Return the content of the file."""
        fields = {name: value for name, value in dataclasses.asdict(self).items() if name != "sha256"}
        return json.dumps({"format": FORMAT, "note": NOTE, **fields}, indent=1) + "\n"

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the manifest of a folder. Opens no other file.

        Raises:
          DataError: there is none, or it cannot be read.
        """
        path = folder / MANIFEST
        if not path.is_file():
            raise DataError(
                f"Expected a folder of packed records; got {folder}, which holds no {MANIFEST}. Name what dpquant pack "
                "has written."
            )
        try:
            content = path.read_bytes()
            found = json.loads(content)
            if found.pop("format") != FORMAT or found.pop("note") is None or found["kind"] not in get_args(Kind):
                raise ValueError("another format")
            for name in ("input_shape", "class_names", "categories"):
                found[name] = tuple(found[name])
            found["task"] = Task(**found["task"])
            manifest = cls(**found, sha256=hashlib.sha256(content).hexdigest())
            manifest._check_names()
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"Expected {path} to be a manifest of format {FORMAT}; got something else ({type(error).__name__}). It "
                "is damaged, or another version of dpquant wrote it. Pack the records again."
            ) from error
        return manifest

    def _check_names(self) -> None:
        """Raise an error if a file lies outside of the folder or has no size."""
        for name, facts in self.files.items():
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise ValueError("a file outside of the folder")
            if not isinstance(facts["bytes"], int) or not isinstance(facts["sha256"], str):
                raise TypeError("no size or no hash")

    def check(self, folder: Path, *, verify: bool = False) -> None:
        """Check that all files are there in their sizes.

        Args:
          folder: of the files.
          verify: compare their hashes, too, which reads them whole.
        Raises:
          DataError: one is missing or changed.
        """
        for name, facts in self.files.items():
            path = folder / name
            problem = ""
            if not path.is_file():
                problem = "it is not there"
            elif path.stat().st_size != facts["bytes"]:
                problem = "it has another size"
            elif verify and sha256_of(path) != facts["sha256"]:
                problem = "its content has changed"
            if problem:
                raise DataError(
                    f"Expected {path} to be as its {MANIFEST} says; {problem}. Record ids would name other records. "
                    "Restore it, or pack the records again."
                )


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def kind_of(name: str) -> Kind | None:
    """Return the kind of the records that `packed:PATH` names; None if there are none, which loading them refuses."""
    try:
        return Manifest.read(folder_of(name)).kind
    except DataError:
        return None


def folder_of(name: str) -> Path:
    """Return the folder that `packed:PATH` names.

    Raises:
      DataError: it names none.
    """
    path = name.removeprefix(PACKED_PREFIX)
    if not path.strip():
        raise DataError(
            f"Expected a path in data={PACKED_PREFIX}PATH; got data={name}, without one. Name what dpquant pack has "
            "written."
        )
    return Path(path)
