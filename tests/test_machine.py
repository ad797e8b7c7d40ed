# SPDX-License-Identifier: Apache-2.0
"""Load and memory as the system reports them: read right, reset where that works, and refused where it reports none."""

import mmap
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dpquant.errors import SettingError
from dpquant.machine import (
    check_threads,
    current_load,
    device_memory_mib,
    forget_peak,
    memory_gib,
    memory_mib,
    reset_device_peak,
    reset_peak,
    synchronize,
)
from gpus import Gpus

LARGE = 2**26  # bytes


def peak_of_the_past() -> None:
    """A peak that the process no longer needs; pages of its own, as malloc may keep what it is given back."""
    with mmap.mmap(-1, LARGE) as block:
        for page in range(0, LARGE, mmap.PAGESIZE):
            block[page] = 1


@pytest.fixture
def resettable() -> None:
    """Skips where a container's kernel has no such file, or does not let it be written."""
    if not reset_peak()[1]:
        pytest.skip("the system does not let the peak be reset")


@pytest.mark.usefixtures("resettable")
def test_a_peak_that_was_reset_is_forgotten() -> None:
    peak_of_the_past()
    before = memory_mib()[1]
    resident, reset = reset_peak()
    assert reset and before - resident > LARGE / 2**21
    assert memory_mib()[1] - resident < LARGE / 2**21
    assert forget_peak() == pytest.approx(memory_mib()[0], abs=LARGE / 2**21)


def test_a_peak_that_cannot_be_reset_stays_and_that_is_told(tmp_path: Path) -> None:
    (tmp_path / "self" / "clear_refs").mkdir(parents=True)  # a folder cannot be written
    (tmp_path / "self" / "status").symlink_to("/proc/self/status")
    peak_of_the_past()
    before = memory_mib(tmp_path)[1]
    resident, reset = reset_peak(tmp_path)
    assert not reset and memory_mib(tmp_path)[1] >= before > resident + LARGE / 2**21


def test_a_kernel_without_a_high_water_mark_is_asked_otherwise(tmp_path: Path) -> None:
    pytest.importorskip("resource")
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "status").write_text("Name:\tpython\nVmRSS:\t    2048 kB\n")
    resident, peak = memory_mib(tmp_path)
    assert resident == peak > 2
    (tmp_path / "self" / "status").write_text("VmRSS:\t    2048 kB\nVmHWM:\t    4096 kB\n")
    assert memory_mib(tmp_path) == (2, 4)


WITHOUT_RESOURCE = """
import sys
from pathlib import Path
sys.modules["resource"] = None  # as on Windows
import platform
platform.system = lambda: "Windows"
from dpquant import errors, machine
try:
    machine.{ask}(Path({proc!r}))
except errors.SettingError as error:
    print(error)
"""


@pytest.mark.parametrize("ask", [memory_mib, reset_peak, forget_peak])
def test_a_system_that_does_not_tell_is_named(ask: Callable[..., object], tmp_path: Path) -> None:
    script = WITHOUT_RESOURCE.format(ask=ask.__name__, proc=str(tmp_path))
    told = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert re.search(r"tells how much memory.*got Windows.*Leave memory out", told)


@pytest.mark.parametrize(
    ("before", "load"), [("cpu  100 0 25 20 5 0 0 0 0 0", 2.0), ("cpu  150 0 25 10 5 0 0 0 0 0", 0.0)]
)
def test_the_load_is_what_happens_while_this_process_waits(before: str, load: float, tmp_path: Path) -> None:
    processors = "".join(f"cpu{number} 1 1 1 1\n" for number in range(4))

    def tick(seconds: float) -> None:
        (tmp_path / "stat").write_text(f"cpu  150 0 25 60 15 0 0 0 0 0\n{processors}intr 3\n")

    (tmp_path / "stat").write_text(f"{before}\n{processors}intr 3\n")
    assert current_load(tmp_path, wait=tick) == load


def test_only_a_gpu_is_waited_for() -> None:
    gpus, none = Gpus((9, 0)), Gpus()
    device = torch.device("cuda", 0)
    synchronize(torch.device("cpu"), gpus)
    synchronize(device, none)  # CUDA that is not in use: waiting would start it
    assert gpus.waited == none.waited == []
    gpus.queued = 3.0
    synchronize(device, gpus)
    synchronize(None, gpus)
    assert gpus.queued == 0 and gpus.waited == [device, None]


def test_memory_of_a_gpu_is_that_of_its_tensors() -> None:
    gpus, device = Gpus((9, 0)), torch.device("cuda", 0)
    gpus.held, gpus.peak = 2**20, 2**22
    assert device_memory_mib(device, gpus) == (1, 4)
    assert reset_device_peak(device, gpus) == (1, True)
    assert device_memory_mib(device, gpus) == (1, 1)


@pytest.mark.parametrize(("written", "expected"), [("1073741824\n", 1.0), ("max\n", None), (None, None)])
def test_a_containers_limit_is_the_memory_there_is(written: str | None, expected: float | None, tmp_path: Path) -> None:
    limit = tmp_path / "memory.max"
    if written is not None:
        limit.write_text(written)
    found, whole = memory_gib(limit), memory_gib(tmp_path / "none")
    assert found == (whole if expected is None else expected)


def test_more_threads_than_the_cores_can_serve_are_refused() -> None:
    check_threads(1)
    with pytest.raises(SettingError, match="threads=100000"):
        check_threads(100_000)
