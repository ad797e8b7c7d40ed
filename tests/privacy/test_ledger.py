# SPDX-License-Identifier: Apache-2.0
"""A charge is on disk before `charge` returns, no line can be changed unnoticed, and no crash hides a release."""

import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
import os
from pathlib import Path

import pytest

from dpquant.errors import BudgetError, LedgerError, SettingError
from dpquant.privacy.disk import DISK, Disk
from dpquant.privacy.entries import NO_HASH, line_of, verified
from dpquant.privacy.events import Budget, Event, merged
from dpquant.privacy.ledger import LONGEST_LEASE, Ledger

FIXTURES = Path(__file__).parent / "fixtures"
TRAIN = {"kind": "train", "sample_rate": 0.05, "noise_multiplier": 1.1}
ANALYSIS = {"kind": "analysis", "sample_rate": 0.01, "noise_multiplier": 2.0}
STEPS, ANALYSES = 12, 3


def budget_of(steps):
    return Budget(epsilon=8.0, delta=1e-5, events=(Event(**ANALYSIS, count=ANALYSES), Event(**TRAIN, count=steps)))


BUDGET = budget_of(STEPS)


@contextlib.contextmanager
def system(**calls):
    """Until the block ends, calls of the operating system are these."""
    with pytest.MonkeyPatch.context() as patched:
        for name, call in calls.items():
            patched.setattr(os, name, call, raising=False)
        yield


@dataclasses.dataclass
class Slow(Disk):
    """A disk on which every line takes so many seconds, by the clock that the ledger reads. It syncs nothing."""

    seconds: float = 0.04
    _time: float = 0.0

    def clock(self):
        return self._time

    def sync(self, descriptor):
        self._time += self.seconds

    def sync_folder(self, folder):
        pass


