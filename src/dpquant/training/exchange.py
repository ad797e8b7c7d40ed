# SPDX-License-Identifier: Apache-2.0
"""Sums of all processes' shares, plus one unit of noise.

    all parameters as one vector      | slice 0 | slice 1 | slice 2 |      equal slices, the last one filled up
    process r                         adds the rows of slice r, in the order of the processes, in float64
                                      adds the noise of slice r
    all processes                     gather the noised slices

The order of the processes is fixed, so that a sum does not depend on which row arrives first. Integers are added as
integers. The noise of a slice is cut out of the noise of the whole, which follows from the key: it is one unit, of the
same bits, for every number of processes.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Self

import torch
from torch import Tensor

from dpquant.training.distributed import Group

_CACHED = 2**15  # values that a CPU adds up at a time: in float64 they stay in its cache

Noised = Callable[[str, slice, Tensor], Tensor]
"""`(name, part, total)` -> the noisy mean of a part of the flattened tensor of that name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slices:
    """Which part of several tensors, laid end to end, is whose.

    Attributes:
      counts: {name: number of values}.
      rank: of this process.
      size: number of processes.
    """

    counts: Mapping[str, int]
    rank: int
    size: int

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], group: Group) -> Self:
        """Return the slices of tensors of these shapes."""
        return cls(counts={name: one.numel() for name, one in tensors.items()}, rank=group.rank, size=group.size)

    @property
    def length(self) -> int:
        """Number of values in a slice; the last one is filled up."""
        return -(-sum(self.counts.values()) // self.size)

    def parts(self) -> dict[str, slice]:
        """Return {name: the part of the flattened tensor that is in this process' slice}; others are missing."""
        begin, end, place, found = self.rank * self.length, (self.rank + 1) * self.length, 0, {}
        for name, count in self.counts.items():
            first, last = max(begin - place, 0), min(end - place, count)
            if first < last:
                found[name] = slice(first, last)
            place += count
        return found

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Return {name: view of its part} of the values `(length,)` of this process' slice."""
        sizes = {name: part.stop - part.start for name, part in self.parts().items()}
        filled = self.length - sum(sizes.values())
        return dict(zip(sizes, flat.split([*sizes.values(), filled]), strict=False))


def share(record_ids: Tensor, group: Group) -> Tensor:
    """Return this process' share of a batch: one of equal parts of it, which differ by one record at most.

    Args:
      record_ids: int64 `(B,)`, the same on every process.
      group: the processes.
    Returns: int64 `(b,)`; it may be empty.
    """
    return record_ids.tensor_split(group.size)[group.rank]


def own_parts(tensors: Mapping[str, Tensor], group: Group) -> dict[str, slice] | None:
    """Return the parts of the flattened tensors that are in this process' slice; None: all, as of one process."""
    return None if group.size == 1 else Slices.of(tensors, group).parts()


def cut(record_ids: Tensor, group: Group, *, whole: bool) -> tuple[Tensor, slice]:
    """Return the ids that are cut into microbatches, and which of these microbatches are this process'.

    Args:
      record_ids: of the batch.
      group: the processes.
      whole: True: the whole batch is cut, and dealt out microbatch by microbatch, so that the cuts are those of one
        process. False: this process' share is cut, and shares are as equal as they can be.
    """
    if whole:
        return record_ids, slice(group.rank, None, group.size)
    return share(record_ids, group), slice(None)


def noisy_means(
    group: Group, sums: Mapping[str, Tensor], noised: Noised, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Yield the noisy mean of each tensor's sum over all processes, with the same bits on every process.

    Args:
      group: the processes, all of which call this with the same names, shapes and dtypes.
      sums: {name: sum over this process' share of the records}.
      noised: is called with the sum over all processes, for the parts of this process' slice alone.
      dtype: of what `noised` returns; a process whose slice is empty cannot tell.
    Privacy: per example. It is private if `noised` adds the noise of the plan.
    """
    if group.size == 1:
        for name, total in sums.items():
            yield name, noised(name, slice(0, total.numel()), total)
        return
    yield from named(group.gathered(own_means(group, sums, noised, dtype)), sums)


def own_means(group: Group, sums: Mapping[str, Tensor], noised: Noised, dtype: torch.dtype) -> Tensor:
    """Return the noisy means of this process' slice, `(Slices.length,)`.

    Args and privacy: as for `noisy_means`; the group has several processes.
    """
    slices = Slices.of(sums, group)
    flat = [total.reshape(-1) for total in sums.values()]
    missing = slices.length * slices.size - sum(map(len, flat))
    mine = _in_order(group.exchanged(torch.cat([*flat, flat[0].new_zeros(missing)])))
    parts, own = slices.parts(), slices.views(mine)
    done = [noised(name, parts[name], total) for name, total in own.items()]
    filled = slices.length - sum(map(len, done))
    return torch.cat([*done, mine.new_zeros(filled, dtype=dtype)])


def named(flat: Tensor, shapes: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor of these names and shapes out of all values, laid end to end, that were gathered."""
    place = 0
    for name, one in shapes.items():
        yield name, flat[place : place + one.numel()].view(one.shape)
        place += one.numel()


def _in_order(rows: Tensor) -> Tensor:
    """Return the sum of rows, from the first to the last: of float32 in float64, rounded once."""
    total = torch.empty_like(rows[0])
    size = _CACHED if rows.device.type == "cpu" else max(rows.shape[1], 1)
    for block, place in zip(rows.split(size, 1), total.split(size), strict=True):
        first, *others = block
        added = first.double() if rows.dtype == torch.float32 else first.clone()
        for one in others:
            added += one
        place.copy_(added)
    return total
