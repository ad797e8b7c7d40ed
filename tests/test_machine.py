# SPDX-License-Identifier: Apache-2.0
"""What a process has used: whether its peak could be counted anew, and what is said where the system does not tell."""

import sys
from pathlib import Path

import pytest

from dpquant import machine
from dpquant.errors import SettingError
from dpquant.machine import forget_peak, memory_mib, reset_peak

LARGE = 2**26  # bytes


def peak_of_the_past() -> None:
    """A peak that the process no longer needs."""
    block = bytearray(LARGE)
    block[:: 2**12] = b"1" * len(block[:: 2**12])
    del block


@pytest.fixture
def resettable() -> None:
    """Skips where a container's kernel has no such file, or does not let it be written."""
    if not reset_peak()[1]:
        pytest.skip("the system does not let the peak be counted anew")


@pytest.mark.usefixtures("resettable")
def test_a_peak_that_was_reset_is_forgotten() -> None:
    peak_of_the_past()
    before = memory_mib()[1]
    resident, reset = reset_peak()
    assert reset and before - resident > LARGE / 2**21
    assert memory_mib()[1] - resident < LARGE / 2**21
    assert forget_peak() == pytest.approx(memory_mib()[0], abs=LARGE / 2**21)


def test_a_peak_that_cannot_be_reset_stays_and_that_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "_RESET", tmp_path)  # a folder cannot be written
    peak_of_the_past()
    before = memory_mib()[1]
    resident, reset = reset_peak()
    assert not reset and memory_mib()[1] >= before > resident + LARGE / 2**21


def test_a_kernel_without_a_high_water_mark_is_asked_otherwise(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("resource")
    (tmp_path / "status").write_text("Name:\tpython\nVmRSS:\t    2048 kB\n")
    monkeypatch.setattr(machine, "_STATUS", tmp_path / "status")
    resident, peak = memory_mib()
    assert resident == peak > 2
    (tmp_path / "status").write_text("VmRSS:\t    2048 kB\nVmHWM:\t    4096 kB\n")
    assert memory_mib() == (2, 4)


def test_a_system_that_does_not_tell_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "_STATUS", tmp_path / "none")
    monkeypatch.setitem(sys.modules, "resource", None)  # as on Windows
    monkeypatch.setattr(machine.platform, "system", lambda: "Windows")
    for ask in (memory_mib, reset_peak, forget_peak):
        with pytest.raises(SettingError, match=r"tells how much memory.*got Windows.*Leave memory out"):
            ask()
