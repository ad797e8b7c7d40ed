# SPDX-License-Identifier: Apache-2.0
"""Makes synthetic records in the form of a data set's, to try a model on before a private record is used.

The meaning of a record's values is unknown: pixels, amounts, counts, token ids, labels from 0 or from 1, masks,
lengths. So there are several kinds of values, and the check uses the first on which model and loss run with finite
results. Of each kind there are three records, a, b and c. b and c differ in every leaf, so that replacing one by the
other shows any influence on their batchmates. Where no kind fits, the user gives example records.

Records may differ in length. The axes in which they may are found by giving the collate function records of different
lengths. These axes get one of our own lengths, because the length of the record that the form is taken from is
private.
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

_VARIED = frozenset({"normal", "positive", "zero one", "few", "many"})  # kinds tried for one leaf at a time
_MOST_COMBINATIONS = 200
_LENGTHS = (16, 32, 64, 128, 8, 4, 256, 2)
_LONGER, _SHORTER = 5, 2  # other lengths than n: n + 5 and n / 2
_MOST_VALUES = 2**19  # in a leaf with lengths of our own: a collate function may accept any size along every axis

Collate = Callable[[list], Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Specimens:
    """Three synthetic records, and how to collate batches of them.

    Attributes:
      records: a, b and c.
      collate: the user's collate function.
      device: of the batches.
      form: of the data set's records, a `Leaf` or `Unused` in the place of each value.
      padded: whether the collate function gives a row another shape when it is collated with longer records.
      kind: of the values, for messages.
      variations: makes specimens that differ from these in the kind of one leaf.
    """

    records: tuple[Any, Any, Any]
    collate: Collate
    device: torch.device
    form: Any
    padded: bool
    kind: str
    variations: Callable[[], "Iterator[Specimens]"] = lambda: iter(())

    def batch(self, order: Sequence[int]) -> Any:
        """Return the batch of the records with these numbers, one row for each.

        Raises:
          DataError: a tensor of the batch has another number of rows.
        """
        with seeded(0), RecordDraws(0, torch.tensor(order)):
            batch = self.collate([self.records[number] for number in order])
        check_rows(batch, len(order))
        return to_device(batch, self.device)


def from_examples(examples: Any, collate: Collate, device: torch.device) -> Specimens:
    """Return specimens made of records that the user gives, public ones or synthetic ones of the data's own domain.

    Args:
      examples: a list or a map-style data set of at least two records.
      collate: the user's collate function.
      device: of the batches.
    Raises:
      SettingError: not a list or data set, or fewer than two records.
      DataError: the records differ in structure or types.
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


def candidates(
    records: Sequence[Any], collate: Collate, device: torch.device, *, most_values: int = _MOST_VALUES
) -> Iterator[Specimens]:
    """Yield specimens of every kind in the form of given records; first those with one kind for all leaves of a type.

    Args:
      records: at least one record of the data set, for its form.
      collate: the user's collate function.
      device: of the batches.
      most_values: in a leaf that has lengths of our own; longer specimens are left out.
    Raises:
      DataError: a record holds other values than tensors, numbers and text; records differ in form; or the collate
        function leaves records out.
    Privacy: uses types and shapes only, without the size of an axis in which records may differ.
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
        if axes and any(math.prod(leaf.shape) > most_values for _, leaf in leaves(forms[1])):
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
    """Return synthetic record number 0, 1 or 2, with a kind of values for each leaf."""
    generator, left = torch.Generator().manual_seed(index), iter(kinds)
    return with_leaves(form, lambda leaf: leaf.make(next(left), index, generator))


def _combinations(form: Any) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    """Return combinations of kinds, one kind a leaf: one kind for each type first, then others up to a limit."""
    choices = [leaf.kinds for _, leaf in leaves(form)]
    uniform = []
    for floats, integers in itertools.product(FLOATS, INTEGERS):
        by_choice = {FLOATS: floats, INTEGERS: integers}
        uniform.append(tuple(by_choice.get(choice, choice[0]) for choice in choices))
    uniform = list(dict.fromkeys(uniform))
    product = itertools.islice(itertools.product(*choices), _MOST_COMBINATIONS)
    return uniform, [kinds for kinds in product if kinds not in uniform]


def _varied(form: Any, kinds: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Return combinations that differ from this one in one leaf."""
    choices = [leaf.kinds for _, leaf in leaves(form)]
    return [
        (*kinds[:number], other, *kinds[number + 1 :])
        for number, choice in enumerate(choices)
        for other in choice
        if other in _VARIED and other != kinds[number]
    ]


def _free_axes(form: Any, collate: Collate) -> _Axes:
    """Return the axes in which the collate function accepts different sizes; axes of equal size are tried together."""
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
    """Whether the collate function makes a batch of the records, with one row for each."""
    try:
        with seeded(0):
            check_rows(collate(list(records)), len(records))
    except Exception:  # the user's function may raise anything on records of different shapes
        return False
    return True


def _check_collation(records: list[Any], collate: Collate) -> None:
    """Raise DataError if the collate function gives another number of rows than records.

    Other exceptions are ignored here: values of this kind may be outside of the data's domain.
    """
    try:
        with seeded(0):
            batch = collate(records)
    except Exception:
        return
    check_rows(batch, len(records))


def _pads(records: Sequence[Any], collate: Collate) -> bool:
    """Whether a record's row has another shape when it is collated with the others than with copies of itself."""

    def shapes(order: Sequence[int]) -> list[torch.Size]:
        with seeded(0):
            return [leaf.shape[1:] for _, leaf in leaves(collate([records[number] for number in order]))]

    try:
        return any(shapes((0, other, other)) != shapes((0, 0, 0)) for other in (1, 2))
    except Exception:  # reported where the batch is needed
        return False


def _resized(form: Any, axes: _Axes, size: int | None) -> Any:
    """Return the form with this size along some axes; None: any size."""
    numbers = itertools.count()

    def changed(leaf: Leaf | Unused) -> Leaf | Unused:
        number = next(numbers)
        if isinstance(leaf, Unused):
            return leaf
        shape = tuple(size if (number, axis) in axes else old for axis, old in enumerate(leaf.shape))
        return dataclasses.replace(leaf, shape=shape)

    return with_leaves(form, changed)


def _common(form: Any, other: Any) -> Any:
    """Return the form that matches both records: None for each size in which they differ.

    Raises:
      DataError: they differ in more than sizes.
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
