# SPDX-License-Identifier: Apache-2.0
"""Parts of a record: layers, where the run comes from, its plan, and what its ledger says. No torch is loaded."""

import dataclasses
import datetime
import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

from dpquant import native
from dpquant.machine import processor
from dpquant.privacy.entries import Contents
from dpquant.privacy.events import Event

if TYPE_CHECKING:
    from dpquant.privacy.plan import PrivacyPlan

_PACKAGES = {"numpy": "numpy", "torch": "torch", "dp_accounting": "dp-accounting", "cryptography": "cryptography"}


def utc_now() -> str:
    """Return the time, in UTC and whole seconds, as 2026-11-29T12:00:00Z."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerRecord:
    """Facts about one quantizable layer.

    Attributes:
      name: of the module in the model.
      macs: multiply-accumulates of the forward product for one example.
      times_quantized: number of epochs in which the policy quantized the layer.
      last_score: smoothed private impact after the last analysis; None without an analysis.
      gain: time in full precision over time quantized, measured before the run; None if it was not measured.
    """

    name: str
    macs: float
    times_quantized: int
    last_score: float | None
    gain: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where a run comes from. It names no host, no user and no folder.

    Attributes:
      run_id: random, public name of the run, as in its ledger.
      started: UTC, when the run began and had read no record. There is no end: how long a run takes is not released.
      cpu: the processor's name.
      instructions: its instruction sets that decide which products are fast.
      cores: that the run might use.
      system: operating system and architecture.
      versions: {package: version}, Python among them.
      native: whether the C++ kernels were there.
    """

    run_id: str
    started: str
    cpu: str
    instructions: list[str]
    cores: int
    system: str
    versions: dict[str, str]
    native: bool

    @classmethod
    def here(cls, run_id: str, started: str) -> Self:
        """Return the provenance of a run on this machine. Privacy: public facts."""
        cpu, instructions, cores = processor()
        found = {name: importlib.metadata.version(package) for name, package in _PACKAGES.items()}
        return cls(
            run_id=run_id,
            started=started,
            cpu=cpu,
            instructions=list(instructions),
            cores=cores,
            system=f"{platform.system()} {platform.machine()}",
            versions={"python": platform.python_version(), **found},
            native=native.kernels is not None,
        )

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Self:
        return cls(**fields)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessRecord:
    """On what one process of a run has computed at its end. It names no host.

    Attributes:
      cpu: the processor's name.
      instructions: its instruction sets that decide which products are fast.
      cores: that the process might use.
      threads: with which it computed.
      device: that it computed on, in words.
    """

    cpu: str
    instructions: list[str]
    cores: int
    threads: int
    device: str

    @classmethod
    def here(cls, threads: int, device: str) -> Self:
        """Return the record of this process. Privacy: public facts."""
        cpu, instructions, cores = processor()
        return cls(cpu=cpu, instructions=list(instructions), cores=cores, threads=threads, device=device)

    def to_json(self) -> bytes:
        """Return the record as JSON, for the other processes."""
        return json.dumps(dataclasses.asdict(self)).encode()


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupRecord:
    """The processes of a run, at its end.

    Attributes:
      world_size: their number.
      backend: of torch.distributed, by which they exchange sums, as `cpu:gloo`; empty for one process.
      processes: each of them, in their order.
    """

    world_size: int
    backend: str
    processes: list[ProcessRecord]

    @classmethod
    def of(cls, backend: str, processes: Sequence[bytes]) -> Self:
        """Return the record of processes that have told their own as JSON."""
        found = [ProcessRecord(**json.loads(text)) for text in processes]
        return cls(world_size=len(found), backend=backend, processes=found)

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Self:
        return cls(**{**fields, "processes": [ProcessRecord(**one) for one in fields["processes"]]})


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnalysisRecord:
    """The numbers of an `AnalysisPlan`."""

    count: int
    sample_rate: float
    expected_batch_size: float
    noise_multiplier: float
    max_norm: float
    repeats: int
    score: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanRecord:
    """The numbers of a `PrivacyPlan`; `epsilon` is its target, or the cost of the plan where the noise was given."""

    epsilon: float
    delta: float
    noise_multiplier: float
    max_grad_norm: float
    sample_rate: float
    expected_batch_size: float
    steps: int
    epochs: int
    noise: str
    records_per_person: int | None
    analysis: AnalysisRecord | None

    @classmethod
    def of(cls, plan: "PrivacyPlan") -> Self:
        """Return the numbers of a plan."""
        names = {field.name for field in dataclasses.fields(cls)} - {"analysis"}
        analysis = None if plan.analysis is None else AnalysisRecord(**dataclasses.asdict(plan.analysis))
        return cls(**{name: getattr(plan, name) for name in names}, analysis=analysis)

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Self:
        analysis = fields["analysis"]
        return cls(**{**fields, "analysis": None if analysis is None else AnalysisRecord(**analysis)})


@dataclasses.dataclass(frozen=True, kw_only=True)
class LedgerRecord:
    """What a run's ledger says at its end.

    How many processes have charged it is left out: when a process ends may follow memory and time, and so the sizes of
    batches.

    Attributes:
      head: hash of the last line, from which an earlier line cannot be removed unnoticed.
      format: of the file.
      research: a part of the randomness came from a seed, so that epsilon is no guarantee.
      events: what was charged, equal releases counted together.
    """

    head: str
    format: int
    research: bool
    events: list[Event]

    @classmethod
    def of(cls, contents: Contents) -> Self:
        """Return what a ledger says."""
        return cls(head=contents.head, format=contents.format, research=contents.research, events=list(contents.events))

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Self:
        return cls(**{**fields, "events": [Event(**event) for event in fields["events"]]})

    def count(self, kind: str) -> int:
        """Return the number of releases of a kind."""
        return sum(event.count for event in self.events if event.kind == kind)
