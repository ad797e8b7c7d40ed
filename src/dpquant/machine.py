# SPDX-License-Identifier: Apache-2.0
"""Hardware, clock and memory of the machine that a measurement runs on. Loads torch only to ask a GPU.

A timing can be compared with another only where both machines are known: int8 products are fast where the processor has
instructions for them, and other processes on the machine slow a measurement down. Where the system does not provide a
fact, its field is None, empty or says "unknown".
"""

import contextlib
import dataclasses
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dpquant.errors import SettingError

# Flags of /proc/cpuinfo that decide which products are fast, in the kernel's spelling; x86 first, then ARM.
_RELEVANT = (
    *("amx_int8", "amx_bf16", "avx512_vnni", "avx512_bf16", "avx_vnni", "avx512f", "avx2"),
    *("i8mm", "asimddp", "bf16", "sve"),
)
_PROC = Path("/proc")  # Linux' file system of processes, proc(5); absent elsewhere
_LOAD_SECONDS = 0.5
_THREADS_A_CORE = 16
_BUSY_SHARE = 0.3  # of the cores


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hardware:
    """A machine's processor, memory, software and load at one time.

    Attributes:
      cpu: the processor's name.
      cores: number of cores that this process may use.
      instructions: instruction sets of the processor that decide which products are fast.
      memory_gib: GiB of the whole machine; None where the system does not provide it.
      load: processors in use by other processes, measured while this one sleeps; without /proc the mean load of the
        last minute, which includes this process; None where the system provides neither.
      system: operating system and architecture.
      python: version.
      torch: version.
    """

    cpu: str
    cores: int
    instructions: tuple[str, ...]
    memory_gib: float | None
    load: float | None
    system: str
    python: str
    torch: str

    @classmethod
    def here(cls, proc: Path = _PROC) -> "Hardware":
        """Return the facts of this machine, and its load now; takes half a second.

        Args:
          proc: where the file system of processes is mounted.
        """
        cpu, instructions, cores = processor(proc)
        return cls(
            cpu=cpu,
            cores=cores,
            instructions=instructions,
            memory_gib=_physical_gib(),
            load=current_load(proc),
            system=f"{platform.system()} {platform.machine()}",
            python=platform.python_version(),
            torch=importlib.metadata.version("torch"),
        )

    @property
    def busy(self) -> bool:
        """Whether other processes were running, so that timings taken then are not reliable."""
        return self.load is not None and self.load > _BUSY_SHARE * self.cores

    @property
    def slug(self) -> str:
        """The processor's name in lower case and hyphens, for a file name."""
        name = re.sub(r"\((R|TM|C)\)|CPU|Processor|@.*", " ", self.cpu, flags=re.IGNORECASE)
        return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "unknown"

    def __str__(self) -> str:
        memory = "" if self.memory_gib is None else f", {self.memory_gib:.0f} GiB"
        instructions = " ".join(self.instructions) or "instruction sets unknown"
        return (
            f"{self.cpu}, {self.cores} cores{memory}, {instructions}; {self.system}, Python {self.python}, "
            f"torch {self.torch}"
        )


def synchronize(device: Any = None, cuda: Any = None) -> None:
    """Wait until a device has done all the work that was given to it. A CPU has, as soon as a call returns.

    Args:
      device: a torch.device; None: the current CUDA device, if this process uses one.
      cuda: an object like torch.cuda; None: torch.cuda itself, if torch is loaded.
    """
    torch = sys.modules.get("torch")  # whoever has given a device work has loaded it
    cuda = cuda or (torch and torch.cuda)
    if cuda is None or (device is not None and device.type != "cuda") or not cuda.is_initialized():
        return
    cuda.synchronize(device)


def now() -> float:
    """Return the seconds of a clock, once all work is done: a CUDA device works on while Python goes on."""
    synchronize()
    return time.perf_counter()


def current(device: Any) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which a CUDA device is the current one, on which kernels are launched and clocks wait."""
    return sys.modules["torch"].cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def processor(proc: Path = _PROC) -> tuple[str, tuple[str, ...], int]:
    """Return the processor's name, its relevant instruction sets and the number of cores that this process may use."""
    facts = _cpu_facts(proc)
    return _cpu_name(facts), instructions_in(facts.get("flags", facts.get("Features", ""))), _cores()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def instructions_in(flags: str) -> tuple[str, ...]:
    """Return the relevant instruction sets among space-separated processor flags."""
    present = set(flags.split())
    return tuple(name for name in _RELEVANT if name in present)


def _cpu_facts(proc: Path) -> dict[str, str]:
    """Return the first processor's entry in /proc/cpuinfo; {} without that file."""
    try:
        first = (proc / "cpuinfo").read_text(encoding="utf-8").split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _cpu_name(facts: dict[str, str]) -> str:
    if "model name" in facts:
        return facts["model name"]
    if platform.system() == "Darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        told = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        if told:
            return told
    return platform.processor() or f"unknown {platform.machine()}"


