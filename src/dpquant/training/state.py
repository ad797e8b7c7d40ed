# SPDX-License-Identifier: Apache-2.0
"""State of a run between two steps: everything that it needs to continue, besides parameters and optimizer state.

A state holds only released numbers and public facts: the numbers of steps and analyses, scores, the layers of each
epoch, the hash of the ledger's last line, and decisions measured on this machine. It holds no key.
"""

import dataclasses
import enum
import json
from collections.abc import Mapping
from typing import Any, Self

from dpquant.errors import DataError, DPQuantError
from dpquant.formats import Blocks, Precision, Recipe, RoleFormat, Rounding
from dpquant.number_formats import NumberFormat
from dpquant.privacy.entries import NO_HASH
from dpquant.training.execution import Execution

_FORMAT = 1  # format number of the JSON; other formats are refused


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunState:
    """State of a run between two steps.

    Attributes:
      execution: precisions, microbatch sizes and excluded layers. A run that continues must not measure them again,
        because scores exist only for the layers that were not excluded.
      steps_taken: number of training steps charged, which is the place in the plan.
      steps_lost: those of them whose result was lost, because the run stopped before the next checkpoint.
      analyses_made: number of analyses charged.
      draws: number of batches drawn so far, which is the attempt number of the last one. A step that is drawn for again
        therefore has another attempt number.
      scores: {layer: smoothed private impact}; empty before the first analysis.
      epoch: index of the epoch begun last, -1 before the first. Epochs whose steps were all lost are never begun.
      policies: for each epoch begun, the names of the layers that run quantized.
      ledger_head: hash of the ledger's last line.
      choices: decisions measured on this machine, from `Choices.made`.
      processes: number of processes of the run; of one that has had several numbers of them, the largest.
      broken: reason why epsilon does not hold after all; empty as long as it holds.
    Privacy: post-processing of charged releases.
    """

    execution: Execution
    steps_taken: int = 0
    steps_lost: int = 0
    analyses_made: int = 0
    draws: int = 0
    scores: Mapping[str, float] = dataclasses.field(default_factory=dict)
    epoch: int = -1
    policies: tuple[tuple[str, ...], ...] = ()
    ledger_head: str = NO_HASH
    choices: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    processes: int = 1
    broken: str = ""

    def to_json(self) -> str:
        """Return the state as JSON for `from_json`. Every float reads back as the same number."""
        return json.dumps({"format": _FORMAT, **dataclasses.asdict(self)}, default=_written) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Return the state that `to_json` wrote as `text`.

        Raises:
          DataError: the text is not a state, or has another format number.
        """
        try:
            read = json.loads(text)
            if read.pop("format") != _FORMAT:
                raise ValueError("another format")
            read = {"processes": 1, **read}  # earlier versions had no such field
            if read.keys() != {field.name for field in dataclasses.fields(cls)}:
                raise ValueError("other fields")
            policies = tuple(tuple(names) for names in read["policies"])
            return cls(**{**read, "execution": _execution(read["execution"]), "policies": policies})
        except (ValueError, KeyError, TypeError, AttributeError, DPQuantError) as error:
            raise DataError(
                f"Expected the state of a run, format {_FORMAT}; got something else: {type(error).__name__}: {error}. "
                "It cannot be continued from there. Give what a run of this version has written."
            ) from error


def _written(value: Any) -> Any:
    """Return a value that JSON cannot represent, an enum, as its own value."""
    if isinstance(value, enum.Enum):
        return value.value
    raise TypeError(f"a {type(value).__name__}")


def _execution(read: dict[str, Any]) -> Execution:
    """Return the execution that was written as `read`."""
    known = {
        "chosen": _precision(read["chosen"]),
        "rest": _precision(read["rest"]),
        "excluded_layers": tuple(read["excluded_layers"]),
    }
    return Execution(**{**read, **known})


def _precision(read: dict[str, Any]) -> Precision:
    """Return the precision that was written as `read`, with whole recipes: a user's own recipe has no known name."""
    return Precision(**{product: None if one is None else _recipe(one) for product, one in read.items()})


def _recipe(read: dict[str, Any]) -> Recipe:
    return Recipe(name=read["name"], **{role: _role(one) for role, one in read.items() if role != "name"})


def _role(read: dict[str, Any]) -> RoleFormat:
    known = {
        "format": NumberFormat(**read["format"]),
        "rounding": Rounding(read["rounding"]),
        "blocks": _blocks(read.get("blocks")),  # earlier versions had none
    }
    return RoleFormat(**{**read, **known})


def _blocks(read: dict[str, Any] | None) -> Blocks | None:
    if read is None:
        return None
    return Blocks(size=read["size"], scale=None if read["scale"] is None else NumberFormat(**read["scale"]))
