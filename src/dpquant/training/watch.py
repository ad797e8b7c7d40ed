# SPDX-License-Identifier: Apache-2.0
"""What is watched while a run goes on: that the model keeps examples apart, and that no error carries data out.

The check on synthetic records, before the first charge, cannot see what real records alone show. For a model that keeps
examples apart nothing here ever finds anything, so that what is found releases nothing.
"""

import re
import warnings
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from dpquant.backends.choose import Choices
from dpquant.backends.malloc import working_memory
from dpquant.checks.isolation import buffers_of, changed_buffer, keeps_apart, restore_buffers
from dpquant.engine.passes import Objective, out_of_memory
from dpquant.errors import DPQuantError, ModelError
from dpquant.machine import current
from dpquant.training.continuing import check_tensors
from dpquant.training.moved import check_moved
from dpquant.training.records import Records
from dpquant.training.steps import Steps
from dpquant.training.tuning import memory_gone

_SHAPE = re.compile(r"\(\d+,[\d, ]*\)")  # as `tuple(tensor.shape)` is written
_PROBED = 8  # records in each of the two batches in which one record's gradients are compared, once an epoch


class Watch:
    """Compares one record's gradients among different batchmates, once an epoch, and the model's buffers.

    Privacy: per example, for a model that keeps examples apart; what is found ends the run.
    """

    def __init__(self, objective: Objective, records: Records):
        """Watch a model from now on, with its buffers as they are."""
        self._objective, self._records = objective, records
        self._buffers, self._probed = buffers_of(objective.model), False
        self._moved = False

    def begin_epoch(self) -> None:
        """Compare one more record."""
        self._probed = False

    def keep_buffers(self) -> None:
        """Take the model's buffers as they are now for what they should be: they come from a checkpoint."""
        self._buffers = buffers_of(self._objective.model)

    def replace(self, state_dict: Mapping[str, Tensor]) -> str:
        """Replace the values of the model's tensors, buffers included, unless a buffer has taken in records.

        Returns: why that buffer matters; "" if the values were replaced.
        Raises:
          DataError: a tensor is missing, or of another shape or type.
        """
        check_tensors(self._objective.model.state_dict(), state_dict)
        if reason := self.changed_buffer():
            return reason
        self._objective.model.load_state_dict(state_dict)
        self.keep_buffers()
        return ""

    def coupling(self, record_ids: Tensor, key: int) -> str:
        """Return why the model does not keep examples apart, if one record of the batch shows it; else "".

        All processes of a group compare the same record, so that they all stop at the same step.
        """
        if self._probed or len(record_ids) == 0:
            return ""
        pieces = self._records.batchmates(record_ids, _PROBED, key)
        if pieces is None:
            return ""
        self._probed = True
        try:
            apart = keeps_apart(self._objective, *pieces, key=key)
        except DPQuantError:
            raise
        except Exception:  # the model does not run on this record, which then contributes nothing
            return ""
        return "" if apart else "one record's gradient depends on the other records of its batch"

    def take_step(self, steps: Steps) -> None:
        """Take the optimizer's step; the first that moves anything has to move what is trainable, and nothing else.

        Raises:
          ModelError: it does not; see `check_moved`.
        """
        if self._moved:
            steps.step()
        else:
            steps.gather_gradients()
            self._moved = check_moved(self._objective.model, steps)

    def changed_buffer(self) -> str:
        """Return why a buffer that has changed matters, and restore it: it holds information on records. Else ""."""
        changed = changed_buffer(self._objective.model, self._buffers)
        if not changed:
            return ""
        restore_buffers(self._objective.model, self._buffers)
        return f"its buffer {changed} has begun to change, and what it kept of records was not noised"


def broken(reason: str) -> str:
    """Return the error for a model that violates what epsilon assumes."""
    return (
        f"Expected a model that keeps examples apart; {reason}. The check on synthetic records could not see it, "
        "and the epsilon of this run DOES NOT HOLD: release nothing of it. Make the model, the loss and collate_fn "
        "treat each record by itself, or give example= records that show what these do."
    )


def without_details(work: Callable[[], None], choices: Choices, device: torch.device) -> None:
    """Run `work`, which reads private records; replace an exception by one that contains no data, and show no warning.

    A foreign exception's text may quote a record. One of ours keeps its text, but for shapes, which may follow a
    record's length, and loses what caused it. The same code has run on synthetic records, where warnings show.
    """
    failed, memory, refused = None, False, None
    try:
        with (
            current(device),
            working_memory(),
            choices.active(),
            torch.inference_mode(False),
            torch.enable_grad(),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            work()
    except DPQuantError as error:
        refused = type(error)(_SHAPE.sub("(withheld)", str(error)))
    except Exception as error:
        failed, memory = type(error).__name__, out_of_memory(error)
    # raised outside of `except`, so that the original exception is not attached
    if refused is not None:
        raise refused
    if memory:
        raise memory_gone()
    if failed is not None:
        raise ModelError(
            f"Expected a step to run as it did on synthetic records; got a {failed}. Its message is withheld, "
            "because it may hold data. What was charged stays charged. Look for what differs from a synthetic "
            "step: memory, the optimizer's state, hooks."
        )
