# SPDX-License-Identifier: Apache-2.0
"""Processes of a run, and what they exchange. By default a run has one process and exchanges nothing.

    charge       process 0 charges its ledger; its answer goes to all, and none reads a record before it has come
    draw         the same secret key on every process gives the same records; nothing is sent
    clipped sum  of the process' share of them
    exchange     process r gets slice r of every process' sum, and adds these up in the order of the processes
    noise        process r adds the noise of its slice; the slices' noise is that of one process, cut in pieces
    gather       every process gets all noised slices, with the same bits
    optimizer    takes the same step on every process, or each steps its slice, and parameters are gathered (`steps.py`)

The number of processes enters the shares and the slices, and nothing else: not the sampling rate, the clipping norm,
the noise, or the divisor of the sum. A process without a record takes part with zeros. Every process makes the same
exchanges, in the same order, whatever it has drawn and whatever fails (`agreement.py`).

No process holds a whole sum without noise, except its own share's. These and the key travel from machine to machine in
the clear, so machines and network are trusted.
"""

import atexit
import contextlib
import datetime
import os
from collections.abc import Iterator
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore  # pyright: ignore[reportPrivateImportUsage]: documented

from dpquant.training.roll_call import LAUNCHED, RollCall, lost
from dpquant.training.waiting import TIMEOUT, initialised

_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # its name before torch 2.14


class Group(Protocol):
    """The processes of one run, as one of them sees them. Each call returns once every process has made it.

    Attributes:
      rank: number of this process, from 0. Ledger, key, execution and choices are those of process 0.
      size: number of processes.
    """

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def from_first(self, value: bytes) -> bytes:
        """Return the value of process 0."""
        ...

    def from_all(self, value: bytes) -> list[bytes]:
        """Return the values of all processes, in their order."""
        ...

    def exchanged(self, flat: Tensor) -> Tensor:
        """Send slice r of a vector to process r.

        Args:
          flat: `(size * n,)`; n and dtype are the same on every process.
        Returns: `(size, n)`: this process' slice of each process' vector, in the order of the processes.
        Privacy: per example. What is sent are clipped sums without noise, so the connection must be trusted.
        """
        ...

    def gathered(self, part: Tensor) -> Tensor:
        """Return the vectors `(n,)` of all processes as one, `(size * n,)`, with the same bits on every process."""
        ...


class Alone:
    """A group of one process, which exchanges nothing."""

    rank, size = 0, 1

    def from_first(self, value: bytes) -> bytes:
        """Return the value itself."""
        return value

    def from_all(self, value: bytes) -> list[bytes]:
        """Return the value itself."""
        return [value]

    def exchanged(self, flat: Tensor) -> Tensor:
        """Return the vector itself, as the only row."""
        return flat[None]

    def gathered(self, part: Tensor) -> Tensor:
        """Return the vector itself."""
        return part


class TorchGroup:
    """The processes of torch.distributed's default group, which is initialised."""

    def __init__(self):
        """Join the group; it needs a backend that sends tensors of the CPU or of a GPU."""
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        pairs = (pair.split(":") for pair in dist.get_backend_config().split(","))
        self._backends = {kind: backend for kind, backend in pairs}

    def from_first(self, value: bytes) -> bytes:
        """Return the value of process 0."""
        with _told_if_lost(), torch.inference_mode(False):
            length = self._from_first(torch.tensor([len(value)]))
            return _bytes(self._from_first(_padded(value if self.rank == 0 else b"", int(length))))

    def from_all(self, value: bytes) -> list[bytes]:
        """Return the values of all processes, in their order."""
        with _told_if_lost(), torch.inference_mode(False):
            lengths = self._gathered(torch.tensor([len(value)])).tolist()
            rows = self._gathered(_padded(value, max(lengths))).view(self.size, -1)
            return [_bytes(row[:length]) for row, length in zip(rows, lengths, strict=True)]

    def exchanged(self, flat: Tensor) -> Tensor:
        """Send slice r of a vector to process r."""
        with _told_if_lost():
            sent = flat.to(self._place_for(flat))
            received = torch.empty_like(sent)
            dist.all_to_all_single(received, sent)
            return received.to(flat.device).view(self.size, -1)

    def gathered(self, part: Tensor) -> Tensor:
        """Return the vectors of all processes as one."""
        with _told_if_lost():
            return self._gathered(part)

    def _from_first(self, value: Tensor) -> Tensor:
        sent = value.to(self._place_for(value))
        dist.broadcast(sent, src=0)
        return sent.cpu()

    def _gathered(self, part: Tensor) -> Tensor:
        sent = part.to(self._place_for(part))
        whole = sent.new_empty(self.size * sent.numel())
        _all_gather(whole, sent)
        return whole.to(part.device)

    def _place_for(self, tensor: Tensor) -> torch.device:
        """Return the tensor's device if the group sends from there, else one from which it does."""
        if self._backends.get(tensor.device.type) == ("gloo" if tensor.device.type == "cpu" else "nccl"):
            return tensor.device
        return torch.device("cpu") if self._backends.get("cpu") == "gloo" else torch.device("cuda")


def group_here(timeout: datetime.timedelta = TIMEOUT) -> Group:
    """Return the processes with which this one was started.

    They are torch.distributed's default group if it is initialised, else those that torchrun has named in the
    environment, else this process alone. A group that is initialised here is destroyed when the process ends.

    Args:
      timeout: for a group that is initialised here: after it, a process that does not answer counts as lost.
    Raises:
      GroupError: the processes do not find each other.
    """
    if not dist.is_available():
        return Alone()
    if not dist.is_initialized():
        if any(name not in os.environ for name in LAUNCHED) or os.environ["WORLD_SIZE"] == "1":
            return Alone()
        roll = RollCall.of_torchrun(timeout)
        where: dict[str, Any] = {}
        if roll is not None:
            where = {"store": PrefixStore("group", roll.store), "rank": roll.rank, "world_size": roll.size}
        with _told_if_lost():
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=timeout, **where
            )
            initialised(timeout)
            atexit.register(_end_threads)
            dist.monitored_barrier(timeout=timeout, wait_all_ranks=True)
    return TorchGroup() if dist.get_world_size() > 1 else Alone()


def _end_threads() -> None:
    """End the default group's threads while Python still runs.

    A thread of gloo lets go of a tensor after its exchange has returned. Once Python has begun to end, that aborts the
    process.
    """
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def _told_if_lost() -> Iterator[None]:
    """Raise a GroupError for an exchange that fails, naming who is lost."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raise lost(error) from None


def _padded(value: bytes, length: int) -> Tensor:
    """Return bytes as uint8 `(length,)`, with zeros at the end; at least one, as nothing cannot be sent."""
    return torch.frombuffer(bytearray(value.ljust(max(length, 1), b"\0")), dtype=torch.uint8)


def _bytes(values: Tensor) -> bytes:
    return values.numpy().tobytes()
