# SPDX-License-Identifier: Apache-2.0
"""The machine that a measurement was taken on: what a reader must know to compare it with another. No torch.

A figure without its machine says nothing: int8 products gain where the processor has instructions for them, and a
machine with other work on it measures that work too. Where the system does not tell, the field says so or is empty.
"""

import dataclasses
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

from dpquant.errors import SettingError

# Flags of /proc/cpuinfo that decide which products are fast, as the kernel spells them; x86 first, then ARM.
_TELLING = (
    *("amx_int8", "amx_bf16", "avx512_vnni", "avx512_bf16", "avx_vnni", "avx512f", "avx2"),
    *("i8mm", "asimddp", "bf16", "sve"),
)
_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")  # writing 5 makes the peak what is resident; proc(5)
_PROCESSORS = Path("/proc/stat")
_MOMENT = 0.5  # seconds
_BUSY_SHARE = 0.3  # of the cores


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hardware:
    """A machine, as it was when this was read.

    Attributes:
      cpu: the processor's name.
      cores: how many this process may use.
      instructions: those of the instruction sets that matter here which the processor has.
      memory_gib: of the whole machine; None where the system does not tell.
      load: processors that others use: counted while this process waits for a moment where the system tells, else the
        mean of the last minute, in which this process itself may have run; None where it tells neither.
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
    def here(cls) -> "Hardware":
        """This machine, now."""
        cpu, instructions, cores = processor()
        return cls(
            cpu=cpu,
            cores=cores,
            instructions=instructions,
            memory_gib=_memory_gib(),
            load=_load(),
            system=f"{platform.system()} {platform.machine()}",
            python=platform.python_version(),
            torch=importlib.metadata.version("torch"),
        )

    @property
    def busy(self) -> bool:
        """Whether other work was running: timings taken then are not to be trusted."""
        return self.load is not None and self.load > _BUSY_SHARE * self.cores

    @property
    def slug(self) -> str:
        """The processor's name as a file name."""
        name = re.sub(r"\((R|TM|C)\)|CPU|Processor|@.*", " ", self.cpu, flags=re.IGNORECASE)
        return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "unknown"

    def __str__(self) -> str:
        memory = "" if self.memory_gib is None else f", {self.memory_gib:.0f} GiB"
        instructions = " ".join(self.instructions) or "instruction sets unknown"
        return (
            f"{self.cpu}, {self.cores} cores{memory}, {instructions}; {self.system}, Python {self.python}, "
            f"torch {self.torch}"
        )


def processor() -> tuple[str, tuple[str, ...], int]:
    """Name, telling instruction sets and the number of cores that this process may use."""
    facts = _cpu_facts()
    return _cpu_name(facts), instructions_in(facts.get("flags", facts.get("Features", ""))), _cores()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def instructions_in(flags: str) -> tuple[str, ...]:
    """Those of the instruction sets that matter here among space-separated flags."""
    present = set(flags.split())
    return tuple(name for name in _TELLING if name in present)


def _cpu_facts() -> dict[str, str]:
    """The first processor's entry in /proc/cpuinfo; empty where there is none."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
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


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None


def _load() -> float | None:
    if _PROCESSORS.exists():
        before = _processor_times()
        time.sleep(_MOMENT)
        idle, all_times = (after - then for after, then in zip(_processor_times(), before, strict=True))
        return round((1 - idle / max(all_times, 1)) * (os.cpu_count() or 1), 2)
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _processor_times() -> tuple[int, int]:
    """Clock ticks that all processors were idle, and all that passed."""
    ticks = [int(count) for count in _PROCESSORS.read_text().splitlines()[0].split()[1:9]]
    return ticks[3] + ticks[4], sum(ticks)


def reset_peak() -> tuple[float, bool]:
    """Count the peak from what is resident now, where the system lets us.

    Returns: MiB that are resident now; whether the peak is counted from there. If not, the most that ever were resident
      before, by the imports for instance, stays the least that `memory_mib` gives as the peak.
    Raises:
      SettingError: the system does not tell.
    """
    try:
        _RESET.write_text("5")
    except OSError:
        return memory_mib()[0], False
    return memory_mib()[0], True


def forget_peak() -> float:
    """MiB that are resident now, from which the peak is then counted where the system lets us; see `reset_peak`."""
    return reset_peak()[0]


def memory_mib() -> tuple[float, float]:
    """MiB of this process that are resident now, and the most that ever were; the same where only one is known.

    Raises:
      SettingError: the system tells neither.
    """
    if _STATUS.exists():
        lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
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
