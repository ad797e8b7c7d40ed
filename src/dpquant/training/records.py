# SPDX-License-Identifier: Apache-2.0
"""Loading of private records: from record ids to collated microbatches, without broken records.

A record is broken if it cannot be read, or if its structure, types or shapes differ from those of the data set's
records. It contributes nothing and raises nothing, because an error that depends on one record reveals that it is
there. Each record is judged by itself, so that a broken one does not change what the others contribute.

A data set may draw random numbers when it is read (augmentation), and so may a collate function. These numbers are
derived from a secret key and the record's id, not from the global generators (`engine/randomness.py`).
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from dpquant.checks.forms import matches
from dpquant.checks.synthetic import Specimens
from dpquant.engine.batches import Microbatch, check_rows, take_rows, to_device, with_leaves
from dpquant.engine.passes import out_of_memory
from dpquant.engine.randomness import Drawing, Position, RecordDraws, Watch, reseed, seeded
from dpquant.errors import DataError, DPQuantError
from dpquant.rounding import derive_key
from dpquant.training.ahead import made_ahead
from dpquant.training.partition import Partition


class MapDataset(Protocol):
    """A map-style data set: index i refers to the same record in every epoch.

    If it has torch's `__getitems__(indices)`, this is used to read several records at once.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@runtime_checkable
class Collated(Protocol):
    """A data set that reads and collates several records at once; all of its records have equal types and shapes, or
    those of a group have (`InGroups`).

    It draws no random numbers. While the model computes, it is called from other threads than the main one: one call at
    a time, unless the run has several `workers`.
    """

    def dpquant_batch(self, record_ids: Tensor, /) -> Any:
        """Return a batch with one row for each of the ids, int64 `(B,)`."""
        ...


@runtime_checkable
class InGroups(Protocol):
    """A data set that collates itself and whose records have several shapes: equal within a group, as texts in buckets.

    Microbatches are made within groups. If records were padded to the longest of their microbatch instead, each one's
    shape, its scales and so its gradient would depend on the others.

    Attributes:
      dpquant_lengths: the sizes that the first axis of a record may have, ascending; public. The shortest and the
        longest are tried before anything is charged.
    """

    @property
    def dpquant_lengths(self) -> Sequence[int]: ...

    def dpquant_groups(self, record_ids: Tensor, /) -> Tensor:
        """Return the group of each of the ids, int64 `(B,)`: a function of each record alone."""
        ...


class _Broken:
    """Placeholder for a record that could not be read."""


