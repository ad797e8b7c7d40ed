# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: folders that hold a state of training, each written completely or not at all, without pickle.

    step-00000120/
      MODEL.safetensors    the tensors of each part of the state (model, optimizer, a scheduler, ...)
      state.json           everything else of each part: numbers, text, lists, dictionaries; tensors by name
      MANIFEST.json        facts, and the size and SHA-256 of every other file; its own SHA-256; written last

A folder is written under a temporary name, flushed to disk file by file, and then renamed. It is a checkpoint if and
only if its manifest agrees with its files. Whatever a crash leaves behind is therefore no checkpoint, and neither is a
folder in which a bit has changed.

Source of the order of writes: Pillai et al. 2014, "All file systems are not created equal", OSDI.
Privacy: post-processing, if the parts are: parameters and an optimizer's state are functions of noised gradients.
"""

import dataclasses
import hashlib
import json
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from dpquant.errors import DataError, SettingError, expect
from dpquant.privacy.disk import DISK

_FORMAT = 1
_MANIFEST, _STATE = "MANIFEST.json", "state.json"
_NEVER_READ = "It is not continued from. Nothing in it can be trusted."


class Disk:
    """What a checkpoint does to a file system, one method for each operation. Tests pass one that fails or stops."""

    def make_folder(self, folder: Path) -> None:
        folder.mkdir(parents=True)

    def write(self, path: Path, content: bytes) -> None:
        path.write_bytes(content)

    def flush(self, path: Path) -> None:
        """Return when the file's content, or the folder's list of names, is on disk."""
        if path.is_dir():
            DISK.sync_folder(path)
            return
        with path.open("rb+") as file:  # Windows flushes nothing that was opened for reading alone
            DISK.sync(file.fileno())

    def rename(self, old: Path, new: Path) -> None:
        old.rename(new)

    def remove(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What a checkpoint holds.

    Attributes:
      parts: {name: state}: dictionaries, lists and tuples of tensors, numbers, text and None, as they were saved.
      facts: what describes the checkpoint, of JSON's types.
    """

    parts: Mapping[str, Any]
    facts: Mapping[str, Any]

    def write(self, folder: Path, disk: Disk | None = None) -> None:
        """Write the folder, which must not exist, completely or not at all.

        Raises:
          SettingError: a part holds an object that is none of the types above.
          OSError: the folder cannot be written. Nothing of it is left, unless that fails, too.
        """
        expect("path", folder, Path, "a pathlib.Path", "Give pathlib.Path('checkpoint')")
        disk = disk or Disk()
        files = _files_of(self.parts)
        sizes = {name: _seal(content) for name, content in files.items()}
        manifest = {"format": _FORMAT, "facts": dict(self.facts), "files": sizes}
        files[_MANIFEST] = _json({**manifest, "sha256": _hash(_json(manifest))})  # the last to be written
        draft = folder.with_name(f"{folder.name}.tmp-{uuid.uuid4().hex[:8]}")
        try:
            disk.make_folder(draft)
            for name, content in files.items():
                disk.write(draft / name, content)
                disk.flush(draft / name)
            disk.flush(draft)
            disk.rename(draft, folder)
            disk.flush(folder.parent)
        except BaseException:
            disk.remove(draft)
            raise

    @classmethod
    def read(cls, folder: Path) -> "Checkpoint":
        """Return the checkpoint in a folder, on the CPU.

        Raises:
          DataError: the folder is no checkpoint, or not as it was written.
        """
        expect("path", folder, Path, "a pathlib.Path", "Give pathlib.Path('checkpoint')")
        manifest = _manifest(folder)
        files: dict[str, bytes] = {}
        for name, seal in manifest["files"].items():
            path = folder / name
            if Path(name).name != name or not path.is_file():
                raise DataError(f"Expected {folder} to hold {name}; got no such file. {_NEVER_READ}")
            files[name] = _contents(path)
            if _seal(files[name]) != seal:
                raise DataError(f"Expected {path} as it was written; got another size or SHA-256. {_NEVER_READ}")
        try:
            trees = json.loads(files.pop(_STATE))
            tensors = {name.removesuffix(".safetensors"): load(content) for name, content in files.items()}
            parts = {name: _decoded(tree, tensors.get(name, {})) for name, tree in trees.items()}
        except (ValueError, KeyError, TypeError, SafetensorError) as error:
            raise DataError(
                f"Expected {folder} to hold a state; got a {type(error).__name__}: {error}. {_NEVER_READ}"
            ) from error
        return cls(parts=parts, facts=manifest["facts"])


