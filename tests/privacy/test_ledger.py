# SPDX-License-Identifier: Apache-2.0
"""A charge is on disk before `charge` returns, and no line can be changed, removed or moved unnoticed."""

import contextlib
import dataclasses
import json
import os
from pathlib import Path

import pytest

from dpquant.errors import LedgerError, SettingError
from dpquant.privacy.events import Event, merged
from dpquant.privacy.ledger import NO_HASH, Ledger

TRAIN = {"kind": "train", "sample_rate": 0.05, "noise_multiplier": 1.1}
ANALYSIS = {"kind": "analysis", "sample_rate": 0.01, "noise_multiplier": 2.0}


@contextlib.contextmanager
def system(**calls):
    """Until the block ends, calls of the operating system are these."""
    with pytest.MonkeyPatch.context() as patched:
        for name, call in calls.items():
            patched.setattr(os, name, call, raising=False)
        yield


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A ledger of five lines."""
    ledger = Ledger(tmp_path / "ledger.jsonl")
    for charge in (ANALYSIS, TRAIN, TRAIN, {**TRAIN, "noise_multiplier": 0.1 + 0.2}, TRAIN):
        ledger.charge(**charge)
    return tmp_path / "ledger.jsonl"


def test_what_was_charged_is_what_is_read(path):
    charges = [Event(**ANALYSIS), Event(**TRAIN), Event(**TRAIN)]
    assert Ledger.read(path) == [*charges, Event(**{**TRAIN, "noise_multiplier": 0.1 + 0.2}), Event(**TRAIN)]


def test_lines_are_numbered_and_each_names_the_hash_of_the_one_before(path):
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert [entry["seq"] for entry in entries] == [0, 1, 2, 3, 4]
    assert [entry["previous"] for entry in entries] == [NO_HASH, *(entry["hash"] for entry in entries[:-1])]


def test_equal_releases_are_counted_together(path):
    counts = {(c.kind, c.noise_multiplier): c.count for c in merged(Ledger.read(path))}
    assert counts == {("analysis", 2.0): 1, ("train", 1.1): 3, ("train", 0.1 + 0.2): 1}


def test_memory_and_file_hold_the_same(tmp_path):
    ledgers = [Ledger(), Ledger(tmp_path / "ledger")]
    for ledger in ledgers:
        for charge in (TRAIN, ANALYSIS, TRAIN):
            ledger.charge(**charge)
    assert ledgers[0].events() == ledgers[1].events() == merged(Ledger.read(tmp_path / "ledger"))
    assert ledgers[0].head == ledgers[1].head == json.loads((tmp_path / "ledger").read_text().splitlines()[-1])["hash"]


def test_research_marks_every_line(tmp_path):
    ledger = Ledger(tmp_path / "ledger", research=True)
    ledger.charge(**TRAIN)
    assert Ledger.read(tmp_path / "ledger") == ledger.events() == [Event(**TRAIN, research=True)]


def assert_every_flipped_bit_is_noticed(read, path: Path) -> None:
    """One bit of every byte of the last two lines, ends of lines included."""
    original = path.read_bytes()
    for position in range(len(original) * 3 // 5, len(original)):
        changed = bytearray(original)
        changed[position] ^= 1 << (position % 8)
        path.write_bytes(changed)
        with pytest.raises(LedgerError, match=path.name):
            read(path)
    path.write_bytes(original)
    assert len(read(path)) == 5


def test_every_flipped_bit_is_noticed(path):
    assert_every_flipped_bit_is_noticed(Ledger.read, path)


def test_a_reader_that_checks_only_the_chain_of_names_would_be_seen(path):
    def lax(path: Path) -> list[dict]:
        try:
            entries = [json.loads(line) for line in path.read_bytes().splitlines()]
            names = [NO_HASH, *(entry["hash"] for entry in entries[:-1])]
            if [entry["previous"] for entry in entries] == names:
                return entries
        except (ValueError, KeyError):
            pass
        raise LedgerError(path.name)

    with pytest.raises(pytest.fail.Exception):
        assert_every_flipped_bit_is_noticed(lax, path)


def test_a_flip_of_the_last_newline_does_not_hide_the_last_charge(path):
    path.write_bytes(path.read_bytes()[:-1] + b"\x0b")
    with pytest.raises(LedgerError, match="line 5"):
        Ledger.read(path)


@pytest.mark.parametrize("line", [0, 1, 2, 3])
def test_a_removed_line_is_noticed_where_it_is_missing(path, line):
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:line] + lines[line + 1 :]))
    with pytest.raises(LedgerError, match=f"line {line + 1} of"):
        Ledger.read(path)


@pytest.mark.parametrize("order", [(1, 0, 2, 3, 4), (0, 1, 2, 4, 3), (0, 1, 1, 2, 3, 4)])
def test_swapped_and_repeated_lines_are_noticed(path, order):
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[i] for i in order))
    with pytest.raises(LedgerError, match="as it was written"):
        Ledger.read(path)


def test_a_torn_last_line_is_left_out_wherever_it_was_torn(path):
    data = path.read_bytes()
    start = data.rstrip(b"\n").rindex(b"\n") + 1
    for end in range(start, len(data) - 1):
        path.write_bytes(data[:end])
        assert len(Ledger.read(path)) == 4
    path.write_bytes(data[:-1])
    assert len(Ledger.read(path)) == 5


def test_the_charge_is_written_and_synced_before_it_counts(tmp_path):
    events = []
    ledger = Ledger(tmp_path / "ledger")
    write, sync = os.write, os.fsync
    with system(
        write=lambda *a: events.append(("write", len(ledger.events()))) or write(*a),
        fsync=lambda *a: events.append(("fsync", len(ledger.events()))) or sync(*a),
    ):
        ledger.charge(**TRAIN)
    assert events == [("write", 0), ("fsync", 0)]
    assert len(ledger.events()) == 1


def test_the_file_and_its_folder_are_synced_at_creation(tmp_path):
    synced = []
    with system(fsync=lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))):
        Ledger(tmp_path / "ledger")
    assert synced == [str(tmp_path)]


def failing(number: int, message: str):
    def fail(*_arguments):
        raise OSError(number, message)

    return fail


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_a_charge_that_cannot_be_written_is_an_error_and_counts_nothing(tmp_path, call):
    ledger = Ledger(tmp_path / "ledger")
    ledger.charge(**TRAIN)
    with system(**{call: failing(28, "No space left on device")}), pytest.raises(LedgerError, match="No space left"):
        ledger.charge(**TRAIN)
    assert ledger.events() == [Event(**TRAIN)]


def test_after_half_a_line_nothing_more_is_written(tmp_path):
    ledger = Ledger(tmp_path / "ledger")
    ledger.charge(**TRAIN)
    write = os.write
    with (
        system(write=lambda descriptor, line: write(descriptor, line[:20])),
        pytest.raises(LedgerError, match="in part"),
    ):
        ledger.charge(**TRAIN)
    with pytest.raises(LedgerError, match="another length"):
        ledger.charge(**TRAIN)
    assert Ledger.read(tmp_path / "ledger") == [Event(**TRAIN)]


def windows(*, name="nt", binary=1 << 30):
    """Files are text unless opened with O_BINARY, so that an end of line becomes two bytes; no folder can be opened."""
    as_text = set()
    posix_open, posix_write = os.open, os.write

    def windows_open(path, flags, *arguments):
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied")
        descriptor = posix_open(path, flags & ~binary, *arguments)
        (as_text.discard if flags & binary else as_text.add)(descriptor)
        return descriptor

    def windows_write(descriptor, line):
        posix_write(descriptor, line.replace(b"\n", b"\r\n") if descriptor in as_text else line)
        return len(line)

    return {"name": name, "O_BINARY": binary, "open": windows_open, "write": windows_write}


def assert_charges_are_kept(path: Path) -> None:
    ledger = Ledger(path)
    for _ in range(3):
        ledger.charge(**TRAIN)
    assert Ledger.read(path) == [Event(**TRAIN)] * 3


def test_charges_are_kept_on_windows(tmp_path):
    with system(**windows()):
        assert_charges_are_kept(tmp_path / "ledger")


def test_a_folder_that_cannot_be_opened_would_be_seen(tmp_path):
    with system(**windows(name="posix")), pytest.raises(LedgerError, match="Permission denied"):
        assert_charges_are_kept(tmp_path / "ledger")


def test_ends_of_lines_of_two_bytes_would_be_seen(tmp_path):
    with system(**{**windows(), "O_BINARY": 0}), pytest.raises(LedgerError, match="another length"):
        assert_charges_are_kept(tmp_path / "ledger")


def test_a_second_writer_is_noticed(tmp_path):
    first, second = Ledger(tmp_path / "ledger"), Ledger(tmp_path / "ledger")
    first.charge(**TRAIN)
    with pytest.raises(LedgerError, match="Another program"):
        second.charge(**TRAIN)


def test_a_ledger_that_vanished_is_not_begun_anew(tmp_path):
    ledger = Ledger(tmp_path / "ledger")
    (tmp_path / "ledger").unlink()
    with pytest.raises(LedgerError, match="No such file"):
        ledger.charge(**TRAIN)
    assert not (tmp_path / "ledger").exists()


def test_a_file_that_holds_charges_is_refused_and_left_alone(path):
    before = path.read_bytes()
    with pytest.raises(LedgerError, match="holds charges"):
        Ledger(path)
    assert path.read_bytes() == before


def test_places_that_cannot_be_used_are_refused_at_once(tmp_path):
    for place in (tmp_path, tmp_path / "missing" / "ledger"):
        with pytest.raises(LedgerError, match="can be written"):
            Ledger(place)
    with pytest.raises(LedgerError, match="readable ledger"):
        Ledger.read(tmp_path / "missing")


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "test"},
        {"sample_rate": 0.0},
        {"sample_rate": 2.0},
        {"noise_multiplier": -1.0},
        {"noise_multiplier": float("nan")},
        {"noise_multiplier": float("inf")},
        {"count": 0},
    ],
)
def test_charges_that_cannot_be_accounted_for_are_refused(tmp_path, change):
    ledger = Ledger(tmp_path / "ledger")
    with pytest.raises(SettingError, match=r"Expected (kind|sample_rate|noise_multiplier|count)"):
        ledger.charge(**{**TRAIN, **change})
    assert (tmp_path / "ledger").read_bytes() == b""


def test_charges_are_values():
    assert dataclasses.replace(Event(**TRAIN), count=3) == Event(**TRAIN, count=3)
    assert merged([Event(**TRAIN, count=3), Event(**TRAIN), Event(**TRAIN, research=True)]) == [
        Event(**TRAIN, count=4),
        Event(**TRAIN, research=True),
    ]
