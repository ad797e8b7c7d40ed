# SPDX-License-Identifier: Apache-2.0
"""Record of a run: a frozen dataclass and its JSON. This module does not import torch.

The record holds nothing computed from private data without a charge, except what `unsafe_metrics` adds and marks.

Wall-clock times are not in the record but in `timings.py`: the time of a step depends on the size of its Poisson batch,
which is private. The record therefore has the time when a run began, before any record was read, and not its end.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from dpquant.errors import DataError, expect
from dpquant.formats import AUTO
from dpquant.runs.provenance import GroupRecord, LayerRecord, LedgerRecord, PlanRecord, Provenance
from dpquant.version import version

if TYPE_CHECKING:
    from dpquant.runs.settings import TrainSettings
    from dpquant.training.private import PrivateTraining

SCHEMA = 5
"""Version of the record's format. Raise it with every change of a field, and keep reading the earlier formats."""
NOT_COVERED = "NOT COVERED: training accuracy was measured on private data and written down.\n"
_SINCE_4 = (
    *("metrics_test", "source"),
    *("provenance", "plan", "ledger", "epsilon_rdp", "records", "model_sha256", "declared"),
)
# Fields of old records, from before `timings.json` existed. They are ignored.
_FORMER_FIELDS = frozenset({"seconds_train", "seconds_analysis", "seconds_total", "samples_per_second"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class EpochRecord:
    """Results of one epoch, all of which are released. A record of schema 1 has only `index` and `accuracy_test`.

    Attributes:
      index: from 0.
      epsilon: spent by the end of the epoch, at the run's delta. None: not recorded.
      accuracy_test: accuracy on the test set, in 0..1; None for a regression.
      metrics_test: {metric of the task: its value on the test set}. None: not recorded.
      layers_quantized: names of the layers that the policy chose, possibly none. None: not recorded.
      nonprivate_accuracy_train: accuracy on the training set, in 0..1, which the privacy statement does not cover. None
        without `unsafe_metrics`.
      scores: {layer: smoothed private impact} after the analysis at the start of the epoch. None: the epoch had no
        analysis, or it is not recorded.
    """

    index: int
    epsilon: float | None
    accuracy_test: float | None
    layers_quantized: list[str] | None
    nonprivate_accuracy_train: float | None
    scores: dict[str, float] | None
    metrics_test: dict[str, float] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunRecord:
    """Settings, results and privacy statement of a run. Accuracies are of the test set, in 0..1.

    Attributes:
      schema: version of the record's format, the first field in its file.
      source: public facts on how tables or texts were read, such as spec, tokenizer and buckets. None: not recorded.
      execution: backend and the reason for it, microbatch size, and the layers that stay in full precision.
      device: that the run computed on, with the name of a GPU. None: not recorded.
      average: decay of the average of parameters that was tested and saved; 0: the last parameters were.
      epsilon: spent by the run, at `delta`.
      epsilon_analysis_share: share of epsilon that the analyses cost, in 0..1.
      format, rest: precision of the layers that the policy chose, and of the other layers. With `format=auto`, what it
        took; `execution` says why.
      quantized_fraction_layers: share of the layers that the policy chose, mean over epochs.
      quantized_fraction_macs: share of the multiply-accumulates that ran quantized, mean over epochs.
      four_bit_fraction_macs: share of the multiply-accumulates whose operands have at most four bits, mean over epochs.
      layers: one entry for each quantizable layer.
      per_epoch: one entry for each epoch.
      statement: the privacy statement.
      unsafe_metrics: training accuracy was computed from private data, which the statement does not cover.
      provenance: where the run comes from. It and all fields after it are None where they are not recorded.
      plan: every number of the privacy plan.
      ledger: what the ledger has charged, and the hash of its last line.
      epsilon_rdp: epsilon by the second accountant, a check.
      records: public number of training records, given or published; None: there is none.
      model_sha256: of model.safetensors.
      declared: the user's own words, {name of a question: answer}.
      group: the processes of the run. None: not recorded.
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
    device: str | None
    epochs: int
    steps: int
    accuracy_test: float | None
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
    metrics_test: dict[str, float] | None
    source: dict[str, Any] | None
    provenance: Provenance | None
    plan: PlanRecord | None
    ledger: LedgerRecord | None
    epsilon_rdp: float | None
    records: int | None
    model_sha256: str | None
    declared: dict[str, str] | None
    group: GroupRecord | None

    @property
    def accuracy_per_epoch(self) -> list[float]:
        """Return the test accuracy after each epoch; [] for a regression."""
        return [epoch.accuracy_test for epoch in self.per_epoch if epoch.accuracy_test is not None]

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
        device: str,
        source: Mapping[str, Any],
        provenance: Provenance,
        ledger: LedgerRecord,
        model_sha256: str,
        group: GroupRecord,
    ) -> Self:
        """Return the record of a run that has ended.

        Args:
          settings: of the run.
          private: the run, after its last epoch.
          per_epoch: one entry for each epoch.
          command: the command line of the run.
          torch: version of torch.
          threads: number of threads that torch used.
          device: that the run computed on, in words.
          source: public facts on how the data set was read.
          provenance: where the run comes from.
          ledger: what the ledger says.
          model_sha256: of the file of the model.
          group: the processes of the run.
        Privacy: post-processing.
        """
        from dpquant.privacy import accounting  # takes seconds to load, and reading a record needs none of it

        plan, policies, macs = private.plan, private.policies(), private.macs
        return cls(
            dpquant=version(),
            torch=torch,
            command=command,
            model=settings.model,
            dataset=settings.data,
            policy=settings.policy,
            format=private.execution.chosen.name if settings.format == AUTO else settings.format,
            rest=settings.rest,
            backend=private.backend,
            execution=str(private.execution),
            optimizer=settings.optimizer,
            lr=settings.lr,
            average=settings.average,
            seed=settings.seed,
            threads=threads,
            device=device,
            epochs=len(policies),
            steps=private.steps_taken,
            accuracy_test=per_epoch[-1].accuracy_test,
            epsilon=private.epsilon_spent(),
            delta=plan.delta,
            epsilon_analysis_share=accounting.analysis_share(private.events(), plan.delta),
            noise_multiplier=plan.noise_multiplier,
            sample_rate=plan.sample_rate,
            expected_batch_size=plan.expected_batch_size,
            max_grad_norm=plan.max_grad_norm,
            quantized_fraction_layers=_mean([len(names) / max(len(macs), 1) for names in policies]),
            quantized_fraction_macs=share_of_macs(private, policies, most_bits=8),
            four_bit_fraction_macs=share_of_macs(private, policies, most_bits=4),
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
            metrics_test=per_epoch[-1].metrics_test,
            source=dict(source),
            provenance=provenance,
            plan=PlanRecord.of(plan),
            ledger=ledger,
            epsilon_rdp=accounting.epsilon(private.events(), plan.delta, "rdp"),
            records=settings.public_records,
            model_sha256=model_sha256,
            declared=dict(settings.declared or {}),
            group=group,
        )

    def to_json(self) -> str:
        """Return the record as JSON, one field per line."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, *, where: str = "") -> Self:
        """Return the record from its JSON, in the present format or an earlier one.

        Schema 1 has no `schema` field and only the test accuracy of each epoch; the other facts of an epoch become
        None. Its first files hold times, which are ignored. Schemas 1 and 2 do not name the device. Before schema 4 a
        record does not hold metrics, source, provenance, plan, ledger and what comes after them, and before schema 5
        not the processes.

        Args:
          text: of the record.
          where: it was read, for errors, as " in FILE".
        Raises:
          DataError: the text is not JSON, the schema is newer, or a field is missing or unknown.
        """
        try:
            fields: dict[str, Any] = json.loads(text)
            schema = fields.pop("schema", 1)
            if isinstance(schema, int) and schema > SCHEMA:
                raise DataError(
                    f"Expected a record of schema 1 to {SCHEMA}{where}; got schema={schema}, written by dpquant "
                    f"{fields.get('dpquant')}. It could be misread. Read it with that version, or a newer one."
                )
            fields = {name: value for name, value in fields.items() if name not in _FORMER_FIELDS}
            match schema:
                case 1:
                    fields["per_epoch"] = _epochs_of_schema_1(fields.pop("accuracy_per_epoch"))
                case 2 | 3 | 4 | 5:
                    new: dict[str, Any] = {"metrics_test": None} if schema < 4 else {}
                    fields["per_epoch"] = [EpochRecord(**epoch, **new) for epoch in fields["per_epoch"]]
                case _:
                    raise ValueError(f"schema {schema}")
            if schema < 4:
                fields |= dict.fromkeys(_SINCE_4)
            else:
                fields |= _parts_of(fields)
            if schema < 3:
                fields["device"] = None
            if schema < 5:
                fields["group"] = None
            return cls(**{**fields, "layers": [LayerRecord(**layer) for layer in fields["layers"]]})
        except DataError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(
                f"Expected a run's record{where}; got one that cannot be read ({type(error).__name__}: {error}). "
                "It was changed, or written by another version. Read it with the version that wrote it."
            ) from error

    def write(self, path: Path) -> None:
        """Write the record to a file, completely or not at all."""
        write_whole(path, self.to_json())

    @classmethod
    def read(cls, path: Path) -> Self:
        """Return the record in a file.

        Raises:
          DataError: the file cannot be read, or holds no record.
        """
        expect("path", path, Path, "a pathlib.Path", "Give pathlib.Path('record.json')", DataError)
        try:
            return cls.from_json(path.read_text(encoding="utf-8"), where=f" in {path}")
        except UnicodeDecodeError as error:
            raise DataError(
                f"Expected a run's record in {path}; got bytes that are not UTF-8. Restore it from a copy."
            ) from error
        except OSError as error:
            raise DataError(f"Expected a readable record; got {path}: {error.strerror}. Check the path.") from error


def metrics_line(epoch: EpochRecord, *, scores: bool = True) -> str:
    """Return an epoch's line of metrics.jsonl, without its end.

    Args:
      epoch: what the line says.
      scores: whether it has the scores of an analysis, which the first runs of schema 4 left out.
    """
    line = {
        "epoch": epoch.index,
        "epsilon": epoch.epsilon,
        "accuracy_test": epoch.accuracy_test,
        "metrics_test": epoch.metrics_test,
        "layers_quantized": epoch.layers_quantized,
    }
    if epoch.nonprivate_accuracy_train is not None:
        line["nonprivate_accuracy_train"] = epoch.nonprivate_accuracy_train
    if scores and epoch.scores is not None:
        line["scores"] = epoch.scores
    return json.dumps(line)


def _parts_of(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the nested parts of a record since schema 4, each of which may be null."""
    parts = {"provenance": Provenance, "plan": PlanRecord, "ledger": LedgerRecord, "group": GroupRecord}
    return {
        name: None if fields.get(name) is None else part.from_fields(fields[name])
        for name, part in parts.items()
        if name in fields
    }


def _epochs_of_schema_1(accuracies: Sequence[float]) -> list[EpochRecord]:
    new: Any = dict.fromkeys(("epsilon", "layers_quantized", "nonprivate_accuracy_train", "scores", "metrics_test"))
    return [EpochRecord(index=index, accuracy_test=value, **new) for index, value in enumerate(accuracies)]


def share_of_macs(private: "PrivateTraining", policies: Sequence[Collection[str]], most_bits: int) -> float:
    """Return the share of the multiply-accumulates whose operands have at most `most_bits` bits, mean over epochs.

    Args:
      private: the run.
      policies: for each epoch, the names of the layers that the policy chose.
      most_bits: of an operand.
    """
    chosen, rest = private.execution.chosen.share(most_bits), private.execution.rest.share(most_bits)
    total = sum(private.macs.values()) or 1.0
    shares = [sum(private.macs[name] for name in names) / total for names in policies]
    return _mean([share * chosen + (1 - share) * rest for share in shares])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_whole(path: Path, text: str, *, flush: bool = True) -> None:
    """Write a text file completely or not at all; `flush` as for `replacing`."""
    with replacing(path, flush=flush) as draft:
        draft.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def replacing(path: Path, *, flush: bool = True) -> Iterator[Path]:
    """Context: yields the path of a draft, which replaces the file on exit. After an exception the draft is removed.

    The draft is flushed to disk first. A reader therefore finds the old file or the new one, complete, even after a
    crash. Without `flush` this costs no time, and holds unless the machine itself crashes.
    """
    draft = path.with_name(path.name + ".tmp")
    try:
        yield draft
        if flush:
            with draft.open("rb+") as file:
                os.fsync(file.fileno())
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