class Records:
    """A private data set, read in microbatches."""

    def __init__(
        self,
        data_set: MapDataset,
        collate: Callable[[list], Any],
        device: torch.device,
        specimens: Specimens,
        workers: int = 1,
        partition: Partition | None = None,
    ):
        """Wrap a data set.

        Args:
          data_set: the user's data set.
          collate: list of records -> batch.
          device: device of the batches.
          specimens: synthetic records, which define the structure, types and shapes of a record.
          workers: threads that read ahead, each a microbatch, from a data set that collates by itself.
          partition: says which ids the data set's records have; None: from 0 on.
        """
        self.partition = partition or Partition(range(len(data_set)))
        self._data_set, self._collate, self._device, self._specimens = data_set, collate, device, specimens
        self._workers = workers
        self._reads_at_random, self._watched = False, False
        self._collates_at_random = Drawing(by_operator=True)

    def __len__(self) -> int:
        return len(self._data_set)

    @property
    def lengths(self) -> tuple[int, ...]:
        """The lengths that records of a data set in groups may have; none of another. Public."""
        return tuple(self._data_set.dpquant_lengths) if isinstance(self._data_set, InGroups) else ()

    def check(self) -> None:
        """Check that the data set's records have the structure, types and shapes of the synthetic ones.

        A data set that collates records itself is checked on a batch of its first record, three times. One that is
        empty, because other processes have the records, has nothing to be checked.

        Raises:
          DataError: they have not, a batch has not one row for each record, or a data set that collates draws random
            numbers.
        Privacy: uses types and shapes of the first records, which are public.
        """
        if hasattr(self._data_set, "dpquant_groups") and not isinstance(self._data_set, InGroups):
            raise DataError(
                "Expected train_set with dpquant_groups to name dpquant_lengths, too; it does not. A model is tried on "
                "the shortest and the longest before anything is charged. Add them, ascending."
            )
        if self.partition.by_range and len(self) == 0:
            return
        if not isinstance(self._data_set, Collated):
            first = self._read(self.partition.ids[:3], key=0)
            if not any(map(self._is_sound, first)):
                raise DataError(
                    "Expected example to hold records as the data set does; got others: in structure, types (tensors, "
                    "arrays or numbers) or shapes. Every record of the data set would be left out as broken. Make the "
                    "examples by what makes the data set's records."
                )
            return
        try:
            position, watch = Position(), Watch()
            with watch:
                batch = self._data_set.dpquant_batch(torch.zeros(3, dtype=torch.int64))
            drew = watch.drew or position.moved()
            batch = self._checked(batch, 3)
        except DPQuantError:
            raise
        except Exception as error:
            raise DataError(
                f"Expected dpquant_batch(record_ids) of train_set to give a batch; got a {type(error).__name__}. Give "
                "the method another name if it is for something else."
            ) from None  # its text may quote a record
        if drew:
            raise DataError(
                "Expected dpquant_batch(record_ids) of train_set to draw no random numbers; it does. They would belong "
                "to places in a batch and not to records. Draw in __getitem__, and give a collate_fn instead."
            )
        ours, theirs = (
            [(leaf.dtype, leaf.ndim) for leaf in _tensors(one)] for one in (self._specimens.batch((0, 0, 0)), batch)
        )
        if ours != theirs:
            raise DataError(
                "Expected dpquant_batch(record_ids) of train_set to give what collate_fn makes of its records; got "
                "other tensors. The check on synthetic records would be of another kind of batch. Make them agree."
            )

    def microbatches(self, record_ids: Tensor, size: int, key: int, taken: slice = slice(None)) -> Iterator[Microbatch]:
        """Read and collate records, `size` at a time; fill a smaller microbatch up with copies of its last record.

        Args:
          record_ids: int64 `(B,)`.
          size: rows of each microbatch.
          key: secret key of the step, for the random numbers of data set and collate function.
          taken: which of the microbatches to make, by their numbers.
        Returns: microbatches; broken records are missing from them.
        Raises:
          DataError: the collate function does not give one row for each record.
        Privacy: per example.
        """
        cut = [ids for group in self._groups(record_ids) for ids in group.split(size)]
        makers = (functools.partial(self.microbatch, ids, size, key) for ids in cut[taken])
        for piece in made_ahead(makers, self._workers) if self.reads_ahead else (make() for make in makers):
            if piece is not None:
                yield piece

    def together(self, record_ids: Tensor, key: int) -> Any:
        """Return records collated into one batch, without the broken ones; `()` if none is left.

        Args, errors and privacy: as for `microbatches`.
        """
        found = self.microbatch(record_ids, len(record_ids), key)
        return () if found is None else take_rows(found.data, slice(0, found.num_examples))

    @property
    def reads_ahead(self) -> bool:
        """Whether the next microbatch is read in a thread: from a data set that collates by itself.

        Other data sets and their collate functions may draw random numbers, from generators that the process has once:
        the model's own draws at the same time would change both. Beside a model on the CPU, a data set that says that
        it is `in_memory` would gain nothing.
        """
        waits = self._device.type != "cpu" or not getattr(self._data_set, "in_memory", False)
        return waits and isinstance(self._data_set, Collated)

    def microbatch(self, record_ids: Tensor, size: int, key: int) -> Microbatch | None:
        """Return one microbatch of at most `size` records; None if there are none, or all of them are broken.

        Args, errors and privacy: as for `microbatches`.
        """
        if len(record_ids) == 0:
            return None
        if isinstance(self._data_set, Collated):
            ids = _filled(record_ids, size)
            return Microbatch(self._checked(self._data_set.dpquant_batch(self._own(ids)), size), ids, len(record_ids))
        records = self._read(record_ids.tolist(), key)
        sound = [row for row, record in enumerate(records) if self._is_sound(record)]
        return self._collated([records[row] for row in sound], record_ids[sound], size, key)

    def _groups(self, record_ids: Tensor) -> list[Tensor]:
        """Return the ids of records that may be in one microbatch, in the order of the ids."""
        if not isinstance(self._data_set, InGroups):
            return [record_ids]
        groups = self._data_set.dpquant_groups(self._own(record_ids))
        return [record_ids[groups == group] for group in groups.unique()]

    def batchmates(self, record_ids: Tensor, size: int, key: int) -> tuple[Microbatch, Microbatch] | None:
        """Return two microbatches with one sound record in the first row; None if all records are broken.

        In the first its batchmates are the records that were drawn with it, in the second they are synthetic.

        Args:
          record_ids: int64 `(B,)`; the first `size` are used.
          size: rows of each microbatch.
          key: secret key of the step, for the random numbers of data set and collate function.
        Privacy: per example.
        """
        groups = self._groups(record_ids[:size])
        piece = self.microbatch(groups[0], size, key) if groups else None
        if piece is None:
            return None
        ids = torch.cat([piece.record_ids[:1], -1 - torch.arange(1, size)])
        numbers = [1 + row % 2 for row in range(size - 1)]
        if isinstance(self._data_set, Collated):
            synthetic = iter(_tensors(self._specimens.batch(numbers)))
            data = with_leaves(
                take_rows(piece.data, slice(0, 1)), lambda leaf: torch.cat([leaf, _cut(next(synthetic), leaf)])
            )
            return piece, Microbatch(data, ids, 1)
        record = self._read(piece.record_ids[:1].tolist(), key)[0]
        together = [record, *(self._specimens.records[number] for number in numbers)]
        return piece, Microbatch(self._collate_at(together, ids, key), ids, 1)

    def _own(self, record_ids: Tensor) -> Tensor:
        """Return the numbers that records of these ids have in this process' data set."""
        ids = self.partition.ids
        assert bool(((record_ids >= ids.start) & (record_ids < ids.stop)).all()), "other processes have such records"
        return record_ids - ids.start

    def _is_sound(self, record: Any) -> bool:
        """Whether a record has the structure, types and shapes of the synthetic ones."""
        return matches(self._specimens.form, record)

    def _read(self, indices: Sequence[int], key: int) -> list[Any]:
        """Read records, with a placeholder for each that cannot be read.

        Once the data set has been seen to draw random numbers, records are read one by one, and each one's numbers
        are derived from the key and its id.
        """
        key = derive_key(key, "read")
        with seeded(key):
            if not self._reads_at_random:
                position, watch = Position(), Watch()
                with (
                    contextlib.nullcontext() if self._watched else watch
                ):  # only once, as it is slow; it also sees a user's own generators
                    records = self._several(indices)
                self._watched = True
                if not position.moved() and not watch.drew:
                    return records
                self._reads_at_random = True
            return [self._with_draws_of_its_own(index, derive_key(key, index)) for index in indices]

    def _with_draws_of_its_own(self, index: int, key: int) -> Any:
        """Read a record, with random numbers derived from the key. Call only within `seeded`."""
        reseed(key)
        with RecordDraws(key, torch.zeros(1, dtype=torch.int64)):
            return self._one(index)

    def _several(self, indices: Sequence[int]) -> list[Any]:
        """Read records at once if the data set can and none of them raises, else one by one."""
        several = getattr(self._data_set, "__getitems__", None)
        if several is not None:
            try:
                records = list(several(list(map(self.partition.ids.index, indices))))
            except Exception as error:  # caused by one record: read each by itself
                if out_of_memory(error):
                    raise
            else:
                if len(records) == len(indices):
                    return records
        return [self._one(index) for index in indices]

    def _one(self, index: int) -> Any:
        """Read one record, or return a placeholder."""
        own = self.partition.ids.index(index)
        try:
            return self._data_set[own]
        except Exception as error:  # an error would reveal that this record is there
            if out_of_memory(error):
                raise
            return _Broken()

    def _collated(self, records: list[Any], record_ids: Tensor, size: int, key: int) -> Microbatch | None:
        """Collate sound records into a microbatch, without those on which the collate function raises."""
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
        """Collate records, filled up to `size` with copies of the last; return None if the collate function raises."""
        filled = records + records[-1:] * (size - len(records))
        try:
            return self._collate_at(filled, _filled(record_ids, size), key)
        except DPQuantError:
            raise
        except Exception as error:
            if out_of_memory(error):
                raise
            return None

    def _collate_at(self, records: list[Any], record_ids: Tensor, key: int) -> Any:
        """Collate records, with random numbers derived from the key and the records' ids."""
        key = derive_key(key, "collate")
        with seeded(key):
            batch = self._collates_at_random.by_record(lambda: self._collate(records), key, record_ids)
        return self._checked(batch, len(records))

    def _checked(self, batch: Any, count: int) -> Any:
        """Return a batch on the device, once it is known to have `count` rows."""
        check_rows(batch, count)
        return to_device(batch, self._device)


def _cut(synthetic: Tensor, like: Tensor) -> Tensor:
    """Return rows cut to the shape of a group's: synthetic records have the shape of the largest."""
    return synthetic[(slice(None), *(slice(size) for size in like.shape[1:]))]


def _filled(record_ids: Tensor, size: int) -> Tensor:
    """Return ids `(size,)`, filled up with copies of the last one."""
    return torch.cat([record_ids, record_ids[-1:].expand(size - len(record_ids))])


def _tensors(batch: Any) -> list[Tensor]:
    """Return the tensors of a batch, in order."""
    found: list[Tensor] = []
    with_leaves(batch, found.append)
    return found
