# SPDX-License-Identifier: Apache-2.0
"""From record ids to microbatches: reads private records, a microbatch at a time, and leaves out what is broken.

A record that cannot be read, or that has not the structure, types and shapes that the data set's records have, is left
out: it contributes nothing, and nobody is told, because an error that depends on one record tells about it. Each record
is judged by itself, so that what the others contribute does not change.

A data set may draw random numbers when it is read (augmentation), and so may a collate function. Those draws follow
from a secret key and the record's id, not from the global generators (`engine/randomness.py`).
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from dpquant.checks.forms import matches
from dpquant.checks.synthetic import Specimens
from dpquant.engine.batches import Microbatch, check_rows, take_rows, to_device, with_leaves
from dpquant.engine.randomness import Drawing, Position, RecordDraws, Watch, reseed, seeded
from dpquant.errors import DataError, DPQuantError
from dpquant.rounding import derive_key


class MapDataset(Protocol):
    """A map-style data set: record i is the same record in every epoch.

    Where there is torch's `__getitems__(indices)`, it is used to read several records at once.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@runtime_checkable
class Collated(Protocol):
    """A data set that collates records itself, faster than one by one; all of its records have one form."""

    def dpquant_batch(self, record_ids: Tensor, /) -> Any:
        """The records of these ids, int64 `(B,)`, as a batch with a row for each."""
        ...


class _Broken:
    """Stands for a record that could not be read."""