def leasing(path, steps, disk_class=Slow, **settings):
    """A ledger of the budget whose leases are so many steps long, as those of a much longer plan may be."""
    ledger = Ledger(path, budget=BUDGET, disk=disk_class(), **settings)
    ledger.lease = steps
    return ledger


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A ledger of seven lines, five of them charges."""
    ledger = Ledger(tmp_path / "ledger.jsonl")
    for charge in (ANALYSIS, TRAIN, TRAIN, {**TRAIN, "noise_multiplier": 0.1 + 0.2}, TRAIN):
        ledger.charge(**charge)
    return tmp_path / "ledger.jsonl"


@pytest.fixture
def leased(tmp_path: Path) -> Path:
    """A ledger of all kinds of lines: two attempts, of which the first crashed within a lease and the second ended."""
    with leasing_crashed(tmp_path / "leased.jsonl") as path:
        ledger = Ledger.resumed(path, disk=Slow())
    ledger.lease = 4
    ledger.charge(**ANALYSIS)
    ledger.charge(**TRAIN)
    ledger.close()
    return path


@contextlib.contextmanager
def leasing_crashed(path):
    """A ledger of which four steps and an analysis are charged, and one was taken, by a process that is gone."""
    ledger = leasing(path, 4)
    ledger.charge(**ANALYSIS)
    ledger.charge(**TRAIN)
    ledger._file.close()
    yield path


def entries(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def count(path, kind="train"):
    return Ledger.verify(path).charged(kind)


# The file.


def test_what_was_charged_is_what_is_read(path):
    assert Ledger.read(path) == [
        Event(**ANALYSIS), Event(**TRAIN, count=3), Event(**{**TRAIN, "noise_multiplier": 0.1 + 0.2})
    ]  # fmt: skip


def test_lines_are_numbered_and_each_names_the_hash_of_the_one_before(leased):
    lines = entries(leased)
    assert [entry["seq"] for entry in lines] == list(range(8))
    assert [entry["previous"] for entry in lines] == [NO_HASH, *(entry["hash"] for entry in lines[:-1])]
    kinds = ["header", "attempt", "analysis", "train", "attempt", "analysis", "train", "returned"]
    assert [entry["kind"] for entry in lines] == kinds
    assert [entry["number"] for entry in lines if entry["kind"] == "attempt"] == [1, 2]


def test_the_header_says_what_epsilon_needs_and_what_it_is_about(leased):
    header = entries(leased)[0]
    assert header["format"] == 2 and len(header["run"]) == 16 and header["dpquant"]
    assert "one record, added or removed" in header["neighbours"] and "number of records is not" in header["public"]
    contents = Ledger.verify(leased)
    assert contents.budget == BUDGET
    assert (contents.format, contents.run, contents.attempts, contents.torn) == (2, header["run"], 2, 0)
    assert (contents.num_lines, contents.num_bytes) == (8, len(leased.read_bytes()))


def test_two_runs_have_two_names(tmp_path):
    runs = [Ledger.verify(Ledger(tmp_path / name).path).run for name in "ab"]
    assert len(set(runs)) == 2


def test_a_plan_whose_epsilon_is_infinite_is_read_back(tmp_path):
    budget = dataclasses.replace(BUDGET, epsilon=float("inf"))
    Ledger(tmp_path / "ledger", budget=budget)
    assert Ledger.verify(tmp_path / "ledger").budget == budget
    assert "Infinity" not in (tmp_path / "ledger").read_text()


@pytest.mark.parametrize("name", ["ledger-1.jsonl", "ledger-1-research.jsonl"])
def test_a_ledger_of_format_1_is_read_and_not_continued(name, tmp_path):
    old = tmp_path / name
    old.write_bytes((FIXTURES / name).read_bytes())
    contents = Ledger.verify(old)
    assert (contents.format, contents.attempts, contents.budget, contents.run) == (1, 1, None, "")
    assert contents.research == ("research" in name)
    assert (contents.charged("train"), contents.charged("analysis")) == ((4, 0) if contents.research else (4, 2))
    with pytest.raises(LedgerError, match="format 1"):
        Ledger.resumed(old)
    assert old.read_bytes() == (FIXTURES / name).read_bytes()


def test_memory_and_file_hold_the_same(tmp_path):
    ledgers = [Ledger(), Ledger(tmp_path / "ledger")]
    for ledger in ledgers:
        for charge in (TRAIN, ANALYSIS, TRAIN):
            ledger.charge(**charge)
    assert ledgers[0].events() == ledgers[1].events() == Ledger.read(tmp_path / "ledger")
    assert ledgers[0].head != NO_HASH and ledgers[1].head == entries(tmp_path / "ledger")[-1]["hash"]


def test_research_marks_every_line_and_every_later_attempt(tmp_path):
    ledger = Ledger(tmp_path / "ledger", research=True)
    ledger.charge(**TRAIN)
    assert Ledger.read(tmp_path / "ledger") == ledger.events() == [Event(**TRAIN, research=True)]
    ledger.close()
    later = Ledger.resumed(tmp_path / "ledger")
    assert later.research and Ledger.verify(tmp_path / "ledger").research
    later.charge(**TRAIN)
    assert Ledger.read(tmp_path / "ledger") == [Event(**TRAIN, research=True, count=2)]
    Ledger(tmp_path / "unused", research=True).close()
    assert Ledger.verify(tmp_path / "unused").research  # before it charges


# Changes of the file.


def unseen_flips(read, data: bytes) -> list[int]:
    """Positions of the file at which one flipped bit is not refused."""
    unseen = []
    for position in range(len(data)):
        changed = bytearray(data)
        changed[position] ^= 1 << (position % 8)
        try:
            read(Path("ledger.jsonl"), bytes(changed))
            unseen.append(position)
        except LedgerError as error:
            assert "ledger.jsonl" in str(error)
    return unseen


def reading_the_chain_of_names(path: Path, data: bytes):
    """A reader that does not recompute the hashes."""
    try:
        lines = [json.loads(line) for line in data.splitlines()]
        if [entry["previous"] for entry in lines] == [NO_HASH, *(entry["hash"] for entry in lines[:-1])]:
            return lines
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise LedgerError(path.name)


def test_every_flipped_bit_is_refused(leased):
    assert unseen_flips(verified, leased.read_bytes()) == []
    assert count(leased) == 5


def test_a_reader_that_does_not_recompute_the_hashes_would_be_seen(leased):
    assert unseen_flips(reading_the_chain_of_names, leased.read_bytes())


def test_every_value_of_a_byte_is_refused(leased):
    """All 255 others at some places, of which the last end of line could pass for the end of a torn line."""
    original = leased.read_bytes()
    for position in (0, 1, original.index(b"\n"), len(original) // 2, len(original) - 2, len(original) - 1):
        for value in set(range(256)) - {original[position]}:
            with pytest.raises(LedgerError, match=r"line \d"):
                verified(leased, original[:position] + bytes([value]) + original[position + 1 :])


def test_a_removed_line_is_refused_where_it_is_missing(leased):
    lines = leased.read_bytes().splitlines(keepends=True)
    for line in range(len(lines) - 1):
        leased.write_bytes(b"".join(lines[:line] + lines[line + 1 :]))
        with pytest.raises(LedgerError, match=f"line {line + 1} of"):
            Ledger.read(leased)


def test_swapped_and_repeated_lines_are_refused(leased):
    lines = leased.read_bytes().splitlines(keepends=True)
    for first in range(len(lines)):
        repeated = lines[: first + 1] + lines[first:]
        swaps = [list(lines) for _ in range(first)]
        for second, swapped in enumerate(swaps):
            swapped[first], swapped[second] = lines[second], lines[first]
        for changed in (repeated, *swaps):
            leased.write_bytes(b"".join(changed))
            with pytest.raises(LedgerError, match="as it was written"):
                Ledger.read(leased)


def test_a_line_that_was_changed_together_with_its_hash_is_refused_by_the_next(leased):
    lines = leased.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines[:-1]):
        entry = {**json.loads(line), "note": "changed"}
        del entry["hash"]
        changed, _ = line_of(entry)
        with pytest.raises(LedgerError, match=f"line {number + 2} of"):
            verified(leased, b"".join([*lines[:number], changed + b"\n", *lines[number + 1 :]]))


def chained(*facts):
    """The bytes of lines that agree with each other, whatever they say."""
    data, head = b"", NO_HASH
    for seq, fact in enumerate(facts):
        line, head = line_of({"seq": seq, **fact, "previous": head})
        data += line + b"\n"
    return data


HEADER = {"kind": "header", "format": 2, "run": "0" * 16, "plan": None, "dpquant": "1"}
BEGUN, STEP = {"kind": "attempt", "number": 1, "research": False}, {**TRAIN, "count": 4, "research": False}


def returning(lease, number):
    return {"kind": "returned", "lease": lease, "count": number}


def test_lines_that_agree_are_read(tmp_path):
    (tmp_path / "ledger").write_bytes(chained(HEADER, BEGUN, STEP, returning(2, 3), {**STEP, "count": 1}))
    assert Ledger.read(tmp_path / "ledger") == [Event(**TRAIN, count=2)]


@pytest.mark.parametrize(
    ("facts", "line"),
    [
        ([HEADER, BEGUN, {"kind": "unknown"}], 3),
        ([HEADER, BEGUN, HEADER], 3),
        ([HEADER, STEP], 2),
        ([BEGUN, STEP], 1),
        ([STEP, HEADER], 2),
        ([STEP, BEGUN], 2),
        ([{**HEADER, "format": 1}, BEGUN], 1),
        ([{**HEADER, "plan": {"epsilon": 1.0}}, BEGUN], 1),
        ([HEADER, {**BEGUN, "number": 2}], 2),
        ([HEADER, BEGUN, BEGUN], 3),
        ([HEADER, BEGUN, {**STEP, "count": -1}], 3),
        ([HEADER, BEGUN, {**STEP, "sample_rate": 2.0}], 3),
        ([HEADER, BEGUN, returning(1, 1)], 3),
        ([HEADER, BEGUN, STEP, returning(2, 4)], 4),
        ([HEADER, BEGUN, STEP, returning(2, 0)], 4),
        ([HEADER, BEGUN, STEP, returning(1, 1)], 4),
        ([HEADER, BEGUN, STEP, returning(2, 1), returning(2, 1)], 5),
        ([HEADER, BEGUN, STEP, {**BEGUN, "number": 2}, returning(2, 1)], 5),
        ([HEADER, BEGUN, {**STEP, **ANALYSIS}, returning(2, 1)], 4),
        ([HEADER, BEGUN, {**STEP, "seq": 3}], 3),
    ],
)
def test_lines_that_agree_and_cannot_follow_each_other_are_refused(facts, line, tmp_path):
    (tmp_path / "ledger").write_bytes(chained(*facts))
    with pytest.raises(LedgerError, match=f"line {line} of .*ledger"):
        Ledger.read(tmp_path / "ledger")


def test_a_newer_format_is_named(tmp_path):
    (tmp_path / "ledger").write_bytes(b'{"seq": 0, "kind": "header", "format": 3, "dpquant": "9.0"}\n')
    with pytest.raises(LedgerError, match=r"line 1 of .*format=3, written by dpquant 9\.0"):
        Ledger.read(tmp_path / "ledger")
    with pytest.raises(LedgerError, match="newer one"):
        Ledger.resumed(tmp_path / "ledger")


def assert_truncation_hides_no_line(path, read, continued):
    """Cut anywhere, the file is read and continued with every charge that is whole, but for its end of line perhaps."""
    data = path.read_bytes()
    ends = [place for place, byte in enumerate(data) if byte == ord("\n")][2:]  # after header and attempt: charges
    for end in range(len(data)):
        path.write_bytes(data[:end])
        whole = sum(end >= place for place in ends)
        assert read(path) == whole, end
        if end % 40 == 0 or end >= ends[-2]:  # now and then, and everywhere in the last line
            with contextlib.suppress(LedgerError):
                continued(path)
            assert read(path) == whole, end


def test_a_file_that_was_cut_is_repaired_or_refused(tmp_path):
    ledger = Ledger(tmp_path / "ledger", budget=BUDGET)
    for _ in range(2):
        ledger.charge(**TRAIN)
    ledger.close()
    assert_truncation_hides_no_line(tmp_path / "ledger", count, lambda path: Ledger.resumed(path, disk=Slow()).close())


def test_a_repair_that_takes_a_whole_line_would_be_seen(tmp_path):
    ledger = Ledger(tmp_path / "ledger", budget=BUDGET)
    for _ in range(2):
        ledger.charge(**TRAIN)
    ledger.close()

    def cutting(path):
        path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))

    with pytest.raises(AssertionError):
        assert_truncation_hides_no_line(tmp_path / "ledger", count, cutting)


def test_what_was_repaired_is_said_and_the_file_goes_on(tmp_path):
    with leasing_crashed(tmp_path / "ledger") as path:
        whole = path.read_bytes()
    path.write_bytes(whole + b'{"seq": 4, "ki')
    assert Ledger.verify(path).torn == 14 and count(path) == 4
    ledger = Ledger.resumed(path)
    assert ledger.repaired == 14 and ledger.attempt == 2
    assert path.read_bytes().startswith(whole) and Ledger.verify(path).torn == 0
    ledger.close()
    assert Ledger.resumed(path).repaired == 0


def test_zeros_that_a_crash_left_are_torn(leased):
    whole = leased.read_bytes()
    leased.write_bytes(whole + bytes(300))
    assert Ledger.verify(leased).torn == 300
    Ledger.resumed(leased).close()
    assert leased.read_bytes().startswith(whole + b'{"seq": 8, "kind": "attempt"')


# Writing.


class Watched(Disk):
    def __init__(self, watch):
        self.watch = watch

    def write(self, descriptor, data):
        self.watch("write")
        return super().write(descriptor, data)

    def sync(self, descriptor):
        self.watch("sync")
        super().sync(descriptor)

    def sync_folder(self, folder):
        self.watch(folder)
        super().sync_folder(folder)


def test_the_charge_is_written_and_synced_before_it_counts(tmp_path):
    calls, ledgers = [], []
    disk = Watched(lambda call: calls.append((call, *(len(ledger.events()) for ledger in ledgers))))
    ledger = Ledger(tmp_path / "ledger", disk=disk)
    ledgers.append(ledger)
    calls.clear()
    ledger.charge(**TRAIN)
    assert calls == [("write", 0), ("sync", 0)]
    assert len(ledger.events()) == 1


def test_the_file_and_its_new_folders_are_synced_at_creation(tmp_path):
    calls = []
    Ledger(tmp_path / "a" / "b" / "ledger", disk=Watched(calls.append))
    assert calls[:2] == [tmp_path / "a", tmp_path]  # the names of b and a
    assert calls[2:] == ["write", "sync", tmp_path / "a" / "b", "write", "sync"]


class Failing(Disk):
    """A disk that fails once it is told to."""

    def __init__(self, call):
        self.call, self.fails = call, False

    def write(self, descriptor, data):
        self._perhaps("write")
        return super().write(descriptor, data)

    def sync(self, descriptor):
        self._perhaps("sync")
        super().sync(descriptor)

    def _perhaps(self, call):
        if self.fails and call == self.call:
            raise OSError(28, "No space left on device")


@pytest.mark.parametrize("call", ["write", "sync"])
def test_a_charge_that_cannot_be_written_is_an_error_and_counts_nothing(tmp_path, call):
    disk = Failing(call)
    ledger = Ledger(tmp_path / "ledger", disk=disk)
    ledger.charge(**TRAIN)
    disk.fails = True
    with pytest.raises(LedgerError, match="No space left"):
        ledger.charge(**TRAIN)
    assert ledger.events() == [Event(**TRAIN)]
    disk.fails = False
    with pytest.raises(LedgerError, match="half-way"):
        ledger.charge(**TRAIN)


def test_a_lease_that_cannot_be_given_back_stays_charged(tmp_path):
    class Full(Slow):
        def write(self, descriptor, data):
            if b"analysis" in data and b"plan" not in data:
                raise OSError(28, "No space left on device")
            return super().write(descriptor, data)

    ledger = leasing(tmp_path / "ledger", 4, Full)
    ledger.charge(**TRAIN)
    with pytest.raises(LedgerError, match="No space left"):
        ledger.charge(**ANALYSIS)
    ledger.charge(**TRAIN)  # its line is on disk
    ledger.close()
    assert ledger.charged("train") == 2 and count(tmp_path / "ledger") == 4


def test_after_half_a_line_nothing_more_is_written(tmp_path):
    class Half(Disk):
        def write(self, descriptor, data):
            return super().write(descriptor, data[:20] if b'"train"' in data else data)

    ledger = Ledger(tmp_path / "ledger", disk=Half())
    with pytest.raises(LedgerError, match="in part"):
        ledger.charge(**TRAIN)
    with pytest.raises(LedgerError, match="half-way"):
        ledger.charge(**TRAIN)
    assert Ledger.verify(tmp_path / "ledger").torn == 20 and Ledger.read(tmp_path / "ledger") == []


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
    assert Ledger.read(path) == [Event(**TRAIN, count=3)]


def test_charges_are_kept_on_windows(tmp_path):
    with system(**windows()):
        assert_charges_are_kept(tmp_path / "ledger")


def test_a_folder_that_cannot_be_opened_would_be_seen(tmp_path):
    with system(**windows(name="posix")), pytest.raises(LedgerError, match="Permission denied"):
        assert_charges_are_kept(tmp_path / "ledger")


def test_ends_of_lines_of_two_bytes_would_be_seen(tmp_path):
    with system(**{**windows(), "O_BINARY": 0}), pytest.raises(LedgerError, match="another length"):
        assert_charges_are_kept(tmp_path / "ledger")


class WithoutLocks(Disk):
    def lock(self, descriptor):
        pass


def test_a_second_writer_is_refused(tmp_path):
    first = Ledger(tmp_path / "ledger")
    for second in (Ledger, Ledger.resumed):
        with pytest.raises(LedgerError, match="second one"):
            second(tmp_path / "ledger")
    first.charge(**TRAIN)
    first.close()
    assert Ledger.resumed(tmp_path / "ledger").charged("train") == 1


def test_where_there_are_no_locks_a_second_writer_is_noticed(tmp_path):
    first = Ledger(tmp_path / "ledger", disk=WithoutLocks())
    second = Ledger.resumed(tmp_path / "ledger", disk=WithoutLocks())
    second.charge(**TRAIN)
    with pytest.raises(LedgerError, match="Another program"):
        first.charge(**TRAIN)


def tried_by_another_process(path, disk=DISK):
    """What another process meets that wants to write to a ledger: the error's message, or nothing."""
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()

    def work():
        try:
            Ledger.resumed(path, disk=disk)
            answers.put("")
        except LedgerError as error:
            answers.put(str(error))

    other = context.Process(target=work)
    other.start()
    other.join()
    return answers.get()


