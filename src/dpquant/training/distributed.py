# SPDX-License-Identifier: Apache-2.0
"""Processes of a run, and what they exchange. By default a run has one process and exchanges nothing.

    charge       every process charges its own ledger, of which the first process' is the file; then `barrier`. Only the
                 file leases steps ahead, so that heads differ: the run's is that of process 0
    draw         the same secret key on every process gives the same records; nothing is sent
    share        each process takes every size-th record of the batch
    clipped sum  of the process' share; then `add` gives every process the sum over the whole batch
    noise        the same key gives the same bits on every process; nothing is sent
    optimizer    takes the same step on every process

The number of processes enters `share` and nothing else: not the sampling rate, the clipping norm, the noise, or the
divisor of the sum. A process without a record adds zeros.
"""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor


class Group(Protocol):
    """The processes of one run, as one of them sees them.

    Attributes:
      rank: number of this process, from 0. Ledger file, execution and choices are those of process 0.
      size: number of processes.
    """

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def share(self, record_ids: Tensor) -> Tensor:
        """Return this process' share of a batch.

        Args:
          record_ids: int64 `(B,)`, the same on every process.
        Returns: int64 `(b,)`; each record is in the share of exactly one process. It may be empty.
        """
        ...

    def add(self, sums: Mapping[str, Tensor]) -> None:
        """Replace tensors by their sums over all processes, in place, with the same bits on every process.

        Args:
          sums: {name: tensor}, with the same names, shapes and dtypes on every process.
        Privacy: per example. The tensors that are sent are clipped sums without noise, so the connection must be
          trusted.
        """
        ...

    def from_first(self, value: bytes) -> bytes:
        """Return the value of process 0."""
        ...

    def barrier(self) -> None:
        """Return once every process has called this."""
        ...


class Alone:
    """A group of one process, which exchanges nothing."""

    rank, size = 0, 1

    def share(self, record_ids: Tensor) -> Tensor:
        """Return the whole batch."""
        return record_ids

    def add(self, sums: Mapping[str, Tensor]) -> None:
        """Do nothing: the sums are complete."""

    def from_first(self, value: bytes) -> bytes:
        """Return the value itself."""
        return value

    def barrier(self) -> None:
        """Return immediately."""
