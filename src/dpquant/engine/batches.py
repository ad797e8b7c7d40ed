# SPDX-License-Identifier: Apache-2.0
"""Batches as trees of tensors whose first axis is the record, and their division into microbatches.

A batch is a tensor, or a tuple, list or mapping of batches. Every `collections.abc.Mapping` is accepted, because the
`BatchEncoding` of Hugging Face's tokenizers is a mapping but not a dict. This module knows neither models nor privacy.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from dpquant.errors import DataError, SettingError


@dataclasses.dataclass(frozen=True, eq=False)
class Microbatch:
    """The records that one forward and backward pass processes.

    Attributes:
      data: the batch; each of its tensors has `size` rows.
      record_ids: int64 `(size,)`.
      num_examples: number of leading rows that count. The rows after them are copies that pad the microbatch.
    """

    data: Any
    record_ids: Tensor
    num_examples: int


def microbatches(batch: Any, record_ids: Tensor, size: int) -> Iterator[Microbatch]:
    """Yield the microbatches of a batch, each of exactly `size` rows; `filled_up` pads the last one."""
    for rows, num_examples in filled_up(len(record_ids), size):
        yield Microbatch(take_rows(batch, rows), record_ids[rows], num_examples)


def filled_up(count: int, size: int) -> Iterator[tuple[Tensor, int]]:
    """Yield, for each microbatch of `count` examples, the int64 `(size,)` positions of its rows and how many count.

    The last microbatch is padded with copies of its last example, and the copies do not count. The padding keeps
    examples independent: an operator may sum in another order for another number of rows, and stochastic rounding can
    turn a different last bit into a different code. If the last microbatch were shorter, adding or removing one record
    would change what the other records contribute.
    """
    for start in range(0, count, size):
        yield torch.arange(start, start + size).clamp_(max=count - 1), min(size, count - start)


def is_numbers(value: Any) -> bool:
    """Return whether a value is a non-empty list of plain numbers, for instance token ids: one leaf of a record."""
    return isinstance(value, list) and bool(value) and all(isinstance(one, bool | int | float) for one in value)


def with_leaves(batch: Any, change: Callable[[Any], Any]) -> Any:
    """Apply `change` to every leaf of a batch; return the results in the same tuples, lists and mappings."""
    match batch:
        case list() if is_numbers(batch):
            return change(batch)
        case dict():
            return {key: with_leaves(value, change) for key, value in batch.items()}
        case MutableMapping():  # a copy keeps the class and its other attributes
            changed = copy.copy(batch)
            for key, value in batch.items():
                changed[key] = with_leaves(value, change)
            return changed
        case Mapping():
            return {key: with_leaves(value, change) for key, value in batch.items()}
        case tuple() if hasattr(batch, "_fields"):
            return type(batch)(*(with_leaves(value, change) for value in batch))
        case tuple() | list():
            return type(batch)([with_leaves(value, change) for value in batch])
    return change(batch)


def cut_to(batch: Any, length: int, *, longest: int) -> Any:
    """Return a batch whose tensors [B, longest, ...] are cut to [B, length, ...]; all others stay."""

    def cut(leaf: Any) -> Any:
        return leaf[:, :length] if isinstance(leaf, Tensor) and leaf.shape[1:2] == (longest,) else leaf

    return with_leaves(batch, cut)


def leaves(batch: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (path, leaf) for every leaf: lists of numbers, and all but tuples, lists, mappings. Errors show paths."""
    match batch:
        case list() if is_numbers(batch):
            yield path, batch
        case Mapping():
            for key, value in batch.items():
                yield from leaves(value, f"{path}[{key!r}]")
        case tuple() | list():
            for place, value in enumerate(batch):
                yield from leaves(value, f"{path}[{place}]")
        case _:
            yield path, batch


def take_rows(batch: Any, rows: slice | Tensor) -> Any:
    """Return the batch with these rows of each of its tensors.

    Raises:
      SettingError: a leaf of the batch is not a tensor.
    """

    def taken(leaf: Any) -> Tensor:
        if isinstance(leaf, Tensor):
            if isinstance(rows, slice):
                return leaf[rows]
            # copies whole rows, which indexing does element by element
            return leaf.index_select(0, rows.to(leaf.device, non_blocking=True))
        raise _no_tensor(leaf)

    return with_leaves(batch, taken)


def _no_tensor(leaf: Any) -> SettingError:
    return SettingError(
        f"Expected a batch of tensors, tuples, lists and mappings; got a {type(leaf).__name__}. A microbatch takes "
        "the same rows of every tensor. Give the data set a collate function that returns tensors."
    )


def to_device(batch: Any, device: torch.device) -> Any:
    """Return the batch with its tensors moved to a device; other leaves stay as they are.

    A GPU may still be copying when this returns; operators on it wait for the copy. A copy to the CPU is complete.
    """

    def moved(leaf: Any) -> Any:
        return pinned(leaf, device).to(device, non_blocking=device.type != "cpu") if isinstance(leaf, Tensor) else leaf

    return with_leaves(batch, moved)


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a copy in pages from which a GPU copies by itself; the tensor for another device, or if it is on one."""
    return tensor.pin_memory() if device.type == "cuda" and tensor.device.type == "cpu" else tensor


def num_rows(batch: Any) -> int:
    """Return the number of rows of a batch, read from its first tensor; `check_rows` checks that all have as many."""
    return next(len(leaf) for _, leaf in leaves(batch) if isinstance(leaf, Tensor))


def check_rows(batch: Any, count: int) -> None:
    """Check that every tensor of a batch has one row for each of `count` records.

    Raises:
      SettingError: a leaf of the batch is not a tensor, or the batch has no leaves.
      DataError: a tensor has another number of rows. The message gives no number: how many records were drawn is
        private.
    """
    found = list(leaves(batch))
    if not found:
        raise SettingError("Expected a batch of tensors; got an empty one. There is nothing to train on.")
    for _, leaf in found:
        if not isinstance(leaf, Tensor):
            raise _no_tensor(leaf)
    for _, leaf in found:
        if leaf.ndim == 0 or len(leaf) != count:
            raise DataError(
                "Expected every tensor of a collated batch to have one row for each record, in the records' order; got "
                "one that has not. Rows are clipped as records, so a record that is left out, repeated or shared by "
                "all would not be protected. Let collate_fn keep all records (views of one record belong on a second "
                "axis), and keep what belongs to no record, such as a graph, in a buffer of the model."
            )