def test_two_processes_cannot_write_to_one_ledger(tmp_path):
    ledger = Ledger(tmp_path / "ledger")
    assert "second one" in tried_by_another_process(tmp_path / "ledger")
    ledger.charge(**TRAIN)
    ledger.close()
    assert tried_by_another_process(tmp_path / "ledger") == ""


def test_a_ledger_without_its_lock_would_be_seen(tmp_path):
    ledger = Ledger(tmp_path / "ledger", disk=WithoutLocks())
    assert tried_by_another_process(tmp_path / "ledger") == ""
    ledger.close()


@pytest.mark.parametrize("becomes", [None, b""])
def test_a_ledger_that_vanished_is_not_begun_anew(tmp_path, becomes):
    ledger = Ledger(tmp_path / "ledger")
    (tmp_path / "ledger").unlink()
    if becomes is not None:
        (tmp_path / "ledger").write_bytes(becomes)
    with pytest.raises(LedgerError, match="No such file" if becomes is None else "another file"):
        ledger.charge(**TRAIN)
    assert becomes == (None if not (tmp_path / "ledger").exists() else (tmp_path / "ledger").read_bytes())


def test_a_file_that_holds_charges_is_refused_and_left_alone(path):
    before = path.read_bytes()
    with pytest.raises(LedgerError, match="holds charges"):
        Ledger(path)
    assert path.read_bytes() == before


