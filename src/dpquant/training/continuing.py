# SPDX-License-Identifier: Apache-2.0
"""Saving a run between two steps, and continuing from what was saved.

A checkpoint holds the model, the optimizer, the run's state and whatever else the user names. It holds no key: a
process that continues draws with a fresh one.

    charged when the run stopped     1 2 3 4 5 6 7 | 8 9 10      the plan allows ten steps
    checkpoint after                 4
    lost                                     5 6 7               their results are gone, their charges stay
    taken by the process that continues              8 9 10

The steps that were lost are not taken again, because the budget does not hold them twice. A repeatable run, which is
not private, does take them again: from the same key it draws the same batches and the same noise, and a release that is
made twice is one release.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from dpquant.errors import DataError, LedgerError, SettingError, expect
from dpquant.privacy.analysis_plan import AnalysisPlan
from dpquant.privacy.events import Kind
from dpquant.privacy.mechanism import Charges, Mechanism
from dpquant.privacy.plan import PrivacyPlan
from dpquant.training.checkpoint import Checkpoint
from dpquant.training.execution import Execution
from dpquant.training.state import RunState

_OWN = ("model", "optimizer")


@runtime_checkable
class Stateful(Protocol):
    """What can be saved and loaded: a learning-rate scheduler, an averaged model, ..."""

    def state_dict(self) -> dict[str, Any]:
        """Return a state of tensors, numbers, text, lists and dictionaries."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:
        """Take over such a state."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Parts:
    """The parts of a run whose state a checkpoint holds.

    Attributes:
      model: the prepared model.
      optimizer: of its parameters, or what holds the state of one.
      plan: the privacy settings, which must be the same when the run continues.
      others: {name: whatever else the user saves}.
    """

    model: nn.Module
    optimizer: Stateful
    plan: PrivacyPlan
    others: Mapping[str, Stateful]

    def __post_init__(self):
        if taken := [name for name in self.others if name in _OWN]:
            raise SettingError(
                f"Expected other names than {' and '.join(_OWN)}; got {taken[0]}. The run saves these itself. Name it "
                "otherwise."
            )

    def save(self, path: Path, state: RunState) -> None:
        """Write the checkpoint of a run with this state.

        Raises:
          SettingError: a part holds what only pickle could save, or the folder cannot be written.
        Privacy: post-processing.
        """
        for name, one in self.others.items():
            todo = "Name an object that has them, as a learning-rate scheduler"
            expect(name, one, Stateful, "an object with state_dict and load_state_dict", todo)
        parts = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        parts |= {name: one.state_dict() for name, one in self.others.items()}
        try:
            Checkpoint(parts=parts, facts={"state": state.to_json(), "plan": self.plan.to_json()}).write(path)
        except OSError as error:
            raise SettingError(
                f"Expected a place where a checkpoint can be written; got {path}: {error.strerror or error}. The run "
                "can go on, but could not be continued from here. Make room, or name a new folder."
            ) from error

    def restore(self, checkpoint: Checkpoint) -> RunState:
        """Load the parts from a checkpoint and return the state of the run that wrote it.

        Raises:
          SettingError: the checkpoint is of another plan, or other things were saved than are to be loaded.
          DataError: the checkpoint is of another model or optimizer, or a part cannot load its state.
        """
        names, saved = set(_OWN) | set(self.others), set(checkpoint.parts)
        if names != saved:
            raise SettingError(
                f"Expected to load what was saved, {', '.join(sorted(saved))}; got {', '.join(sorted(names))}. What is "
                "left out would begin anew in the middle of a run. Name the same ones as for save."
            )
        if checkpoint.facts.get("plan") != self.plan.to_json():
            raise SettingError(
                "Expected the plan of the checkpoint; got another one. Its charges were made under the former. "
                "Continue with the run's own settings."
            )
        state = RunState.from_json(checkpoint.facts.get("state", ""))
        check_tensors(self.model.state_dict(), checkpoint.parts["model"])
        for name, part in {"model": self.model, "optimizer": self.optimizer, **self.others}.items():
            try:
                part.load_state_dict(checkpoint.parts[name])
            except Exception as error:  # a user's load_state_dict may raise anything
                raise DataError(
                    f"Expected {name} to take over the state in the checkpoint; got {type(error).__name__}: "
                    f"{error}. It was saved from another one. Make it as it was made for the run that is continued."
                ) from error
        return state


def check_tensors(own: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Raise a DataError if the model's tensors are not those that it is to take over, in names, shapes and types."""
    facts, others = ({name: (tuple(t.shape), t.dtype) for name, t in one.items()} for one in (own, saved))
    if facts != others:
        name = next(name for name in (*facts, *others) if facts.get(name) != others.get(name))
        raise DataError(
            f"Expected values of this model, in which {name} is {facts.get(name, 'absent')}; got some in which it is "
            f"{others.get(name, 'absent')}. Parameters of another model would be lost. Build the same model for both."
        )


def continued(saved: RunState, ledger: Charges, execution: Execution, *, repeatable: bool) -> RunState:
    """Return the state from which a process continues a run: at the place in the plan up to which is charged.

    Args:
      saved: state in the checkpoint; `RunState(execution=execution)` if there is none.
      ledger: of the run.
      execution: of this process. Excluded layers are the saved ones, because scores exist for the others alone;
        `format=auto` needs none.
      repeatable: all draws come from a given seed, so that lost steps are taken again.
    Raises:
      LedgerError: the ledger holds fewer charges than the checkpoint. It is an older copy.
    Privacy: post-processing.
    """
    steps, analyses = ledger.charged("train"), ledger.charged("analysis")
    if steps < saved.steps_taken or analyses < saved.analyses_made:
        raise LedgerError(
            f"Expected the ledger to hold the {saved.steps_taken} steps and {saved.analyses_made} analyses of the "
            f"checkpoint; got {steps} and {analyses}. It is an older copy, and what it lacks would be spent twice. "
            "Restore the ledger."
        )
    if saved.execution.backend != execution.backend:
        here = execution  # of format=auto, which may take another format here
        if not execution.auto:
            here = dataclasses.replace(execution, excluded_layers=saved.execution.excluded_layers)
        saved = dataclasses.replace(saved, execution=here)
    if repeatable:
        return saved
    lost = steps - saved.steps_taken
    return dataclasses.replace(
        saved, steps_taken=steps, steps_lost=saved.steps_lost + lost, analyses_made=analyses, draws=saved.draws + lost
    )


def charge_once(mechanism: Mechanism, kind: Kind, planned: PrivacyPlan | AnalysisPlan, number: int) -> None:
    """Charge release `number` of a kind, from 0. Once this returns it is charged, for every process.

    A repeatable run that continues makes releases again that are charged already, and does not charge them twice.
    """
    if not mechanism.repeats or number >= mechanism.ledger.charged(kind):
        mechanism.ledger.charge(kind=kind, sample_rate=planned.sample_rate, noise_multiplier=planned.noise_multiplier)
