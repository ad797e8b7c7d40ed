# SPDX-License-Identifier: Apache-2.0
"""What a run did, as numbers: a frozen record and its JSON. No torch, and nothing that was computed from private data
without being charged.

Wall-clock times are kept apart, in `Timings`: a step takes as long as its Poisson batch is large, and that size is
private.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from dpquant.errors import DataError

NOT_FOR_RELEASE = (
    "The operator's own, not for release: times follow the realised batch sizes, which are private. No privacy "
    "statement covers this file."
)
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
class RunRecord:
    """Everything a reader of a run needs; units in the names. Accuracies are of the test set, in 0..1.

    Attributes:
      execution: which backend ran and why, how many examples a backward pass took, what stayed in full precision.
      average: weight of the past in the average of parameters that was tested and saved; 0: the last parameters were.
      epsilon: what was spent, at `delta`; epsilon_analysis_share: the part of it that the analyses cost.
      format, rest: of the layers that the policy had chosen, and of the others.
      quantized_fraction_layers, quantized_fraction_macs: means over epochs; layers that the policy had chosen, and
        multiply-accumulates of all products that ran quantized.
      four_bit_fraction_macs: the part of them whose operands have at most four bits.
      unsafe_metrics: training metrics were computed from private data; they are not covered by the statement.
    """

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
    accuracy_per_epoch: list[float]
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
    statement: str
    unsafe_metrics: bool

    def to_json(self) -> str:
        """The record as JSON, one field a line."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The record that `to_json` wrote. One of the older form, which also held times, is read without them.

        Raises:
          DataError: not JSON, or a field is missing or unknown.
        """
        try:
            written: dict[str, Any] = json.loads(text)
            fields = {name: value for name, value in written.items() if name not in _FORMER_FIELDS}
            return cls(**{**fields, "layers": [LayerRecord(**layer) for layer in fields["layers"]]})
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(
                f"Expected a run's record; got one that cannot be read ({type(error).__name__}: {error}). "
                "It was changed, or written by another version. Read it with the version that wrote it."
            ) from error

    def write(self, path: Path) -> None:
        """Write the record, whole or not at all."""
        write_whole(path, self.to_json())

    @classmethod
    def read(cls, path: Path) -> Self:
        """The record in a file.

        Raises:
          DataError: there is none that can be read.
        """
        try:
            return cls.from_json(path.read_text())
        except OSError as error:
            raise DataError(f"Expected a readable record; got {path}: {error.strerror}. Check the path.") from error


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

    def write(self, path: Path) -> None:
        """Write the times as JSON, whole or not at all."""
        write_whole(path, json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """The times in a file; None where there is none, as their operator may keep them elsewhere.

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