def _physical_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None


def memory_gib(limit: Path = Path("/sys/fs/cgroup/memory.max")) -> float | None:
    """Return the GiB of memory that this process may use at most; None where the system does not provide it.

    Args:
      limit: file of the memory limit of a container, in bytes; it may be absent.
    """
    try:
        allowed = int(limit.read_text(encoding="utf-8")) / 2**30
    except (OSError, ValueError):  # no such limit: the file says "max"
        return _physical_gib()
    return min(allowed, _physical_gib() or allowed)


def check_threads(threads: int) -> None:
    """Refuse a number of threads with which this machine would do little but switch between them.

    Raises:
      SettingError: it is more than 16 for each core.
    """
    cores = _cores()
    if threads > _THREADS_A_CORE * cores:
        raise SettingError(
            f"Expected threads in 1 .. {_THREADS_A_CORE * cores}, {_THREADS_A_CORE} for each of {cores} cores; got "
            f"threads={threads}. They would wait for each other. Give no more than there are cores."
        )


def current_load(proc: Path = _PROC, *, wait: Callable[[float], None] = time.sleep) -> float | None:
    """Return the number of processors that are busy while this process waits.

    Args:
      proc: where the file system of processes is mounted.
      wait: returns after this many seconds, without computing.
    Returns: without /proc the mean load of the last minute; None where the system does not provide that either.
    """
    if (proc / "stat").exists():
        idle_before, all_before, _ = _processor_times(proc)
        wait(_LOAD_SECONDS)
        idle, every, processors = _processor_times(proc)
        return round((1 - (idle - idle_before) / max(every - all_before, 1)) * processors, 2)
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _processor_times(proc: Path) -> tuple[int, int, int]:
    """Return clock ticks that all processors were idle, all ticks since the start, and the number of processors."""
    lines = [
        line.split() for line in (proc / "stat").read_text(encoding="utf-8").splitlines() if line.startswith("cpu")
    ]
    ticks = [int(count) for count in lines[0][1:9]]  # the sum over processors; the others are one processor each
    return ticks[3] + ticks[4], sum(ticks), len(lines) - 1


def reset_peak(proc: Path = _PROC) -> tuple[float, bool]:
    """Reset this process' peak of resident memory to what is resident now, where the system supports it.

    Args:
      proc: where the file system of processes is mounted.
    Returns: MiB resident now; whether the peak was reset. If it was not, `memory_mib` goes on reporting the peak since
      the process started, imports included.
    Raises:
      SettingError: the system does not provide memory usage.
    """
    try:
        (proc / "self" / "clear_refs").write_text("5", encoding="utf-8")  # 5 resets the peak, proc(5)
    except OSError:
        return memory_mib(proc)[0], False
    return memory_mib(proc)[0], True


def forget_peak(proc: Path = _PROC) -> float:
    """Reset the peak as `reset_peak` does and return the MiB resident now."""
    return reset_peak(proc)[0]


def memory_mib(proc: Path = _PROC) -> tuple[float, float]:
    """Return this process' MiB resident now and its peak; the peak twice where the system provides no more.

    Args:
      proc: where the file system of processes is mounted.
    Raises:
      SettingError: the system provides neither.
    """
    status = proc / "self" / "status"
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text(encoding="utf-8").splitlines())
        if "VmHWM" in lines:  # not every container's kernel has it
            return int(lines["VmRSS"].split()[0]) / 2**10, int(lines["VmHWM"].split()[0]) / 2**10
    try:
        import resource
    except ImportError as error:
        raise SettingError(
            "Expected a system that tells how much memory a process has used, as Linux and macOS do; got "
            f"{platform.system()}. Without it no limit on memory can be kept. Leave memory out."
        ) from error
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    return peak, peak


def device_memory_mib(device: Any, cuda: Any = None) -> tuple[float, float]:
    """Return the MiB that this process' tensors hold on a CUDA device now, and their peak.

    Args:
      device: a torch.device.
      cuda: an object like torch.cuda; None: torch.cuda itself.
    """
    cuda = cuda or sys.modules["torch"].cuda
    return cuda.memory_allocated(device) / 2**20, cuda.max_memory_allocated(device) / 2**20


def reset_device_peak(device: Any, cuda: Any = None) -> tuple[float, bool]:
    """Reset the peak of a CUDA device; return the MiB that are held now, and True: it can always be reset.

    Args: as for `device_memory_mib`.
    """
    cuda = cuda or sys.modules["torch"].cuda
    cuda.reset_peak_memory_stats(device)
    return device_memory_mib(device, cuda)[0], True
