# SPDX-License-Identifier: Apache-2.0
"""Where a run's processes meet. One process alone has nobody to meet, and that is the default.

    charge       every process, its own ledger; the first one's is the file                  then `barrier`
    draw         the same secret key on every process: the same records, nothing is sent
    share        each process takes every size-th record of the batch
    clipped sum  of its share; then `add`: every process has the sum over the whole batch
    noise        the same key, the same bits on every process: nothing is sent
    optimizer    the same step everywhere

The number of processes enters `share` and nothing else: neither the sampling rate, nor the clip norm, nor the noise,
nor what the sum is divided by. A process without a record adds zeros.
"""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor


class Group(Protocol):
    """The processes of one run, seen from one of them.

    Attributes:
      rank: of this process, from 0. The first one's ledger, execution and choices hold for all.
      size: how many there are.
    """

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def share(self, record_ids: Tensor) -> Tensor:
        """Return this process' part of a batch.

        Args:
          record_ids: int64 `(B,)`, the same on every process.
        Returns: int64 `(b,)`; each record is in the share of exactly one process. It may be empty.
        """
        ...

    def add(self, sums: Mapping[str, Tensor]) -> None:
        """Replace tensors by their sums over all processes, in place and bit for bit alike on each.

        Args:
          sums: {name: tensor}, of the same names, shapes and types on every process.
        Privacy: per example; what is sent holds clipped sums without noise, so its way has to be trusted.
        """
        ...

    def from_first(self, value: bytes) -> bytes:
        """Return the first process' value."""
        ...

    def barrier(self) -> None:
        """Return once every process has come here."""
        ...


class Alone:
    """The group of one process."""

    rank, size = 0, 1

    def share(self, record_ids: Tensor) -> Tensor:
        """Return the whole batch."""
        return record_ids

    def add(self, sums: Mapping[str, Tensor]) -> None:
        """Leave the sums as they are."""

    def from_first(self, value: bytes) -> bytes:
        """Return the value itself."""
        return value

    def barrier(self) -> None:
        """Return at once."""