def test_places_that_cannot_be_used_are_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path, tmp_path / "file" / "ledger"):
        with pytest.raises(LedgerError, match="can be written"):
            Ledger(place)
    with pytest.raises(LedgerError, match="readable ledger"):
        Ledger.read(tmp_path / "missing")
    with pytest.raises(LedgerError, match="No such file"):
        Ledger.resumed(tmp_path / "missing")


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
    before = (tmp_path / "ledger").read_bytes()
    with pytest.raises(SettingError, match=r"Expected (kind|sample_rate|noise_multiplier|count)"):
        ledger.charge(**{**TRAIN, **change})
    assert (tmp_path / "ledger").read_bytes() == before


def test_charges_are_values():
    assert dataclasses.replace(Event(**TRAIN), count=3) == Event(**TRAIN, count=3)
    assert merged([Event(**TRAIN, count=3), Event(**TRAIN), Event(**TRAIN, research=True)]) == [
        Event(**TRAIN, count=4),
        Event(**TRAIN, research=True),
    ]


# The budget.


@pytest.mark.parametrize("lease", [1, 5])
def test_a_charge_beyond_the_plan_is_refused_before_it_is_written(tmp_path, lease):
    ledger = leasing(tmp_path / "ledger", lease)
    for number in range(STEPS):
        assert ledger.remaining("train") == STEPS - number
        ledger.charge(**TRAIN)
    ledger.charge(**ANALYSIS, count=ANALYSES)
    before = (tmp_path / "ledger").read_bytes()
    for charge in (TRAIN, ANALYSIS):
        assert ledger.remaining(charge["kind"]) == 0
        with pytest.raises(BudgetError, match="at most 0 more"):
            ledger.charge(**charge)
    assert (tmp_path / "ledger").read_bytes() == before
    assert (count(tmp_path / "ledger"), count(tmp_path / "ledger", "analysis")) == (STEPS, ANALYSES)


