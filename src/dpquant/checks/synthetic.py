# SPDX-License-Identifier: Apache-2.0
"""Synthetic records: shaped like a data set's, with values of our own, to try a model on before a private one is used.

What a record's values mean is not known: pixels, amounts, counts, token ids, labels from 0 or from 1, masks, lengths.
So there are several kinds of values, and the first on which model and loss run, with finite results, is taken. Three
records are made of each kind, a, b and c: b and c differ in every leaf, so that putting one in the place of the other
shows any influence that other examples of a batch have. Where no kind fits, the user gives example records.

Records may differ in length. Which axes may is found by giving the collate function records of different lengths. Such
an axis gets a length of ours, because the length of the one record that shapes are taken from is private.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from dpquant.checks.forms import FLOATS, INTEGERS, Leaf, Unused, matches
from dpquant.engine.batches import check_rows, leaves, to_device, with_leaves
from dpquant.engine.randomness import RecordDraws, seeded
from dpquant.errors import DataError, SettingError

_VARIED = frozenset({"normal", "positive", "zero one", "few", "many"})  # kinds that a single leaf is varied to
_MOST_COMBINATIONS = 200
_LENGTHS = (16, 32, 64, 128, 8, 4, 256, 2)
_LONGER, _SHORTER = 5, 2  # other lengths than n: n + 5 and n / 2
_MOST_VALUES = 2**19  # in a leaf whose lengths are ours: a collate function may take any size along every axis

Collate = Callable[[list], Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Specimens:
    """Three synthetic records and the way to batches of them.

    Attributes:
      records: a, b and c.
      collate: the user's.
      device: where batches go.
      form: what records have to look like, `Leaf`s in the place of values.
      padded: whether the collate function gives a row another shape in the company of longer records.
      kind: of the values, in words.
      variations: the same with one leaf of another kind each.
    """

    records: tuple[Any, Any, Any]
    collate: Collate
    device: torch.device
    form: Any
    padded: bool
    kind: str
    variations: Callable[[], "Iterator[Specimens]"] = lambda: iter(())

    def batch(self, order: Sequence[int]) -> Any:
        """The records of these numbers, collated, one row for each.

        Raises:
          DataError: some tensor has another number of rows.
        """
        with seeded(0), RecordDraws(0, torch.tensor(order)):
            batch = self.collate([self.records[number] for number in order])
        check_rows(batch, len(order))
        return to_device(batch, self.device)


def from_examples(examples: Any, collate: Collate, device: torch.device) -> Specimens:
    """Specimens of records that the user gives: public ones, or synthetic ones of the data's own domain.

    Args:
      examples: a list or a map-style data set of at least two records.
      collate: the user's.
      device: where batches go.
    Raises:
      SettingError: not a list or data set, or fewer than two records.
      DataError: they are of different structure.
    """
    if isinstance(examples, tuple) or not (hasattr(examples, "__getitem__") and hasattr(examples, "__len__")):
        raise SettingError(
            f"Expected example to be a list or a data set of records; got a {type(examples).__name__}. "
            "Give a few public or synthetic records, as the data set would."
        )
    if len(examples) < 2:
        raise SettingError(
            f"Expected example to hold at least two records; got {len(examples)}. Whether records influence each other "
            "shows when one takes another's place. Give two or three that differ in every value."
        )
    records = tuple(examples[number] for number in (0, 1, 2 if len(examples) > 2 else 0))
    form = with_leaves(records[0], Leaf.of)
    for other in records[1:]:
        form = _common(form, with_leaves(other, Leaf.of))
    if not all(matches(form, record) for record in records):
        raise _differ()
    return Specimens(
        records=records,
        collate=collate,
        device=device,
        form=form,
        padded=_pads(records, collate),
        kind="the examples given",
    )


def candidates(records: Sequence[Any], collate: Collate, device: torch.device) -> Iterator[Specimens]:
    """Specimens of every kind, shaped like given records; first those whose leaves of a type have the same kind.

    Args:
      records: a few, at least one, that stand for all.
      collate: the user's.
      device: where batches go.
    Raises:
      DataError: a record that cannot be imitated, records of different forms, or a collate function that leaves some
        records out.
    Privacy: uses types and shapes only; of an axis in which records may differ, not even its size.
    """
    form = with_leaves(records[0], Leaf.of)
    uniform, mixed = _combinations(form)
    for kinds in uniform:
        _check_collation([_record(form, kinds, index) for index in range(3)], collate)
    free = _free_axes(form, collate)
    if not all(matches(_resized(form, free, None), record) for record in records):
        raise DataError(
            "Expected all records to have the same structure, types and shapes; got two that differ in more than "
            "lengths that collate_fn takes. Records of another form would be left out as broken. Convert them in the "
            "data set's __getitem__, or give example= records."
        )
    sizes = [(length, uniform) for length in _LENGTHS] if free else []
    for length, combinations in [*sizes, (None, uniform + mixed)]:
        axes = free if length is not None else frozenset()
        lengths = (0, 0, 0) if length is None else (length, length + _LONGER, max(length // _SHORTER, 1))
        forms = [_resized(form, axes, size) for size in lengths]
        if axes and any(math.prod(leaf.shape) > _MOST_VALUES for _, leaf in leaves(forms[1])):
            continue

        def specimens(
            kinds: tuple[str, ...], axes: _Axes = axes, forms: list[Any] = forms, varied: bool = False
        ) -> Specimens:
            records = tuple(_record(sized, kinds, index) for index, sized in enumerate(forms))
            others = () if varied else _varied(form, kinds)
            return Specimens(
                records=records,
                collate=collate,
                device=device,
                form=_resized(form, axes, None),
                padded=bool(axes) and _pads(records, collate),
                kind=", ".join(dict.fromkeys(kinds)),
                variations=lambda: (specimens(other, axes, forms, True) for other in others),
            )

        yield from map(specimens, combinations)


_Axes = frozenset[tuple[int, int]]  # (number of the leaf, axis)


def _record(form: Any, kinds: Sequence[str], index: int) -> Any:
    """The record of this number, with a kind of values for each leaf."""
    generator, left = torch.Generator().manual_seed(index), iter(kinds)
    return with_leaves(form, lambda leaf: leaf.make(next(left), index, generator))


def _combinations(form: Any) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    """Kinds for every leaf: the same for all leaves of a type; and others, as many as can be tried."""
    choices = [leaf.kinds for _, leaf in leaves(form)]
    uniform = []
    for floats, integers in itertools.product(FLOATS, INTEGERS):
        by_choice = {FLOATS: floats, INTEGERS: integers}
        uniform.append(tuple(by_choice.get(choice, choice[0]) for choice in choices))
    uniform = list(dict.fromkeys(uniform))
    product = itertools.islice(itertools.product(*choices), _MOST_COMBINATIONS)
    return uniform, [kinds for kinds in product if kinds not in uniform]


def _varied(form: Any, kinds: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The same kinds but for one leaf."""
    choices = [leaf.kinds for _, leaf in leaves(form)]
    return [
        (*kinds[:number], other, *kinds[number + 1 :])
        for number, choice in enumerate(choices)
        for other in choice
        if other in _VARIED and other != kinds[number]
    ]


