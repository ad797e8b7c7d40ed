# SPDX-License-Identifier: Apache-2.0
"""Writes records as files of which a run reads the rows of one microbatch at a time (`packed.py`).

Each split becomes .npy files with one row for each record, in the order of the source: of images their pixels, of a
table its encoded rows, of texts their tokens one after another. The images of a folder are decoded into the file, so
that they never are in memory together; tables and texts are held in memory while they are packed.
"""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from dpquant.data.dataset import Dataset
from dpquant.data.folders import Store
from dpquant.data.held import Held
from dpquant.data.manifest import MANIFEST, TOKENIZER, Kind, Manifest, sha256_of
from dpquant.data.paging import PAGING, Paging
from dpquant.data.rows import Rows
from dpquant.data.split import Split
from dpquant.data.tokens import Texts
from dpquant.errors import DataError, SettingError


def pack(load: Callable[[Store], Dataset], out: Path) -> None:
    """Write a data set into a new folder, which is there completely or not at all.

    Args:
      load: gives the data set; the function that it gets stores the pixels of images in the folder.
      out: the folder.
    Raises:
      SettingError: out is there already, or cannot be made.
      DataError: the records cannot be read, or are packed already.
      OSError: the files cannot be written.
    Privacy: per example. The folder holds the records.
    """
    if out.exists() or not out.absolute().parent.is_dir():
        found = "which exists" if out.exists() else "in a folder that is not there"
        raise SettingError(
            f"Expected out to be a new folder in one that exists; got out={out}, {found}. Nothing is overwritten. Name "
            "another one."
        )
    with _new_folder(out) as draft:
        dataset = load(lambda part, shape: _pixels(draft / part / "pixels.npy", shape))
        kind, reading = _kind_of(dataset)
        for part, split in {"train": dataset.train, "test": dataset.test}.items():
            _write(draft / part, _arrays_of(split))
        if dataset.synthetic is not None:
            inputs, targets = default_collate(list(dataset.synthetic))
            named = inputs if isinstance(inputs, dict) else {"inputs": inputs}
            reading["synthetic"] = list(named)  # their order counts
            _write(draft / "synthetic", {**named, "targets": targets})
        if dataset.tokenizer is not None:
            (draft / TOKENIZER).write_bytes(dataset.tokenizer)
        seal(draft, dataset, kind, reading)


def seal(folder: Path, dataset: Dataset, kind: Kind, reading: dict[str, Any]) -> None:
    """Write the manifest of the files in a folder, flushed to disk after them.

    Args:
      folder: of the files.
      dataset: for the public facts in it.
      kind: of the records.
      reading: as of `Manifest`.
    """
    files = {}
    for path in sorted([*folder.rglob("*.npy"), *folder.glob(TOKENIZER)]):
        _flush(path)
        files[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    manifest = Manifest(
        kind=kind,
        files=files,
        num_classes=dataset.num_classes,
        input_shape=dataset.input_shape,
        class_names=dataset.class_names,
        task=dataset.task,
        categories=dataset.categories,
        vocabulary=dataset.vocabulary,
        padding=dataset.padding,
        facts=dataset.facts,
        reading=reading,
    )
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    _flush(folder / MANIFEST)


def _flush(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


@contextlib.contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """Context: yields a draft, readable by its owner alone, which becomes the folder; after an error it is removed."""
    draft = out.absolute().with_name(f"{out.name}.tmp-{os.getpid()}")
    draft.mkdir(mode=0o700)
    try:
        yield draft
        draft.replace(out)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def _kind_of(dataset: Dataset) -> tuple[Kind, dict[str, Any]]:
    """Return of what kind records are, and how their rows become inputs."""
    match dataset.train:
        case Split() as split:
            return "images", {"full_scale": split.full_scale, **split.normalisation.fields}
        case Rows():
            return "rows", {}
        case Texts() as texts:
            return "texts", {"buckets": texts.buckets, "padding": texts.padding}
        case _:
            raise DataError(
                f"Expected records that are not packed yet; got data={dataset.name}. Copy its folder, which is all."
            )


def _arrays_of(split: Held) -> dict[str, Tensor]:
    assert isinstance(split, Split | Rows | Texts)  # as `_kind_of` has found
    return split.arrays()


def _pixels(path: Path, shape: tuple[int, ...], paging: Paging = PAGING) -> Tensor:
    """Return uint16 zeros that lie in a new file, whose place on the disk is reserved.

    Otherwise a full disk would end the process by a signal, when a pixel is written.
    """
    path.parent.mkdir()
    pixels = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint16, shape=shape)
    with path.open("rb+", buffering=0) as file:
        file.seek(pixels.offset)
        paging.reserve(file.fileno(), path.stat().st_size)
    return torch.from_numpy(pixels)


def _write(folder: Path, arrays: dict[str, Tensor]) -> None:
    """Write arrays but those that lie in the folder already."""
    folder.mkdir(exist_ok=True)
    for name, values in arrays.items():
        path = folder / f"{name}.npy"
        if not path.exists():
            np.save(path, np.ascontiguousarray(values.numpy()))