@pytest.mark.parametrize("change", [{"sample_rate": 0.06}, {"noise_multiplier": 1.0}, {"count": STEPS + 1}])
def test_a_charge_that_is_not_the_plans_is_refused(tmp_path, change):
    ledger = Ledger(tmp_path / "ledger", budget=BUDGET)
    with pytest.raises(BudgetError):
        ledger.charge(**{**TRAIN, **change})
    assert Ledger.read(tmp_path / "ledger") == [] and ledger.remaining("train") == STEPS


def test_a_kind_that_is_not_planned_is_refused_and_without_a_plan_there_is_no_limit(tmp_path):
    ledger = Ledger(budget=dataclasses.replace(BUDGET, events=BUDGET.events[1:]))
    assert ledger.remaining("analysis") == 0
    with pytest.raises(BudgetError, match="planned"):
        ledger.charge(**ANALYSIS)
    free = Ledger(tmp_path / "free", step_seconds=1e-9)
    assert free.remaining("train") is None and free.lease == 1
    free.charge(**TRAIN, count=10**6)


def test_a_crash_counts_against_the_plan_and_another_plan_is_refused(tmp_path):
    with leasing_crashed(tmp_path / "ledger") as path:
        before = path.read_bytes()
    with pytest.raises(LedgerError, match=r"line 1 of .*another one"):
        Ledger.resumed(path, budget=dataclasses.replace(BUDGET, delta=1e-6))
    assert path.read_bytes() == before
    ledger = Ledger.resumed(path, budget=BUDGET)
    assert (ledger.attempt, ledger.charged("train"), ledger.remaining("train")) == (2, 4, STEPS - 4)
    assert (ledger.charged("analysis"), ledger.remaining("analysis")) == (1, ANALYSES - 1)
    with pytest.raises(BudgetError, match=f"at most {STEPS - 4} more"):
        ledger.charge(**TRAIN, count=STEPS - 3)


