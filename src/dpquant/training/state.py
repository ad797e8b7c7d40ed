# SPDX-License-Identifier: Apache-2.0
"""Where a run stands: all that it needs in order to go on, beside the parameters and the optimizer's state.

A state holds released numbers and public facts alone: how many steps and analyses were taken, scores, the layers of
each epoch, the head of the ledger, and what was measured on this machine. There is no key in it.
"""

import dataclasses
import enum
import json
from collections.abc import Mapping
from typing import Any, Self

from dpquant.errors import DataError, DPQuantError
from dpquant.formats import NumberFormat, Precision, Recipe, RoleFormat, Rounding
from dpquant.privacy.ledger import NO_HASH
from dpquant.training.execution import Execution

_FORMAT = 1  # of the JSON; another one is not read


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunState:
    """A run between two steps.

    Attributes:
      execution: precisions, microbatch sizes and spared layers: what was measured decides what is allowed.
      steps_taken, analyses_made: what has been charged.
      draws: batches that were drawn so far. It numbers attempts: a step that is drawn for again has another one.
      scores: {layer: smoothed private impact}, empty before the first analysis.
      policies: for each epoch begun, the names of the layers that ran quantized.
      ledger_head: hash of the ledger's last line.
      choices: what was decided by measuring, as of `Choices.made`.
      broken: why epsilon does not hold after all; empty as long as it does.
    Privacy: post-processing of what the ledger was charged for.
    """

    execution: Execution
    steps_taken: int = 0
    analyses_made: int = 0
    draws: int = 0
    scores: Mapping[str, float] = dataclasses.field(default_factory=dict)
    policies: tuple[tuple[str, ...], ...] = ()
    ledger_head: str = NO_HASH
    choices: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    broken: str = ""

    def to_json(self) -> str:
        """Return the state as JSON that `from_json` takes. Floats read back as they were."""
        return json.dumps({"format": _FORMAT, **dataclasses.asdict(self)}, default=_written) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Return the state that was written as `text`.

        Raises:
          DataError: it is no state, or one of another format.
        """
        try:
            read = json.loads(text)
            if read.pop("format") != _FORMAT:
                raise ValueError("another format")
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
    """What JSON has no form for."""
    if isinstance(value, enum.Enum):
        return value.value
    raise TypeError(f"a {type(value).__name__}")


def _execution(read: dict[str, Any]) -> Execution:
    known = {
        "chosen": _precision(read["chosen"]),
        "rest": _precision(read["rest"]),
        "excluded_layers": tuple(read["excluded_layers"]),
    }
    return Execution(**{**read, **known})


def _precision(read: dict[str, Any]) -> Precision:
    """Recipes are written out whole: a user's own may have any name."""
    return Precision(**{product: None if one is None else _recipe(one) for product, one in read.items()})


def _recipe(read: dict[str, Any]) -> Recipe:
    return Recipe(name=read["name"], **{role: _role(one) for role, one in read.items() if role != "name"})


def _role(read: dict[str, Any]) -> RoleFormat:
    format, rounding = NumberFormat(**read["format"]), Rounding(read["rounding"])
    return RoleFormat(**{**read, "format": format, "rounding": rounding})
