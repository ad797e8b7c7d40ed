# SPDX-License-Identifier: Apache-2.0
"""What other systems lack has another way, which is tried here with doubles of their calls."""

import errno
import mmap
import os
import types

import numpy as np
import pytest
import torch

from dpquant.app.output import Output, tell_native, using
from dpquant.data.pack import _pixels
from dpquant.data.paging import Paging
from dpquant.data.row_file import RowFile
from dpquant.privacy.disk import Disk

NOTHING = types.SimpleNamespace()
ELSEWHERE = Paging(NOTHING, NOTHING)  # a system with none of the calls


class Asked:
    """Calls of Linux that are counted."""

    POSIX_FADV_WILLNEED = 3

    def __init__(self):
        self.calls = []

    def posix_fadvise(self, descriptor, begin, size, advice):
        self.calls.append(("advise", begin, size, advice))

    def posix_fallocate(self, descriptor, begin, size):
        self.calls.append(("reserve", begin, size))


def test_rows_are_read_without_advice_to_the_kernel(tmp_path):
    values = np.arange(12.0).reshape(6, 2)
    np.save(tmp_path / "a.npy", values)
    file = RowFile(tmp_path / "a.npy", ELSEWHERE)
    assert np.array_equal(file.rows(torch.tensor([4, 1])).numpy(), values[[4, 1]])


def test_where_the_kernel_takes_advice_it_gets_some(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((6, 2)))
    asked = Asked()
    RowFile(tmp_path / "a.npy", Paging(asked, mmap)).rows(torch.tensor([4]))
    assert asked.calls == [("advise", 128 + 4 * 16, 16, 3)]


@pytest.mark.parametrize("paging", [ELSEWHERE, Paging()])
def test_pixels_lie_in_a_file_of_zeros_that_takes_its_place(tmp_path, paging):
    shape = (700, 3, 32, 32)  # larger than a block
    path = tmp_path / "train" / "pixels.npy"
    pixels = _pixels(path, shape, paging)
    pixels[699] = 7
    del pixels
    held = path.stat()
    assert held.st_size == 128 + 2 * 700 * 3 * 32 * 32 and held.st_blocks * 512 >= held.st_size
    found = np.load(path)
    assert found.shape == shape and not found[:699].any() and (found[699] == 7).all()


def test_a_place_that_is_not_reserved_would_be_seen(tmp_path):
    path = tmp_path / "train" / "pixels.npy"
    _pixels(path, (700, 3, 32, 32), Paging(Asked(), NOTHING))
    assert path.stat().st_blocks * 512 < path.stat().st_size


class FullFlush:
    """fcntl of macOS, where a command flushes the device too."""

    F_FULLFSYNC = 51

    def __init__(self, error=None):
        self.error, self.commands = error, []

    def fcntl(self, descriptor, command):
        self.commands.append(command)
        if self.error:
            raise self.error


@pytest.fixture
def fsyncs(monkeypatch):
    found = []
    monkeypatch.setattr(os, "fsync", found.append)
    return found


def disk_of(control):
    disk = Disk()
    disk.control = control
    return disk


def test_a_device_that_can_be_flushed_is_flushed(fsyncs):
    control = FullFlush()
    disk_of(control).sync(3)
    assert control.commands == [51] and fsyncs == []


@pytest.mark.parametrize("control", [FullFlush(OSError(errno.ENOTSUP, "no")), NOTHING, None])
def test_elsewhere_the_file_is_flushed(fsyncs, control):
    disk_of(control).sync(3)
    assert fsyncs == [3]


def test_a_missing_native_module_is_told(capsys):
    with using(Output()):
        tell_native(None)
        assert "none for this platform; same results, slower" in capsys.readouterr().err
        tell_native(object())
        assert capsys.readouterr().err == ""