# Leases.


@pytest.mark.parametrize(("step", "steps"), [(8.0, 1), (4.0, 1), (2.0, 2), (1.0, 4), (0.0, LONGEST_LEASE)])
def test_a_lease_costs_a_hundredth_of_its_steps(tmp_path, step, steps):
    """A line takes 0.04 s: it is worth no more than a hundredth of the time of the steps that it charges."""
    ledger = Ledger(tmp_path / "ledger", budget=budget_of(100_000), step_seconds=step, disk=Slow())
    assert ledger.lease == steps and (ledger.lease == LONGEST_LEASE or 0.01 * steps * step >= 0.04)


@pytest.mark.parametrize(("planned", "steps"), [(36, 1), (199, 1), (200, 2), (1_000, 10), (6_399, 63), (6_400, 64)])
def test_a_crash_costs_at_most_a_hundredth_of_the_plan(tmp_path, planned, steps):
    """However slow the disk, also for the process that continues."""
    slow = {"budget": budget_of(planned), "step_seconds": 1e-6, "disk": Slow()}
    with contextlib.closing(Ledger(tmp_path / "ledger", **slow)) as first:
        assert first.lease == steps
    with contextlib.closing(Ledger.resumed(tmp_path / "ledger", **slow)) as second:
        assert second.lease == steps


