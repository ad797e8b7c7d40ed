# SPDX-License-Identifier: Apache-2.0
"""Releases from test records are on disk before they happen, add up, and cannot be edited in one place."""

import pytest

from dpquant.errors import LedgerError
from dpquant.privacy import releases
from dpquant.privacy.disk import Disk
from dpquant.privacy.releases import Release

ONE, TWO = (Release(what="accuracy", epsilon=epsilon, records=100) for epsilon in (0.1, 0.2))


@pytest.fixture
def path(tmp_path):
    """A file with two releases."""
    path = tmp_path / "releases.jsonl"
    assert releases.charge(path, ONE) == [ONE]
    assert releases.charge(path, TWO) == [ONE, TWO]
    return path


def test_releases_are_read_back_and_add_up(path, tmp_path):
    assert releases.read(path) == [ONE, TWO]
    assert releases.together([ONE, TWO]) == 0.1 + 0.2 and releases.together([]) == 0.0
    assert releases.together([ONE]) == 0.1
    assert releases.read(tmp_path / "nothing") == []


def test_a_sum_is_not_below_what_was_charged():
    from fractions import Fraction

    ten = [ONE] * 10
    assert Fraction(releases.together(ten)) >= 10 * Fraction(0.1)


@pytest.mark.parametrize("line", [0, 1])
@pytest.mark.parametrize("change", [(b"0.", b"0.0"), (b"accuracy", b"nothing"), (b'"seq": ', b'"seq": 1')])
def test_a_line_that_was_changed_is_an_error(path, line, change):
    lines = path.read_bytes().splitlines(keepends=True)
    lines[line] = lines[line].replace(*change, 1)
    path.write_bytes(b"".join(lines))
    with pytest.raises(LedgerError, match=f"line {line + 1}"):
        releases.read(path)
    with pytest.raises(LedgerError):
        releases.charge(path, ONE)


def test_a_line_that_was_removed_is_an_error(path):
    path.write_bytes(path.read_bytes().splitlines(keepends=True)[1])
    with pytest.raises(LedgerError, match="line 1"):
        releases.read(path)


def test_a_torn_line_charges_nothing_and_a_whole_one_without_its_end_does(path):
    data = path.read_bytes()
    path.write_bytes(data[:-20])
    assert releases.read(path) == [ONE]
    assert releases.charge(path, TWO) == [ONE, TWO]
    assert path.read_bytes() == data
    path.write_bytes(data[:-1])
    assert releases.read(path) == [ONE, TWO] and releases.charge(path, ONE) == [ONE, TWO, ONE]
    assert releases.read(path) == [ONE, TWO, ONE]


class Full(Disk):
    def write(self, descriptor, data):
        raise OSError(28, "No space left on device")


def test_a_release_that_cannot_be_written_is_an_error(path, tmp_path):
    with pytest.raises(LedgerError, match="No space left"):
        releases.charge(path, ONE, disk=Full())
    assert releases.read(path) == [ONE, TWO]
    (tmp_path / "folder").mkdir()
    with pytest.raises(LedgerError):
        releases.charge(tmp_path / "folder", ONE)


def test_two_processes_do_not_write_at_once(path):
    class Watched(Disk):
        def sync(self, descriptor):
            with pytest.raises(LedgerError, match="still running"):
                releases.charge(path, ONE)
            super().sync(descriptor)

    assert len(releases.charge(path, ONE, disk=Watched())) == 3
