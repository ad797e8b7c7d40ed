# SPDX-License-Identifier: Apache-2.0
"""What a run did, as numbers: a frozen record and its JSON. No torch, and nothing that was computed from private data
without being charged.

Wall-clock times are kept apart, in `Timings`: a step takes as long as its Poisson batch is large, and that size is
private.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from dpquant.errors import DataError

if TYPE_CHECKING:
    from dpquant.runs.settings import TrainSettings
    from dpquant.training.private import PrivateTraining

SCHEMA = 2
"""Number of the record's form. Raise it with every change of a field, and keep reading the earlier ones."""
NOT_FOR_RELEASE = (
    "The operator's own, not for release: times follow the realised batch sizes, which are private. No privacy "
    "statement covers this file."
)
NOT_COVERED = "NOT COVERED: training accuracy was measured on private data and written down.\n"
# Fields of records that were written before times had a file of their own. They are read past, and nothing uses them.
_FORMER_FIELDS = frozenset({"seconds_train", "seconds_analysis", "seconds_total", "samples_per_second"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerRecord:
    """One quantizable layer.

    Attributes:
      name: as in the model.
      macs: multiply-accumulates of its forward product for one example.
      times_quantized: epochs in which it ran quantized.
      last_score: its private impact after the last analysis; None without one.
      gain: its time in full precision over its time quantized, as measured before the run; None where it was not.
    """

    name: str
    macs: float
    times_quantized: int
    last_score: float | None
    gain: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class EpochRecord:
    """One epoch. All of it is released. Of a record of schema 1 only the index and the test accuracy are known.

    Attributes:
      index: from 0.
      epsilon: spent at the end of it, at the run's delta. None: not recorded.
      accuracy_test: of the test set, in 0..1.
      layers_quantized: names of the layers that the policy had chosen. None: not recorded; an empty list: there were
        none.
      nonprivate_accuracy_train: of the training set, in 0..1, which no statement covers. None without `unsafe_metrics`.
      scores: {layer: smoothed private impact} after the analysis with which the epoch began. None: it had no analysis,
        or it is not recorded.
    """

    index: int
    epsilon: float | None
    accuracy_test: float
    layers_quantized: list[str] | None
    nonprivate_accuracy_train: float | None
    scores: dict[str, float] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunRecord:
    """Everything a reader of a run needs; units in the names. Accuracies are of the test set, in 0..1.

    Attributes:
      schema: number of the form in which the record is written, first in its file.
      execution: which backend ran and why, how many examples a backward pass took, what stayed in full precision.
      average: weight of the past in the average of parameters that was tested and saved; 0: the last parameters were.
      epsilon: what was spent, at `delta`; epsilon_analysis_share: the part of it that the analyses cost.
      format, rest: of the layers that the policy had chosen, and of the others.
      quantized_fraction_layers, quantized_fraction_macs: means over epochs; layers that the policy had chosen, and
        multiply-accumulates of all products that ran quantized.
      four_bit_fraction_macs: the part of them whose operands have at most four bits.
      per_epoch: what each epoch ran quantized, scored, reached and had spent.
      unsafe_metrics: training metrics were computed from private data; they are not covered by the statement.
    """

    schema: int = dataclasses.field(default=SCHEMA, init=False)
    dpquant: str
    torch: str
    command: str
    model: str
    dataset: str
    policy: str
    format: str
    rest: str
    backend: str
    execution: str
    optimizer: str
    lr: float
    average: float
    seed: int
    threads: int
    epochs: int
    steps: int
    accuracy_test: float
    epsilon: float
    delta: float
    epsilon_analysis_share: float
    noise_multiplier: float
    sample_rate: float
    expected_batch_size: float
    max_grad_norm: float
    quantized_fraction_layers: float
    quantized_fraction_macs: float
    four_bit_fraction_macs: float
    layers: list[LayerRecord]
    per_epoch: list[EpochRecord]
    statement: str
    unsafe_metrics: bool

    @property
    def accuracy_per_epoch(self) -> list[float]:
        """Return the test accuracy after each epoch."""
        return [epoch.accuracy_test for epoch in self.per_epoch]

    @classmethod
    def of(
        cls,
        settings: "TrainSettings",
        private: "PrivateTraining",
        per_epoch: Sequence[EpochRecord],
        *,
        command: str,
        torch: str,
        threads: int,
    ) -> Self:
        """Return the record of a run that has ended.

        Args:
          settings: of the run.
          private: the run, its last epoch over.
          per_epoch: one for every epoch.
          command: what the user typed.
          torch: its version.
          threads: that it computed with.
        Privacy: post-processing.
        """
        plan, policies, macs = private.plan, private.policies(), private.macs
        return cls(
            dpquant=importlib.metadata.version("dpquant"),
            torch=torch,
            command=command,
            model=settings.model,
            dataset=settings.data,
            policy=settings.policy,
            format=settings.format,
            rest=settings.rest,
            backend=private.backend,
            execution=str(private.execution),
            optimizer=settings.optimizer,
            lr=settings.lr,
            average=settings.average,
            seed=settings.seed,
            threads=threads,
            epochs=len(policies),
            steps=private.steps_taken,
            accuracy_test=per_epoch[-1].accuracy_test,
            epsilon=private.epsilon_spent(),
            delta=plan.delta,
            epsilon_analysis_share=plan.analysis_share(),
            noise_multiplier=plan.noise_multiplier,
            sample_rate=plan.sample_rate,
            expected_batch_size=plan.expected_batch_size,
            max_grad_norm=plan.max_grad_norm,
            quantized_fraction_layers=_mean([len(names) / max(len(macs), 1) for names in policies]),
            quantized_fraction_macs=_share_of_macs(private, most_bits=8),
            four_bit_fraction_macs=_share_of_macs(private, most_bits=4),
            layers=[
                LayerRecord(
                    name=name,
                    macs=macs[name],
                    times_quantized=sum(name in names for names in policies),
                    last_score=private.scores.get(name),
                    gain=private.execution.gains.get(name),
                )
                for name in macs
            ],
            per_epoch=list(per_epoch),
            statement=(NOT_COVERED if settings.unsafe_metrics else "") + private.statement(),
            unsafe_metrics=settings.unsafe_metrics,
        )

    def to_json(self) -> str:
        """Return the record as JSON, one field a line."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Return the record that a run wrote, in this form or an earlier one.

        Schema 1 had no number, knew of its epochs only their test accuracies, and at first held times, which are left
        out. Read, it is a record of the present schema in which the other facts of each epoch are None.

        Raises:
          DataError: not JSON, a newer schema, or a field is missing or unknown.
        """
        try:
            fields: dict[str, Any] = json.loads(text)
            schema = fields.pop("schema", 1)
            if isinstance(schema, int) and schema > SCHEMA:
                raise DataError(
                    f"Expected a record of schema 1 to {SCHEMA}; got schema={schema}, written by dpquant "
                    f"{fields.get('dpquant')}. It could be misread. Read it with that version, or a newer one."
                )
            fields = {name: value for name, value in fields.items() if name not in _FORMER_FIELDS}
            match schema:
                case 1:
                    fields["per_epoch"] = _epochs_of_schema_1(fields.pop("accuracy_per_epoch"))
                case 2:
                    fields["per_epoch"] = [EpochRecord(**epoch) for epoch in fields["per_epoch"]]
                case _:
                    raise ValueError(f"schema {schema}")
            return cls(**{**fields, "layers": [LayerRecord(**layer) for layer in fields["layers"]]})
        except DataError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(
                f"Expected a run's record; got one that cannot be read ({type(error).__name__}: {error}). "
                "It was changed, or written by another version. Read it with the version that wrote it."
            ) from error

    def write(self, path: Path) -> None:
        """Write the record, whole or not at all."""
        write_whole(path, self.to_json())

    @classmethod
    def read(cls, path: Path) -> Self:
        """Return the record in a file.

        Raises:
          DataError: there is none that can be read.
        """
        try:
            return cls.from_json(path.read_text())
        except OSError as error:
            raise DataError(f"Expected a readable record; got {path}: {error.strerror}. Check the path.") from error


def _epochs_of_schema_1(accuracies: Sequence[float]) -> list[EpochRecord]:
    unknown = {"epsilon": None, "layers_quantized": None, "nonprivate_accuracy_train": None, "scores": None}
    return [EpochRecord(index=index, accuracy_test=value, **unknown) for index, value in enumerate(accuracies)]


def _share_of_macs(private: "PrivateTraining", most_bits: int) -> float:
    """Return the part of all multiply-accumulates whose operands have at most `most_bits` bits, mean over epochs."""
    chosen, rest = private.execution.chosen.share(most_bits), private.execution.rest.share(most_bits)
    total = sum(private.macs.values()) or 1.0
    shares = [sum(private.macs[name] for name in names) / total for names in private.policies()]
    return _mean([share * chosen + (1 - share) * rest for share in shares])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def examples_per_second(private: "PrivateTraining") -> float:
    """Return the expected batch size times the steps taken, over the time of steps and analyses.

    How many records a step drew is private, and the time follows it: the speed is for the operator alone.
    """
    seconds = private.seconds_train + private.seconds_analysis
    return private.plan.expected_batch_size * private.steps_taken / seconds


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timings:
    """Wall-clock times of a run so far. For its operator: see `NOT_FOR_RELEASE`, with which the file begins.

    Attributes:
      note: NOT_FOR_RELEASE.
      seconds_total: since the run began, measurements at its start included.
      seconds_train, seconds_analysis: of its steps and of its analyses.
      seconds_at_epoch_ends: since the run began, one number an epoch.
      examples_per_second: expected batch sizes over the time of steps and analyses.
    """

    note: str = NOT_FOR_RELEASE
    seconds_total: float
    seconds_train: float
    seconds_analysis: float
    seconds_at_epoch_ends: list[float]
    examples_per_second: float

    @classmethod
    def of(cls, private: "PrivateTraining", began: float, ends: Sequence[float]) -> Self:
        """Return the times of a run so far.

        Args:
          private: the run, which has taken a step.
          began: when it began, by `time.perf_counter`.
          ends: of its epochs so far, by the same clock.
        """
        return cls(
            seconds_total=time.perf_counter() - began,
            seconds_train=private.seconds_train,
            seconds_analysis=private.seconds_analysis,
            seconds_at_epoch_ends=[end - began for end in ends],
            examples_per_second=examples_per_second(private),
        )

    def write(self, path: Path) -> None:
        """Write the times as JSON, whole or not at all."""
        write_whole(path, json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """Return the times in a file; None where there is none, as their operator may keep them elsewhere.

        Raises:
          DataError: the file is not one of times.
        """
        try:
            return cls(**json.loads(path.read_text()))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            raise DataError(
                f"Expected readable timings; got {path}: {type(error).__name__}: {error}. Nothing but a run writes "
                "them. Remove the file to go on without."
            ) from error


def write_whole(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with replacing(path) as draft:
        draft.write_text(text)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give the path of a draft to write. Once the draft is on disk it takes the file's place; if not, it is removed.

    A reader therefore finds the former file or the new one, whole, even after a crash.
    """
    draft = path.with_name(path.name + ".tmp")
    try:
        yield draft
        with draft.open("rb+") as file:
            os.fsync(file.fileno())
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