class Records:
    """A private data set, as the steps of a run read it."""

    def __init__(
        self, data_set: MapDataset, collate: Callable[[list], Any], device: torch.device, specimens: Specimens
    ):
        """Wrap a data set.

        Args:
          data_set: the user's.
          collate: list of records -> batch.
          device: where batches go.
          specimens: synthetic records, which tell what a record looks like.
        """
        self._data_set, self._collate, self._device, self._specimens = data_set, collate, device, specimens
        self._reads_at_random, self._watched = False, False
        self._collates_at_random = Drawing(by_operator=True)

    def __len__(self) -> int:
        return len(self._data_set)

    def check(self) -> None:
        """Refuse a data set whose records the synthetic ones do not look like, collated by itself or not.

        Raises:
          DataError: another number of rows, another structure, type or shape.
        Privacy: looks at the first records' types and shapes.
        """
        if not isinstance(self._data_set, Collated):
            first = self._read(range(min(len(self), 3)), key=0)
            if not any(map(self._is_sound, first)):
                raise DataError(
                    "Expected example to hold records as the data set does; got others: in structure, types (tensors, "
                    "arrays or numbers) or shapes. Every record of the data set would be left out as broken. Make the "
                    "examples by what makes the data set's records."
                )
            return
        try:
            batch = self._checked(self._data_set.dpquant_batch(torch.zeros(3, dtype=torch.int64)), 3)
        except DPQuantError:
            raise
        except Exception as error:
            raise DataError(
                f"Expected dpquant_batch(record_ids) of train_set to give a batch; got a {type(error).__name__}. Give "
                "the method another name if it is for something else."
            ) from error
        ours, theirs = (
            [(leaf.dtype, leaf.ndim) for leaf in _tensors(one)] for one in (self._specimens.batch((0, 0, 0)), batch)
        )
        if ours != theirs:
            raise DataError(
                "Expected dpquant_batch(record_ids) of train_set to give what collate_fn makes of its records; got "
                "other tensors. The check on synthetic records would be of another kind of batch. Make them agree."
            )

    def microbatches(self, record_ids: Tensor, size: int, key: int) -> Iterator[Microbatch]:
        """Read and collate records, `size` at a time; a microbatch of fewer is filled up with copies of its last.

        Args:
          record_ids: int64 `(B,)`.
          size: rows of each microbatch.
          key: of what data set and collate function draw: secret, of the step.
        Raises:
          DataError: the collate function does not give one row for each record.
        """
        for ids in record_ids.split(size):
            piece = self.microbatch(ids, size, key)
            if piece is not None:
                yield piece

    def microbatch(self, record_ids: Tensor, size: int, key: int) -> Microbatch | None:
        """One microbatch of at most `size` records; None if there are none, or all of them are broken."""
        if len(record_ids) == 0:
            return None
        if isinstance(self._data_set, Collated):
            ids = _filled(record_ids, size)
            return Microbatch(self._checked(self._data_set.dpquant_batch(ids), size), ids, len(record_ids))
        records = self._read(record_ids.tolist(), key)
        sound = [row for row, record in enumerate(records) if self._is_sound(record)]
        return self._collated([records[row] for row in sound], record_ids[sound], size, key)

    def batchmates(self, record_ids: Tensor, size: int, key: int) -> tuple[Microbatch, Microbatch] | None:
        """Return a sound record among its batchmates and among synthetic ones; None where none is sound."""
        piece = self.microbatch(record_ids[:size], size, key)
        if piece is None:
            return None
        ids = torch.cat([piece.record_ids[:1], -1 - torch.arange(1, size)])
        numbers = [1 + row % 2 for row in range(size - 1)]
        if isinstance(self._data_set, Collated):
            strangers = iter([leaf for leaf in _tensors(self._specimens.batch(numbers))])
            data = with_leaves(take_rows(piece.data, slice(0, 1)), lambda leaf: torch.cat([leaf, next(strangers)]))
            return piece, Microbatch(data, ids, 1)
        record = self._read(piece.record_ids[:1].tolist(), key)[0]
        together = [record, *(self._specimens.records[number] for number in numbers)]
        return piece, Microbatch(self._collate_at(together, ids, key), ids, 1)

    def _is_sound(self, record: Any) -> bool:
        return matches(self._specimens.form, record)

    def _read(self, indices: Sequence[int], key: int) -> list[Any]:
        """The records; draws follow from key and id once the data set was seen to draw."""
        key = derive_key(key, "read")
        with seeded(key):
            if not self._reads_at_random:
                position, watch = Position(), Watch()
                with contextlib.nullcontext() if self._watched else watch:  # once: it sees generators of one's own
                    records = self._several(indices)
                self._watched = True
                if not position.moved() and not watch.drew:
                    return records
                self._reads_at_random = True
            return [self._with_draws_of_its_own(index, derive_key(key, index)) for index in indices]

    def _with_draws_of_its_own(self, index: int, key: int) -> Any:
        """A record whose draws follow from the key; only inside of `seeded`."""
        reseed(key)
        with RecordDraws(key, torch.zeros(1, dtype=torch.int64)):
            return self._one(index)

    def _several(self, indices: Sequence[int]) -> list[Any]:
        several = getattr(self._data_set, "__getitems__", None)
        if several is not None:
            try:
                records = list(several(list(indices)))
            except Exception as error:  # of one record; the others are read by themselves
                if isinstance(error, MemoryError):
                    raise
            else:
                if len(records) == len(indices):
                    return records
        return [self._one(index) for index in indices]

    def _one(self, index: int) -> Any:
        try:
            return self._data_set[index]
        except Exception as error:  # a record may not stop the run or be told apart by it
            if isinstance(error, MemoryError):
                raise
            return _Broken()

    def _collated(self, records: list[Any], record_ids: Tensor, size: int, key: int) -> Microbatch | None:
        """A microbatch of sound records; those on which the collate function raises are left out."""
        kept = list(range(len(records)))
        if not kept:
            return None
        batch = self._tried(records, record_ids, size, key)
        if batch is None:
            kept = [row for row in kept if self._tried([records[row]], record_ids[[row]], size, key) is not None]
            if not kept:
                return None
            batch = self._tried([records[row] for row in kept], record_ids[kept], size, key)
        if batch is None:
            raise DataError(
                "Expected collate_fn to collate records together that it collates alone; it does not. Records of one "
                "batch must not depend on each other. Collate without comparing records."
            )
        return Microbatch(batch, _filled(record_ids[kept], size), len(kept))

    def _tried(self, records: list[Any], record_ids: Tensor, size: int, key: int) -> Any | None:
        """The batch, filled up; None where the collate function raises."""
        filled = records + records[-1:] * (size - len(records))
        try:
            return self._collate_at(filled, _filled(record_ids, size), key)
        except DPQuantError:
            raise
        except Exception as error:
            if isinstance(error, MemoryError):
                raise
            return None

    def _collate_at(self, records: list[Any], record_ids: Tensor, key: int) -> Any:
        key = derive_key(key, "collate")
        with seeded(key):
            batch = self._collates_at_random.by_record(lambda: self._collate(records), key, record_ids)
        return self._checked(batch, len(records))

    def _checked(self, batch: Any, count: int) -> Any:
        check_rows(batch, count)
        return to_device(batch, self._device)


def _filled(record_ids: Tensor, size: int) -> Tensor:
    return torch.cat([record_ids, record_ids[-1:].expand(size - len(record_ids))])


def _tensors(batch: Any) -> list[Tensor]:
    found: list[Tensor] = []
    with_leaves(batch, found.append)
    return found
