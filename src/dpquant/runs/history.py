# SPDX-License-Identifier: Apache-2.0
"""The epochs of a run so far, as its checkpoints hold them."""

import dataclasses
import time
from typing import Any

from dpquant.runs.record import EpochRecord
from dpquant.training.epoch import Epoch
from dpquant.training.private import PrivateTraining


class History:
    """The epochs of a run so far, as part of its checkpoints.

    Attributes:
      started: UTC, when the run began; before any record was read, so that it is public.
      epochs: the records of the epochs that have ended.
      ends: `time.perf_counter` at their ends, for the operator; not in checkpoints.
    Privacy: post-processing, but for `ends`.
    """

    def __init__(self, started: str):
        self.started = started
        self.epochs: list[EpochRecord] = []
        self.ends: list[float] = []
        self._scores: dict[str, float] | None = None
        self._index, self._analyses = -1, 0

    def continues(self, private: PrivateTraining) -> None:
        """Begin where the run is: an analysis that was lost belongs to no epoch."""
        self._analyses = private.analyses_made

    def begin(self, private: PrivateTraining, epoch: Epoch) -> float:
        """Begin an epoch, unless it continues, and return the epsilon spent."""
        if epoch.index != self._index:
            self._scores = dict(private.scores) if private.analyses_made > self._analyses else None
            self._index, self._analyses = epoch.index, private.analyses_made
        return private.epsilon_spent()

    def end(self, **facts: Any) -> None:
        """End an epoch with these facts."""
        self.epochs.append(EpochRecord(**facts, scores=self._scores))
        self.ends.append(time.perf_counter())

    def state_dict(self) -> dict[str, Any]:
        return {
            "started": self.started,
            "epochs": [dataclasses.asdict(one) for one in self.epochs],
            "scores": self._scores,
            "index": self._index,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.started = state_dict.get("started", self.started)  # checkpoints of earlier versions do not have it
        self.epochs = [EpochRecord(**{"metrics_test": None, **one}) for one in state_dict["epochs"]]
        self._scores, self._index = state_dict["scores"], state_dict["index"]
