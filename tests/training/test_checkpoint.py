# SPDX-License-Identifier: Apache-2.0
"""A checkpoint is there whole or not at all: after any crash, with any bit changed, and without pickle."""

import hashlib
import json
import pickle
import random
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpquant.errors import DataError, SettingError
from dpquant.training.checkpoint import Checkpoint, Disk, newest, purge


def checkpoint(step: int = 3) -> Checkpoint:
    generator = torch.Generator().manual_seed(step)
    shared = torch.randn(3, 4, generator=generator)
    model = {
        "weight": shared,
        "tied": shared,
        "alike": torch.randn(3, 4, generator=generator),
        "maps": torch.randn(2, 3, 4, 4, generator=generator).contiguous(memory_format=torch.channels_last),
        "half": torch.randn(5, generator=generator).bfloat16(),
        "count": torch.tensor(7),
        "empty": torch.zeros(0, 3),
    }
    optimizer = {
        "state": {0: {"step": torch.tensor(3.0), "exp_avg": shared * 2}},
        "param_groups": [{"betas": (0.9, 0.99)}],
    }
    schedule = {"last_epoch": step, "lrs": [0.1], "lambdas": [None], "best": float("inf"), "name": "cosine", "on": True}
    return Checkpoint(parts={"model": model, "optimizer": optimizer, "schedule": schedule}, facts={"step": step})


def equal(a, b) -> bool:
    match a:
        case torch.Tensor():
            return a.dtype == b.dtype and torch.equal(a, b)
        case dict():
            return list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
        case list() | tuple():
            return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
        case _:
            return type(a) is type(b) and a == b


def test_what_was_written_is_read(tmp_path):
    written = checkpoint()
    written.write(tmp_path / "step-3")
    read = Checkpoint.read(tmp_path / "step-3")
    assert equal(dict(read.parts), dict(written.parts)) and read.facts == {"step": 3}


nested = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner) | st.tuples(inner, inner),
    max_leaves=20,
)


@given(state=nested)
def test_any_nested_state_is_read_as_it_was_written(state, tmp_path_factory):
    folder = tmp_path_factory.mktemp("home") / "one"
    Checkpoint(parts={"part": state}, facts={}).write(folder)
    assert equal(Checkpoint.read(folder).parts["part"], state)


@pytest.mark.parametrize("value", [object(), {1.5: 1}, torch.nn.Linear(2, 2), {"a": [lambda: 0]}, b"bytes"])
def test_what_only_pickle_could_save_is_refused(value, tmp_path):
    with pytest.raises(SettingError, match=r"Expected part.*pickle"):
        Checkpoint(parts={"part": value}, facts={}).write(tmp_path / "one")
    assert not list(tmp_path.iterdir())


# Crashes


class Crash(BaseException):
    """The process ends here; nothing is tidied up."""


class Crashing(Disk):
    """A disk that stops the process before an operation, half way through it if it is a write."""

    def __init__(self, survive: int):
        self.left = survive

    def _count(self) -> None:
        if self.left == 0:
            raise Crash
        self.left -= 1

    def make_folder(self, folder):
        self._count()
        super().make_folder(folder)

    def write(self, path, content):
        if self.left == 0:
            path.write_bytes(content[: len(content) // 2])
        self._count()
        super().write(path, content)

    def flush(self, path):
        self._count()
        super().flush(path)

    def rename(self, old, new):
        self._count()
        super().rename(old, new)

    def remove(self, folder):
        if self.left > 0:
            super().remove(folder)


class InPlace(Crashing):
    """Planted bug: files are written where they will be read."""

    def make_folder(self, folder):
        super().make_folder(folder.with_name(folder.name.split(".tmp-")[0]))

    def write(self, path, content):
        super().write(path.parent.with_name(path.parent.name.split(".tmp-")[0]) / path.name, content)

    def flush(self, path):
        self._count()

    def rename(self, old, new):
        self._count()


def after_a_crash(home, disk: Disk) -> tuple[bool, int]:
    """Return whether a second checkpoint was written in full, and the step of the newest one."""
    checkpoint(1).write(home / "step-1")
    try:
        checkpoint(2).write(home / "step-2", disk)
        whole = True
    except Crash:
        whole = False
    folder, refused = newest(home)
    assert folder is not None and not refused, refused
    assert equal(dict(Checkpoint.read(folder).parts), dict(checkpoint(int(folder.name[-1])).parts))
    return whole, int(folder.name[-1])


def test_after_a_crash_at_any_operation_the_newest_checkpoint_is_whole(tmp_path):
    ends = [after_a_crash(tmp_path / f"{survive}", Crashing(survive)) for survive in range(14)]
    assert ends[0] == (False, 1) and ends[-1] == (True, 2)
    assert ends == sorted(ends)  # the rename is the one moment at which it comes to be


def test_files_written_in_place_would_not_be(tmp_path):
    with pytest.raises(AssertionError):
        for survive in range(14):
            after_a_crash(tmp_path / f"{survive}", InPlace(survive))


class Full(Disk):
    def write(self, path, content):
        super().write(path, content[:10])
        raise OSError(28, "No space left on device")


def test_a_full_disk_leaves_nothing(tmp_path):
    with pytest.raises(OSError, match="No space left"):
        checkpoint().write(tmp_path / "step-3", Full())
    assert not list(tmp_path.iterdir())


# Corruption


def written(folder):
    checkpoint().write(folder)
    return folder


def refused(folder) -> bool:
    try:
        Checkpoint.read(folder)
    except DataError as error:
        return str(error).startswith("Expected ")
    return False


def test_a_changed_bit_is_found(tmp_path):
    sound, draw = written(tmp_path / "sound"), random.Random(0)
    for number in range(60):
        folder = tmp_path / f"{number}"
        shutil.copytree(sound, folder)
        path = draw.choice(sorted(folder.iterdir()))
        content = bytearray(path.read_bytes())
        place = draw.randrange(len(content))
        content[place] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
        assert refused(folder), path.name


@pytest.mark.parametrize("name", ["MANIFEST.json", "state.json", "model.safetensors"])
@pytest.mark.parametrize("part", [0.0, 0.3, 0.99])
def test_a_truncated_or_missing_file_is_found(name, part, tmp_path):
    folder = written(tmp_path / "one")
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: int(len(content) * part)])
    assert refused(folder)
    (folder / name).unlink()
    assert refused(folder)