def test_a_leased_step_touches_no_disk_and_is_charged_before(tmp_path):
    ledger = leasing(tmp_path / "ledger", 5)
    lines = []
    for taken in range(1, STEPS + 1):
        ledger.charge(**TRAIN)
        lines.append(len(entries(tmp_path / "ledger")))
        assert ledger.charged("train") == taken <= count(tmp_path / "ledger") <= STEPS
    assert lines == [3] * 5 + [4] * 5 + [5] * 2  # the last lease is of what the plan still allows
    ledger.close()
    assert len(entries(tmp_path / "ledger")) == 5


def test_what_was_not_used_is_given_back_once_and_analyses_are_not_leased(tmp_path):
    ledger = leasing(tmp_path / "ledger", 5)
    for charge in (TRAIN, ANALYSIS, TRAIN):
        ledger.charge(**charge)
    assert (count(tmp_path / "ledger"), count(tmp_path / "ledger", "analysis")) == (5, 1)
    ledger.settle()
    ledger.settle()
    assert Ledger.read(tmp_path / "ledger") == ledger.events() == [Event(**TRAIN, count=2), Event(**ANALYSIS)]
    ledger.charge(**TRAIN)  # a new lease
    assert count(tmp_path / "ledger") == 7
    ledger.close()
    ledger.close()
    assert count(tmp_path / "ledger") == 3
    with pytest.raises(LedgerError, match="closed"):
        ledger.charge(**TRAIN)


def test_what_is_given_back_is_of_the_lease_alone(tmp_path):
    ledger = leasing(tmp_path / "ledger", 2)
    ledger.charge(**ANALYSIS, count=ANALYSES)
    ledger.charge(**TRAIN)
    ledger.close()
    assert (count(tmp_path / "ledger"), count(tmp_path / "ledger", "analysis")) == (1, ANALYSES)


def test_several_steps_at_once_are_served_by_one_line(tmp_path):
    ledger = leasing(tmp_path / "ledger", 4)
    ledger.charge(**TRAIN)
    ledger.charge(**TRAIN, count=4)
    assert [entry["count"] for entry in entries(tmp_path / "ledger")[2:]] == [4, 3, 4]
    assert count(tmp_path / "ledger") == ledger.charged("train") == 5


# Crashes: every prefix of what the ledger asked of the disk, with all or a part of what was not synced lost.


@dataclasses.dataclass
class Recorded(Slow):
    """A disk that writes down what is asked of it."""

    trace: list = dataclasses.field(default_factory=list)

    def open(self, path, *, new):
        if new:
            self.trace.append(("create",))
        return super().open(path, new=new)

    def write(self, descriptor, data):
        self.trace.append(("write", data))
        return super().write(descriptor, data)

    def cut(self, descriptor, length):
        self.trace.append(("cut", length))
        super().cut(descriptor, length)

    def sync(self, descriptor):
        self.trace.append(("sync",))
        super().sync(descriptor)

    def sync_folder(self, folder):
        self.trace.append(("sync folder",))


class NeverSyncing(Recorded):
    def sync(self, descriptor):
        self._time += self.seconds


class NeverSyncingTheFolder(Recorded):
    def sync_folder(self, folder):
        pass


