# SPDX-License-Identifier: Apache-2.0
"""Batches as trees of tensors whose first axis is the record, and the microbatches that they are worked off in.

A batch is a tensor, or tuples, lists and mappings of batches. Any `collections.abc.Mapping` counts, such as the
`BatchEncoding` of Hugging Face's tokenizers, which is no dict. Nothing here knows models or privacy.
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
    """Records that one forward and backward pass takes.

    Attributes:
      data: the batch, `size` rows.
      record_ids: int64 `(size,)`.
      num_examples: the first so many rows count; the others are copies that fill the microbatch up.
    """

    data: Any
    record_ids: Tensor
    num_examples: int


def microbatches(batch: Any, record_ids: Tensor, size: int) -> Iterator[Microbatch]:
    """Cut a batch into microbatches of exactly `size` rows."""
    for rows, num_examples in filled_up(len(record_ids), size):
        yield Microbatch(take_rows(batch, rows), record_ids[rows], num_examples)


def filled_up(count: int, size: int) -> Iterator[tuple[Tensor, int]]:
    """For each microbatch of `count` examples: int64 `(size,)` positions of its rows, and how many of them count.

    The last one is filled up with its own last example, which counts once. An operator may sum in another order when it
    is given another number of examples, and stochastic rounding makes a different code of a last bit. Were microbatches
    only as long as need be, a record that comes or goes would change what the others contribute.
    """
    for start in range(0, count, size):
        yield torch.arange(start, start + size).clamp_(max=count - 1), min(size, count - start)


def is_numbers(value: Any) -> bool:
    """Whether something is a list of plain numbers, which is one leaf of a record: token ids, for instance."""
    return isinstance(value, list) and bool(value) and all(isinstance(one, bool | int | float) for one in value)


def with_leaves(batch: Any, change: Callable[[Any], Any]) -> Any:
    """Return a batch of the same tuples, lists and mappings, with everything else in it changed."""
    match batch:
        case list() if is_numbers(batch):
            return change(batch)
        case dict():
            return {key: with_leaves(value, change) for key, value in batch.items()}
        case MutableMapping():  # a copy keeps the class and whatever else it carries
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


def leaves(batch: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (path, leaf) for everything in a batch that is not a tuple, list or mapping; the path is for messages."""
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
    """Return the same rows of every tensor of a batch.

    Raises:
      SettingError: something in the batch is no tensor.
    """

    def taken(leaf: Any) -> Tensor:
        if isinstance(leaf, Tensor):
            return leaf[rows]
        raise _no_tensor(leaf)

    return with_leaves(batch, taken)


def _no_tensor(leaf: Any) -> SettingError:
    return SettingError(
        f"Expected a batch of tensors, tuples, lists and mappings; got a {type(leaf).__name__}. A microbatch takes "
        "the same rows of every tensor. Give the data set a collate function that returns tensors."
    )


def to_device(batch: Any, device: torch.device) -> Any:
    """Return the batch with all of its tensors on a device."""
    return with_leaves(batch, lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf)


def num_rows(batch: Any) -> int:
    """Return the length of some tensor of a batch, all of which `check_rows` holds to be equally long."""
    return next(len(leaf) for _, leaf in leaves(batch) if isinstance(leaf, Tensor))


def check_rows(batch: Any, count: int) -> None:
    """Refuse a batch some tensor of which has not one row for each of `count` records.

    Raises:
      SettingError: something in the batch is no tensor, or there is nothing in it.
      DataError: another number of rows. The message tells none: how many records were drawn is private.
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
