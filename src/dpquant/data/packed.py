# SPDX-License-Identifier: Apache-2.0
"""Packed records: a data set in files, of which a run reads the rows of one microbatch at a time.

A batch is made as the source makes it, of those rows in memory, so a run on packed records is the run on their source,
bit for bit. Targets and marks of broken records stay in memory: 9 bytes a record; of texts the buckets, too.
"""

import contextlib
import functools
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.utils.data
from torch import Tensor

from dpquant.data.dataset import Dataset
from dpquant.data.form import Form
from dpquant.data.held import Held
from dpquant.data.manifest import TOKENIZER, Manifest
from dpquant.data.normalisation import Normalisation
from dpquant.data.row_file import RowFile
from dpquant.data.rows import Rows
from dpquant.data.split import Split
from dpquant.data.task import UNREADABLE
from dpquant.data.tokens import Texts
from dpquant.errors import DataError

Files = Mapping[str, RowFile]


class Packed(torch.utils.data.Dataset[tuple[Any, Tensor]]):
    """The training or the test records of a packed data set: map-style, read when asked for.

    Attributes:
      targets, readable: as of `Held`.
      manifest: SHA-256 of the manifest. Privacy: not for release.
    Privacy: per example, reads no other record.
    """

    def __init__(self, files: Files, targets: Tensor, readable: Tensor, manifest: str) -> None:
        self.files, self.targets, self.readable, self.manifest = files, targets, readable, manifest

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, Tensor]:
        return self._some(torch.tensor([range(len(self))[index]]))[0]

    def dpquant_batch(self, record_ids: Tensor) -> tuple[Any, Tensor]:
        """Return `batch(record_ids)`: the method of data sets that collate themselves, see `make_private`."""
        return self.batch(record_ids)

    def batch(self, indices: Tensor) -> tuple[Any, Tensor]:
        """Return inputs and targets of the records with these ids, int64 (B,), as the source gives them.

        Raises:
          DataError: a file cannot be read any more.
        """
        return self._some(indices).batch(torch.arange(len(indices)))

    @abstractmethod
    def _some(self, ids: Tensor) -> Held:
        """Return records, read into memory, as the source holds them."""


class PackedImages(Packed):
    """Packed records of images."""

    def __init__(self, reading: Mapping[str, Any], *of: Any) -> None:
        super().__init__(*of)
        self.full_scale, self.normalisation = reading["full_scale"], Normalisation.of(reading["mean"], reading["std"])

    def _some(self, ids: Tensor) -> Split:
        pixels = self.files["pixels"].rows(ids)
        some = Split(pixels, self.targets[ids], readable=self.readable[ids], full_scale=self.full_scale)
        some.normalisation = self.normalisation
        return some


class PackedRows(Packed):
    """Packed records of a table."""

    def _some(self, ids: Tensor) -> Rows:
        return Rows(self.files["inputs"].rows(ids), self.targets[ids], self.readable[ids])


class PackedTexts(Packed):
    """Packed records of texts: tokens without padding."""

    def __init__(self, reading: Mapping[str, Any], *of: Any) -> None:
        super().__init__(*of)
        self._lengths, self._padding = reading["buckets"], reading["padding"]
        starts = _whole(self.files["starts"])
        self._buckets = torch.from_numpy(np.searchsorted(self._lengths, np.diff(starts.numpy())).astype(np.int16))

    @property
    def dpquant_lengths(self) -> Sequence[int]:
        """The lengths of the buckets, ascending; public."""
        return self._lengths

    def dpquant_groups(self, record_ids: Tensor) -> Tensor:
        """Return the bucket of each record, int64 (B,): records of a bucket have equal shapes. Privacy: per example."""
        return self._buckets[record_ids].long()

    def _some(self, ids: Tensor) -> Texts:
        begins, ends = (self.files["starts"].rows(rows) for rows in (ids, ids + 1))
        kinds = self.files.get("kinds")
        return Texts(
            self.files["tokens"].runs(begins, ends).numpy(),
            None if kinds is None else kinds.runs(begins, ends).numpy(),
            np.concatenate([[0], np.cumsum((ends - begins).numpy())]),
            self.targets[ids],
            buckets=self._lengths,
            padding=self._padding,
        )


def packed_form(folder: Path) -> Form:
    """Return the form of packed records. Opens no file of records.

    Raises:
      DataError: the folder holds no packed records.
    """
    manifest = Manifest.read(folder)
    manifest.check(folder)
    with _files_as_packed(manifest, folder):
        return _form(manifest, folder)


def _form(manifest: Manifest, folder: Path) -> Form:
    return Form(
        num_classes=manifest.num_classes,
        input_shape=manifest.input_shape,
        class_names=manifest.class_names,
        task=manifest.task,
        categories=manifest.categories,
        lengths=tuple(manifest.reading.get("buckets", ())),
        vocabulary=manifest.vocabulary,
        padding=manifest.padding,
        tokenizer=(folder / TOKENIZER).read_bytes() if TOKENIZER in manifest.files else None,
        synthetic=_examples(_files(manifest, folder, "synthetic"), manifest.reading.get("synthetic", ())),
    )


@contextlib.contextmanager
def _files_as_packed(manifest: Manifest, folder: Path) -> Iterator[None]:
    """Context: whatever is missing or of another kind in the files is one error."""
    try:
        yield
    except DataError:  # which is a ValueError
        raise
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise DataError(
            f"Expected the files that packed {manifest.kind} have; got others in {folder}. Pack the records again."
        ) from error


def load_packed(name: str, folder: Path) -> Dataset:
    """Open packed records; only targets and marks of broken records are read.

    Args:
      name: of the data set.
      folder: with the manifest.
    Raises:
      DataError: it holds no packed records, or a file of them is missing or has another size.
    """
    manifest = Manifest.read(folder)
    manifest.check(folder)
    with _files_as_packed(manifest, folder):
        train, test = (_split(manifest, _files(manifest, folder, part)) for part in ("train", "test"))
        form = _form(manifest, folder)
    return Dataset(
        **vars(form),
        name=name,
        train=train,
        test=test,
        public_size=None,
        facts=manifest.facts,
    )


def _files(manifest: Manifest, folder: Path, part: str) -> dict[str, RowFile]:
    """Return the arrays of a part of the records, by name."""
    paths = (folder / name for name in manifest.files if name.startswith(f"{part}/"))
    return {path.stem: RowFile(path) for path in paths}


def _split(manifest: Manifest, files: Files) -> Packed:
    targets = _whole(files["targets"])
    readable = _whole(files["readable"]) if "readable" in files else targets != UNREADABLE
    kinds = {
        "images": functools.partial(PackedImages, manifest.reading),
        "rows": PackedRows,
        "texts": functools.partial(PackedTexts, manifest.reading),
    }
    return kinds[manifest.kind](files, targets, readable, manifest.sha256)


def _examples(files: Files, names: Sequence[str]) -> list[Any] | None:
    """Return the synthetic records that lie beside the others, with inputs of these names; None: there are none."""
    if not names:
        return None
    inputs, targets = {name: _whole(files[name]) for name in names}, _whole(files["targets"])
    named = [{name: values[row] for name, values in inputs.items()} for row in range(len(targets))]
    plain = list(names) == ["inputs"]
    return [(one["inputs"] if plain else one, target) for one, target in zip(named, targets, strict=True)]


def _whole(file: RowFile) -> Tensor:
    return file.runs(torch.tensor([0]), torch.tensor([len(file)]))
