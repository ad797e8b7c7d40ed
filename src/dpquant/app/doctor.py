# SPDX-License-Identifier: Apache-2.0
"""`dpquant doctor`: what dpquant finds on this machine, for its user and for whoever helps him. Reads no records.

The facts can be pasted into a bug report: they name no host, no user and no folder but the place of the cache, in which
the home directory is shortened to ~.
"""

import dataclasses
import importlib.metadata
import json
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from dpquant import native
from dpquant.data.sizes import PUBLIC_SIZES
from dpquant.machine import memory_gib, processor
from dpquant.version import version

_PACKAGES = ("torch", "torchvision", "numpy", "scipy", "dp-accounting", "cryptography", "safetensors")
_EVERYTHING = "all"  # the extra that names the others
_WITHOUT_NETWORK = "digits"  # comes with scikit-learn
_LITTLE_GIB = 2.0
_RECIPE = "luq-fp4"  # of the default settings
_REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)(?P<rest>[^;]*);.*\bextra\s*==\s*['\"](?P<extra>[\w-]+)['\"]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Health:
    """What was found on a machine.

    Attributes:
      network: when dpquant uses it, in words.
      versions: {package: version}, with dpquant and Python first.
      system: operating system and architecture.
      processor: its name.
      instructions: its instruction sets that decide which products are fast.
      cores, threads: that this process may use, and that torch computes with.
      native: whether the C++ kernels are there.
      native_obstacle: why not; "" if they are.
      devices: that torch sees, in words; the CPU is none of them.
      backend: that `auto` takes for the default format on the default device.
      backend_reason: why.
      memory_gib, memory_free_gib: that this process may use, and that nobody uses now; None: not known.
      disk_free_gib: where the command was given.
      cache: folder of decisions by timing; "off" where there is none.
      cache_mib: size of the files in it.
      extras: {name: whether all of its packages are there}.
    """

    network: str
    versions: Mapping[str, str]
    system: str
    processor: str
    instructions: Sequence[str]
    cores: int
    threads: int
    native: bool
    native_obstacle: str
    devices: Sequence[str]
    backend: str
    backend_reason: str
    memory_gib: float | None
    memory_free_gib: float | None
    disk_free_gib: float
    cache: str
    cache_mib: float
    extras: Mapping[str, bool]

    @classmethod
    def here(cls) -> "Health":
        """Return the facts of this machine. Loads torch, and reads no records."""
        import torch

        from dpquant.backends.choose import CACHE, file_in
        from dpquant.backends.registry import reason_for, resolve
        from dpquant.formats import precision
        from dpquant.runs.devices import described, device_of

        cpu, instructions, cores = processor()
        device, precisions = device_of("auto"), [precision(_RECIPE)]
        backend = resolve("auto", precisions, device)
        kept = file_in(os.environ.get(CACHE, ""))
        return cls(
            network=network(),
            versions={
                **{"dpquant": version(), "python": platform.python_version()},
                **{name: importlib.metadata.version(name) for name in _PACKAGES},
            },
            system=f"{platform.system()} {platform.machine()}",
            processor=cpu,
            instructions=instructions,
            cores=cores,
            threads=torch.get_num_threads(),
            native=native.kernels is not None,
            native_obstacle=native.obstacle or "",
            devices=[described(torch.device("cuda", number)) for number in range(torch.cuda.device_count())],
            backend=backend.name,
            backend_reason=reason_for(backend, precisions, device),
            memory_gib=memory_gib(),
            memory_free_gib=memory_free_gib(),
            disk_free_gib=shutil.disk_usage(Path.cwd()).free / 2**30,
            cache="off" if kept is None else shortened(kept.parent),
            cache_mib=0.0 if kept is None else size_mib(kept.parent),
            extras=extras(importlib.metadata.requires("dpquant") or ()),
        )

    @property
    def rows(self) -> list[tuple[str, str]]:
        """All facts in words: (what, how it is)."""
        memory = "not known" if self.memory_gib is None else f"{self.memory_gib:.1f} GiB"
        free = "" if self.memory_free_gib is None else f", {self.memory_free_gib:.1f} GiB free"
        have = [name for name, there in self.extras.items() if there]
        lack = [name for name, there in self.extras.items() if not there]
        return [
            ("network", self.network),
            *self.versions.items(),
            ("system", self.system),
            ("processor", f"{self.processor}, {self.cores} cores"),
            ("instructions", " ".join(self.instructions) or "none that dpquant knows"),
            ("threads", str(self.threads)),
            ("native module", "yes" if self.native else f"{native.SLOWER} ({self.native_obstacle})"),
            ("GPU", ", ".join(self.devices) or "none"),
            ("backend", f"{self.backend} for {_RECIPE}: {self.backend_reason}"),
            ("memory", f"{memory}{free}"),
            ("disk", f"{self.disk_free_gib:.1f} GiB free"),
            ("cache", self.cache if self.cache == "off" else f"{self.cache}, {self.cache_mib:.1f} MiB"),
            ("extras", f"{', '.join(have) or 'none'}; missing: {', '.join(lack) or 'none'}"),
        ]

    @property
    def advice(self) -> list[str]:
        """What could be better, with what to do."""
        found = []
        if not self.native:
            found.append(
                "The C++ kernels are missing: the same results, slower. With a C++ compiler at hand: "
                "pip install --force-reinstall --no-deps dpquant"
            )
        if self.disk_free_gib < _LITTLE_GIB:
            found.append(f"Little room: a run keeps two checkpoints, and {self.disk_free_gib:.1f} GiB are free here.")
        if self.memory_free_gib is not None and self.memory_free_gib < _LITTLE_GIB:
            found.append(f"Little memory is free: {self.memory_free_gib:.1f} GiB. --memory limits what a run takes.")
        found += [
            f"For {_EXTRAS.get(name, name)}: pip install 'dpquant[{name}]'"
            for name, there in self.extras.items()
            if not there
        ]
        return found

    def to_json(self) -> str:
        """Return the facts and the advice as JSON."""
        return json.dumps({**dataclasses.asdict(self), "advice": self.advice}, indent=2) + "\n"


_EXTRAS = {
    "text": "pretrained networks and tokenizers",
    "arrow": "Parquet files",
    "onnx": "exporting to ONNX",
    "bench": "measuring Opacus beside dpquant",
    "tensorboard": "TensorBoard files",
    "mlflow": "runs in MLflow",
}


def network() -> str:
    """Return in words when dpquant uses the network."""
    *most, last = (name for name in PUBLIC_SIZES if name != _WITHOUT_NETWORK)
    return (
        f"never used, but to fetch {', '.join(most)} or {last} where their files are missing; nothing is sent, but by "
        "--track to the trackers that it names"
    )


def memory_free_gib(proc: Path = Path("/proc")) -> float | None:
    """Return the GiB of memory that programs could still take; None where the system does not say.

    Args:
      proc: where the file system of processes is mounted.
    """
    try:
        lines = dict(
            line.split(":", 1) for line in (proc / "meminfo").read_text(encoding="utf-8").splitlines() if ":" in line
        )
        return int(lines["MemAvailable"].split()[0]) / 2**20
    except (OSError, KeyError, ValueError, IndexError):
        return None


def size_mib(folder: Path) -> float:
    """Return the MiB of the files in a folder; 0 if it is not there."""
    return sum(path.stat().st_size for path in folder.glob("*") if path.is_file()) / 2**20


def shortened(path: Path) -> str:
    """Return a path in which the home directory is ~, as it names the user."""
    home = Path.home()
    return f"~/{path.relative_to(home)}" if path.is_relative_to(home) else str(path)


def extras(requirements: Iterable[str], is_there: Callable[[str], bool] | None = None) -> dict[str, bool]:
    """Return for each extra of dpquant whether its packages are installed.

    Args:
      requirements: of dpquant, as its metadata has them.
      is_there: returns whether a package is installed; None: it is looked up.
    """
    found: dict[str, bool] = {}
    for match in filter(None, map(_REQUIREMENT.match, requirements)):
        if match["extra"] != _EVERYTHING:
            found[match["extra"]] = found.get(match["extra"], True) and (is_there or _is_installed)(match["name"])
    return found


def _is_installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