def work(ledger, trace, order=("charge", "use")):
    """Analyses and steps until the budget is spent: each is charged, then used, as `order` says."""
    for kind in ("analysis", *["train"] * 4) * STEPS:
        charge = ANALYSIS if kind == "analysis" else TRAIN
        if not ledger.remaining(kind):
            continue
        for act in order:
            ledger.charge(**charge) if act == "charge" else trace.append(("use", kind))
    ledger.close()


def after_crashes(trace, before=b""):
    """Every (file, {kind: used}) that a crash can leave: the file is None where its name was not synced.

    What was synced is there. Of the writes since, any number of bytes is.
    """
    synced, cached, named, used = before, before, bool(before), {"train": 0, "analysis": 0}
    for call, *arguments in [("begin",), *trace]:
        match call:
            case "write":
                cached += arguments[0]
            case "cut":
                cached = synced = cached[: arguments[0]]
            case "sync":
                synced = cached
            case "sync folder":
                named = True
            case "use":
                used = {**used, arguments[0]: used[arguments[0]] + 1}
        if not named:
            yield None, used
        for end in range(len(synced), len(cached) + 1, 1 if len(cached) - len(synced) < 8 else 23):
            yield cached[:end], used
        yield cached, used


def charges(data):
    """{kind: number of releases} that the bytes of a file charge."""
    contents = verified(Path("ledger"), data)
    return {kind: contents.charged(kind) for kind in ("train", "analysis")}


def assert_no_crash_hides_a_release(folder, *, lease=4, disk_class=Recorded, order=("charge", "use"), read=charges):
    """Charged is at least used, after any crash."""
    path = folder / "ledger"
    disk = disk_class()
    ledger = Ledger(path, budget=BUDGET, disk=disk)
    ledger.lease = lease
    work(ledger, disk.trace, order)
    states = dict.fromkeys((data, tuple(used.items())) for data, used in after_crashes(disk.trace))
    assert len(states) > 100
    for data, used in states:
        charged = read(data or b"")
        assert all(charged[kind] >= number for kind, number in used), (data, used)
    return list(states)


@pytest.mark.parametrize("lease", [1, 4, 64])
def test_no_crash_hides_a_release(tmp_path, lease, tried):
    tried("crash points", len(assert_no_crash_hides_a_release(tmp_path, lease=lease)))
    assert (count(tmp_path / "ledger"), count(tmp_path / "ledger", "analysis")) == (STEPS, ANALYSES)


def counting_a_lease_as_one(data):
    lines = [json.loads(line) for line in data.split(b"\n")[:-1]]
    return {kind: sum(entry["kind"] == kind for entry in lines) for kind in ("train", "analysis")}


@pytest.mark.parametrize(
    "planted",
    [
        {"order": ("use", "charge")},
        {"disk_class": NeverSyncing},
        {"disk_class": NeverSyncingTheFolder},
        {"read": counting_a_lease_as_one},
    ],
    ids=["charged after use", "not synced", "folder not synced", "a lease counted as one"],
)
def test_a_ledger_that_hides_a_release_would_be_seen(tmp_path, planted):
    with pytest.raises(AssertionError):
        assert_no_crash_hides_a_release(tmp_path, **planted)


def test_a_crash_of_a_run_that_continues_hides_none_either(tmp_path):
    """From every state in which the first attempt can crash: the second charges no more than the plan in all."""
    states = assert_no_crash_hides_a_release(tmp_path)
    path, seen = tmp_path / "ledger", 0
    for data, used in states[:: len(states) // 25]:
        path.unlink(missing_ok=True)
        path.write_bytes(data or b"")
        disk, before = Recorded(), dict(used)
        try:
            ledger = Ledger.resumed(path, budget=BUDGET, disk=disk)
            ledger.lease = 4
        except LedgerError as error:
            assert "no complete line" in str(error) and not any(before.values())
            continue
        work(ledger, disk.trace)
        assert (count(path), count(path, "analysis")) == (STEPS, ANALYSES)
        for left, more in dict.fromkeys((d, tuple(u.items())) for d, u in after_crashes(disk.trace, data)):
            charged = charges(left)
            for kind, number in more:
                assert number + before[kind] <= charged[kind] <= BUDGET.planned(kind).count
            seen += 1
    assert seen > 500


def test_the_hash_is_sha256_of_the_line_without_it(path):
    entry = entries(path)[-1]
    digest = entry.pop("hash")
    assert hashlib.sha256(json.dumps(entry).encode()).hexdigest() == digest