def newest(home: Path) -> tuple[Path | None, dict[str, str]]:
    """Return the last of a folder's checkpoints, by name, that is as it was written, and why later ones are not.

    Returns: its folder, None if there is none; {name of a later folder: what is wrong with it}.
    """
    refused: dict[str, str] = {}
    for folder in sorted(_candidates(home), reverse=True):
        try:
            Checkpoint.read(folder)
        except DataError as error:
            refused[folder.name] = str(error)
        else:
            return folder, refused
    return None, refused


def purge(home: Path, *, keep: int, disk: Disk | None = None) -> None:
    """Remove drafts and all but the last `keep` checkpoints that are as they were written.

    Folders that are no longer as they were written do not count. They are removed only if they are older than those
    that are kept.
    """
    disk = disk or Disk()
    for draft in home.glob("*.tmp-*"):
        disk.remove(draft)
    sound = 0
    for folder in sorted(_candidates(home), reverse=True):
        if sound == keep:
            disk.remove(folder)
            continue
        try:
            Checkpoint.read(folder)
            sound += 1
        except DataError:
            continue


def _candidates(home: Path) -> list[Path]:
    return [folder for folder in home.iterdir() if folder.is_dir() and ".tmp-" not in folder.name]


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(_contents(folder / _MANIFEST))
        seal = manifest.pop("sha256")
        if manifest["format"] != _FORMAT:
            raise ValueError(f"format {manifest['format']}")
        if seal != _hash(_json(manifest)):
            raise ValueError("another SHA-256")
        if not isinstance(manifest["facts"], dict) or _STATE not in manifest["files"]:
            raise ValueError("no manifest")
    except DataError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"Expected {folder / _MANIFEST} to be the manifest of a checkpoint, format {_FORMAT}; got "
            f"{type(error).__name__}: {error}. {_NEVER_READ}"
        ) from error
    return manifest


def _contents(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"Expected a readable {path}; got {error.strerror or error}. {_NEVER_READ}") from error


def _files_of(parts: Mapping[str, Any]) -> dict[str, bytes]:
    """Return {name of a file: its content} for all parts."""
    files: dict[str, bytes] = {}
    trees: dict[str, Any] = {}
    for name, part in parts.items():
        tensors: dict[str, Tensor] = {}
        trees[name] = _encoded(part, tensors, {}, name)
        if tensors:
            files[f"{name}.safetensors"] = save(tensors)
    files[_STATE] = _json(trees)
    return files


def _encoded(value: Any, tensors: dict[str, Tensor], names: dict[tuple, str], path: str) -> Any:
    """Return a value in JSON's types, and put its tensors into `tensors`; one that occurs twice is put there once."""
    match value:
        case None | bool() | int() | float() | str():
            return value
        case Tensor():
            same = (value.data_ptr(), value.dtype, value.shape, value.stride())
            if value.numel() == 0 or same not in names:
                names[same] = path
                tensors[path] = value.detach().cpu().contiguous().clone()
            return {"tensor": names[same]}
        case list():
            return [_encoded(one, tensors, names, f"{path}.{i}") for i, one in enumerate(value)]
        case tuple():
            return {"tuple": [_encoded(one, tensors, names, f"{path}.{i}") for i, one in enumerate(value)]}
        case Mapping() if all(isinstance(key, str | int) for key in value):
            return {"items": [[key, _encoded(one, tensors, names, f"{path}.{key}")] for key, one in value.items()]}
        case _:
            raise SettingError(
                f"Expected {path} to hold tensors, numbers, text, lists and dictionaries; got a "
                f"{type(value).__name__}. Other objects could be saved by pickle alone, which runs code when it is "
                "read. Leave it out of what is saved, or give an object whose state_dict holds these types."
            )


def _decoded(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    match tree:
        case {"tensor": str(name)}:
            return tensors[name].clone()
        case {"tuple": list(ones)}:
            return tuple(_decoded(one, tensors) for one in ones)
        case {"items": list(pairs)}:
            return {key: _decoded(one, tensors) for key, one in pairs}
        case list():
            return [_decoded(one, tensors) for one in tree]
        case dict():
            raise ValueError("an unknown kind of value")
        case _:
            return tree


def _seal(content: bytes) -> dict[str, Any]:
    return {"bytes": len(content), "sha256": _hash(content)}


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()
