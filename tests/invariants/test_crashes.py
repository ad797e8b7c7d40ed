# SPDX-License-Identifier: Apache-2.0
"""T15: whatever a crash takes from a file system, a checkpoint is whole or not there, and what was kept is kept.

The ledger's own crash enumeration is in tests/privacy/test_ledger.py. Here is one for checkpoints: a file system that
keeps what was flushed, and of the rest all, nothing, or the names without the contents (Pillai et al. 2014, "All file
systems are not created equal"). And the calls of the operating system that all of it relies on are seen to be made.
"""

import dataclasses
import errno
import os
from pathlib import Path

import pytest
import torch

from dpquant.privacy.disk import DISK
from dpquant.privacy.ledger import Ledger
from dpquant.runs.directory import append_line
from dpquant.runs.record import write_whole
from dpquant.training.checkpoint import Checkpoint, Disk, newest, purge

LOST = b"\0" * 7  # of a file whose name survived and whose content did not


@dataclasses.dataclass
class Folder:
    """A folder's names: as the running system sees them, and as a crash leaves them at least."""

    cached: dict = dataclasses.field(default_factory=dict)
    flushed: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class File:
    cached: bytes = b""
    flushed: bytes | None = None


class Lossy(Disk):
    """A file system in memory beside the real one, and every state in which a crash can leave it."""

    def __init__(self, home: Path):
        self.home, self.root, self.states = home, Folder(), []
        self._remember()

    def _folder(self, path: Path) -> Folder:
        return self.root if path == self.home else self.root.cached[path.name]

    def _remember(self):
        self.states += [contents(self.root, how) for how in ("cached", "flushed", "names")]

    def make_folder(self, folder):
        super().make_folder(folder)
        self.root.cached[folder.name] = Folder()
        self._remember()

    def write(self, path, content):
        super().write(path, content)
        file = self._folder(path.parent).cached.setdefault(path.name, File())
        file.cached = content[: len(content) // 2]
        self._remember()
        file.cached = content
        self._remember()

    def flush(self, path):
        super().flush(path)
        if path.is_dir():
            folder = self._folder(path)
            folder.flushed = dict(folder.cached)
        else:
            file = self._folder(path.parent).cached[path.name]
            file.flushed = file.cached
        self._remember()

    def rename(self, old, new):
        super().rename(old, new)
        self.root.cached[new.name] = self.root.cached.pop(old.name)
        self._remember()

    def remove(self, folder):
        super().remove(folder)
        self.root.cached.pop(folder.name, None)
        self._remember()


def contents(folder: Folder, how: str) -> dict:
    """What a crash leaves of a folder: all, what was flushed, or all names with the contents that were flushed."""
    found = {}
    for name, one in (folder.flushed if how == "flushed" else folder.cached).items():
        if isinstance(one, Folder):
            found[name] = contents(one, how)
        elif how == "cached":
            found[name] = one.cached
        else:
            found[name] = LOST if one.flushed is None else one.flushed
    return found


def put(folder: Path, tree: dict) -> None:
    folder.mkdir()
    for name, one in tree.items():
        put(folder / name, one) if isinstance(one, dict) else (folder / name).write_bytes(one)


def checkpoint(step: int) -> Checkpoint:
    return Checkpoint(parts={"model": {"weight": torch.full((40,), float(step))}}, facts={"step": step})


def step_of(folder: Path) -> int:
    read = Checkpoint.read(folder)
    assert bool((read.parts["model"]["weight"] == read.facts["step"]).all())
    return read.facts["step"]


def assert_no_crash_loses_a_checkpoint(tmp_path, disk_class=Lossy):
    """A second and a third are written, and the first is purged: after any crash the newest is whole, and none is torn.

    Once `write` has returned, what it wrote is there after any crash. Returns the number of states tried.
    """
    home = tmp_path / "home"
    home.mkdir()
    disk, at_least = disk_class(home), []
    for step in (1, 2, 3):
        at_least += [step - 1] * (len(disk.states) - len(at_least))
        checkpoint(step).write(home / f"step-{step}", disk)
        purge(home, keep=1, disk=disk)
        at_least += [step - 1] * (len(disk.states) - len(at_least) - 3)
        at_least += [step] * 3  # the states after all of it
    assert len(disk.states) > 90
    seen = {}
    for number, (state, least) in enumerate(zip(disk.states, at_least, strict=True)):
        if least == 0:
            continue
        key = repr(state)
        if key not in seen:
            put(tmp_path / f"{number}", state)
            seen[key] = newest(tmp_path / f"{number}")
        folder, refused = seen[key]
        assert folder is not None and step_of(folder) >= least and not refused, (number, least, refused)
    return len(disk.states)


def test_no_crash_loses_a_checkpoint(tmp_path, tried):
    tried("crash points", assert_no_crash_loses_a_checkpoint(tmp_path))


class FilesUnflushed(Lossy):
    def flush(self, path):
        if path.is_dir():
            super().flush(path)


class FoldersUnflushed(Lossy):
    def flush(self, path):
        if not path.is_dir():
            super().flush(path)


class HomeUnflushed(Lossy):
    def flush(self, path):
        if path != self.home:
            super().flush(path)


@pytest.mark.parametrize("planted", [FilesUnflushed, FoldersUnflushed, HomeUnflushed])
def test_what_is_not_flushed_would_be_lost(planted, tmp_path):
    with pytest.raises(AssertionError):
        assert_no_crash_loses_a_checkpoint(tmp_path, planted)


# The calls of the operating system.


@pytest.fixture
def synced(monkeypatch):
    """Inodes in the order in which `os.fsync` was called for them."""
    found, fsync = [], os.fsync

    def watched(descriptor):
        found.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    return found


def inode(path):
    return os.stat(path).st_ino


def test_a_ledgers_lines_and_its_name_are_synced(synced, tmp_path):
    ledger = Ledger(tmp_path / "ledger")
    assert {inode(tmp_path), inode(tmp_path / "ledger")} <= set(synced)
    synced.clear()
    ledger.charge(kind="train", sample_rate=0.1, noise_multiplier=1.0)
    assert synced == [inode(tmp_path / "ledger")]


def test_the_files_of_a_checkpoint_are_synced(synced, tmp_path):
    checkpoint(1).write(tmp_path / "one")
    folder = tmp_path / "one"
    assert {inode(path) for path in (*folder.iterdir(), folder, tmp_path)} <= set(synced)


def test_a_file_is_synced_before_it_replaces_another(synced, tmp_path):
    write_whole(tmp_path / "record", "new")
    assert synced == [inode(tmp_path / "record")]  # the inode of the draft, which got the name


def test_a_line_of_metrics_is_synced(synced, tmp_path):
    append_line(tmp_path / "metrics", "{}")
    assert synced == [inode(tmp_path / "metrics")]


def test_what_is_not_synced_is_seen(synced, tmp_path):
    (tmp_path / "file").write_text("unsynced")
    assert synced == []


def locking_fails_with(number, monkeypatch):
    from dpquant.privacy import disk

    def failing(descriptor, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(disk.fcntl, "flock", failing)


def test_only_a_file_system_without_locks_goes_unlocked(monkeypatch, tmp_path):
    descriptor = DISK.open(tmp_path / "file", new=True)
    try:
        locking_fails_with(errno.ENOLCK, monkeypatch)
        DISK.lock(descriptor)
        locking_fails_with(errno.EIO, monkeypatch)
        with pytest.raises(OSError, match="Input/output"):
            DISK.lock(descriptor)
    finally:
        os.close(descriptor)