def _free_axes(form: Any, collate: Collate) -> _Axes:
    """The axes in which records may differ, as far as the collate function goes: equal sizes are tried together."""
    shapes = [leaf.shape for _, leaf in leaves(form)]
    axes = [(number, axis) for number, shape in enumerate(shapes) for axis in range(len(shape))]
    kinds = [leaf.kinds[0] for _, leaf in leaves(form)]
    free: set[tuple[int, int]] = set()
    for size in dict.fromkeys(shapes[number][axis] for number, axis in axes):
        same = frozenset((number, axis) for number, axis in axes if shapes[number][axis] == size)
        by_axis = [frozenset(one for one in same if one[1] == axis) for axis in {axis for _, axis in same}]
        for group in dict.fromkeys([same, *by_axis]):
            if group <= free:
                continue
            longer = _resized(form, group, size + _LONGER)
            records = [_record(sized, kinds, index) for index, sized in enumerate((form, longer, form))]
            if _collates(records, collate):
                free |= group
    return frozenset(free)


def _collates(records: Sequence[Any], collate: Collate) -> bool:
    """Whether the records go into one batch with a row for each."""
    try:
        with seeded(0):
            check_rows(collate(list(records)), len(records))
    except Exception:  # whatever the user's function raises: records of these shapes do not go together
        return False
    return True


def _check_collation(records: list[Any], collate: Collate) -> None:
    """Raise DataError if the collate function gives another number of rows: records of any kind have to stay.

    What else it raises is of no interest here: a kind may be outside of the data's domain.
    """
    try:
        with seeded(0):
            batch = collate(records)
    except Exception:
        return
    check_rows(batch, len(records))


def _pads(records: Sequence[Any], collate: Collate) -> bool:
    """Whether a record's row has another shape in the company of the others than in that of its copies."""

    def shapes(order: Sequence[int]) -> list[torch.Size]:
        with seeded(0):
            return [leaf.shape[1:] for _, leaf in leaves(collate([records[number] for number in order]))]

    try:
        return any(shapes((0, other, other)) != shapes((0, 0, 0)) for other in (1, 2))
    except Exception:  # reported where the batch is needed
        return False


def _resized(form: Any, axes: _Axes, size: int | None) -> Any:
    """The form with another size along some axes; None: any."""
    numbers = itertools.count()

    def changed(leaf: Leaf | Unused) -> Leaf | Unused:
        number = next(numbers)
        if isinstance(leaf, Unused):
            return leaf
        shape = tuple(size if (number, axis) in axes else old for axis, old in enumerate(leaf.shape))
        return dataclasses.replace(leaf, shape=shape)

    return with_leaves(form, changed)


def _common(form: Any, other: Any) -> Any:
    """The form that both records have: sizes in which they differ are free.

    Raises:
      DataError: they differ in more.
    """
    theirs = iter([leaf for _, leaf in leaves(other)])

    def common(leaf: Leaf | Unused) -> Leaf | Unused:
        one = next(theirs, None)
        if isinstance(leaf, Unused) and isinstance(one, Unused):
            return leaf
        if (
            not isinstance(one, Leaf)
            or not isinstance(leaf, Leaf)
            or (one.dtype, one.type, len(one.shape)) != (leaf.dtype, leaf.type, len(leaf.shape))
        ):
            raise _differ()
        return dataclasses.replace(
            leaf, shape=tuple(a if a == b else None for a, b in zip(leaf.shape, one.shape, strict=True))
        )

    return with_leaves(form, common)


def _differ() -> DataError:
    return DataError(
        "Expected all records of example to have the same structure and types; got two that differ. A record of "
        "another form cannot be told from a broken one. Give records as the data set does."
    )
