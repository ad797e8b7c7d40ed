# SPDX-License-Identifier: Apache-2.0
"""What a user loops over: an epoch, and the batches that the plan's sampler draws in it."""

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from dpquant.errors import SettingError


class Batch:
    """One logical Poisson batch: the ids of the records that were drawn, and their collated data once it is asked for.

    Attributes:
      record_ids: int64 `(B,)`. B varies, may be 0, and is private.
      step: the logical step that the batch was drawn for.
    """

    def __init__(self, record_ids: Tensor, step: int, attempt: int, load: Callable[[Tensor], Any]):
        self.record_ids, self.step, self.attempt = record_ids, step, attempt
        self._load = load

    @property
    def data(self) -> Any:
        """The sound records, collated; reads private data. `()` if there is none."""
        return self._load(self.record_ids)


class Epoch:
    """One epoch's batches, with the layers that run quantized in it.

    Attributes:
      index: from 0.
      policy: names of the quantized layers.
    """

    def __init__(self, index: int, policy: tuple[str, ...], num_steps: int, batches: Callable[[], Iterator[Batch]]):
        self.index, self.policy, self._num_steps, self._batches = index, policy, num_steps, batches
        self._begun = False

    def __len__(self) -> int:
        return self._num_steps

    def __iter__(self) -> Iterator[Batch]:
        """Draw the epoch's batches, each to be stepped with before the next.

        Raises:
          SettingError: the epoch was iterated before: its steps would be taken again under the same policy.
        """
        if self._begun:
            raise SettingError(
                f"Expected epoch {self.index} to be iterated once; got a second time. Its steps are planned once. Take "
                "the next epoch from private.epochs()."
            )
        self._begun = True
        return self._batches()