def test_files_of_another_step_are_found(tmp_path):
    checkpoint(1).write(tmp_path / "1")
    checkpoint(2).write(tmp_path / "2")
    shutil.copy(tmp_path / "1" / "model.safetensors", tmp_path / "2" / "model.safetensors")
    assert refused(tmp_path / "2") and not refused(tmp_path / "1")


@pytest.mark.parametrize(
    "change", [{"format": 2}, {"format": None}, {"files": {}}, {"files": {"../state.json": {}}}, {"facts": 3}]
)
def test_a_foreign_manifest_is_refused(change, tmp_path):
    folder = written(tmp_path / "one")
    vouch(folder, change)
    assert refused(folder)


def test_a_manifest_that_names_a_file_elsewhere_is_refused(tmp_path):
    """Even one that is there, and is as the manifest says."""
    folder = written(tmp_path / "one")
    shutil.copy(folder / "model.safetensors", tmp_path / "other.safetensors")
    files = json.loads((folder / "MANIFEST.json").read_text())["files"]
    vouch(folder, {"files": {**files, "../other.safetensors": files["model.safetensors"]}})
    assert refused(folder)


def vouch(folder, changes) -> None:
    """Change a manifest and its own hash."""
    path = folder / "MANIFEST.json"
    manifest = json.loads(path.read_text()) | changes
    del manifest["sha256"]
    manifest["sha256"] = hashlib.sha256((json.dumps(manifest, indent=1) + "\n").encode()).hexdigest()
    path.write_text(json.dumps(manifest))


def test_a_manifest_that_vouches_for_itself_is_believed(tmp_path):
    """Otherwise the tests of foreign manifests show nothing."""
    vouch(written(tmp_path / "one"), {"facts": {"step": 4}})
    assert Checkpoint.read(tmp_path / "one").facts == {"step": 4}


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was loaded",))


@pytest.mark.parametrize("name", ["state.json", "model.safetensors"])
def test_a_pickle_is_never_loaded(name, tmp_path):
    """Even if the manifest vouches for it."""
    folder, content = written(tmp_path / "one"), pickle.dumps(Bomb())
    files = json.loads((folder / "MANIFEST.json").read_text())["files"]
    files[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / name).write_bytes(content)
    vouch(folder, {"files": files})
    assert refused(folder)


# Which one is kept, and which one is taken


def test_the_checkpoint_before_a_broken_one_is_taken_and_it_is_said(tmp_path):
    for step in (1, 2, 3):
        checkpoint(step).write(tmp_path / f"step-{step}")
    (tmp_path / "step-3" / "state.json").write_text("{}")
    (tmp_path / "step-9.tmp-1234").mkdir()
    folder, why = newest(tmp_path)
    assert folder == tmp_path / "step-2" and list(why) == ["step-3"] and "SHA-256" in why["step-3"]


def test_without_a_sound_one_there_is_none(tmp_path):
    (tmp_path / "step-1").mkdir()
    folder, why = newest(tmp_path)
    assert folder is None and list(why) == ["step-1"]


def test_the_newest_two_sound_ones_are_kept(tmp_path):
    for step in (1, 2, 3, 4):
        checkpoint(step).write(tmp_path / f"step-{step}")
    (tmp_path / "step-4" / "state.json").write_text("{}")
    (tmp_path / "step-5.tmp-1234").mkdir()
    purge(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-2", "step-3", "step-4"]
