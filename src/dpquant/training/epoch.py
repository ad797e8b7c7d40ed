# SPDX-License-Identifier: Apache-2.0
"""Epochs and batches of a private run, over which the user loops."""

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from dpquant.errors import SettingError


def not_drawn() -> SettingError:
    """Return the error for a step with another batch than the one that was drawn last."""
    return SettingError(
        "Expected the batch that the epoch has just drawn, once; got another. The accounting holds for batches "
        "of the plan's own sampler. Loop over private.epochs() and over each epoch."
    )


def skipped() -> SettingError:
    """Return the error for a drawn batch that no step was taken with."""
    return SettingError(
        "Expected every batch that an epoch draws to be stepped with; got one that was skipped. Skipping "
        "batches, empty ones included, changes the distribution of the others, on which epsilon depends. Call "
        "private.step(batch) for every batch: an empty one is a step of noise."
    )


class Batch:
    """One Poisson batch: the ids of the records that were drawn, and their data, which is loaded on access.

    Attributes:
      record_ids: int64 `(B,)`. B is random, may be 0, and is private. With `partition="range"` those of this process.
      step: number of the step for which the batch was drawn.
      attempt: number of the draw; a step that is drawn for again has another one.
    Privacy: per example; nothing of a batch is released.
    """

    def __init__(self, record_ids: Tensor, step: int, attempt: int, load: Callable[[Tensor], Any]):
        self.record_ids, self.step, self.attempt = record_ids, step, attempt
        self._load = load

    @property
    def data(self) -> Any:
        """The collated records without the broken ones; `()` if none is left. Reads private data."""
        return self._load(self.record_ids)


class Epoch:
    """One epoch: its batches, and the layers that run quantized in it.

    Attributes:
      index: number of the epoch, from 0.
      policy: names of the layers that run quantized.
    """

    def __init__(self, index: int, policy: tuple[str, ...], num_steps: int, batches: Callable[[], Iterator[Batch]]):
        self.index, self.policy, self._num_steps, self._batches = index, policy, num_steps, batches
        self._begun = False

    def __len__(self) -> int:
        return self._num_steps

    def __iter__(self) -> Iterator[Batch]:
        """Draw the epoch's batches one by one. Call `private.step` with each before taking the next.

        Raises:
          SettingError: the epoch has been iterated before; its steps are planned once.
        """
        if self._begun:
            raise SettingError(
                f"Expected epoch {self.index} to be iterated once; got a second time. Its steps are planned once. Take "
                "the next epoch from private.epochs()."
            )
        self._begun = True
        return self._batches()
