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
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from dpquant.engine.batches import check_rows, leaves, to_device, with_leaves
from dpquant.engine.randomness import RecordDraws, seeded
from dpquant.errors import DataError, SettingError

_GROWTH = 4.0  # each record is so many times the one before: a statistic over the batch then moves them all
_FLOATS = ("normal", "unit", "positive", "signed unit", "counts", "binary", "negative")
_INTEGERS = ("zero one", "one two", "few", "many")
_VARIED = frozenset({"normal", "positive", "zero one", "few", "many"})  # kinds that a single leaf is varied to
_MOST_COMBINATIONS = 200
_LENGTHS = (16, 32, 64, 128, 8, 4, 256, 2)
_LONGER, _SHORTER = 5, 2  # other lengths than n: n + 5 and n / 2
_MOST_VALUES = 2**19  # in a leaf whose lengths are ours: a collate function may take any size along every axis

Collate = Callable[[list], Any]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """What is public of one value in a record.

    Attributes:
      dtype: torch's; of Python's numbers, what they become.
      shape: None where records differ.
      type: of the value itself.
      finish: makes such a value of a tensor.
    """

    dtype: torch.dtype
    shape: tuple[int | None, ...]
    type: type
    finish: Callable[[Tensor], Any] = dataclasses.field(compare=False)

    @classmethod
    def of(cls, value: Any) -> "Leaf | Unused":
        """The leaf that a value is an example of.

        Raises:
          DataError: nothing that a tensor could be made of.
        """
        if isinstance(value, str | bytes | None):
            return Unused(type(value))
        try:
            tensor = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise DataError(
                f"Expected records of tensors, numbers, tuples, lists and mappings; got a {type(value).__name__}. "
                "Convert it in the data set's __getitem__."
            ) from error
        finish: Callable[[Tensor], Any]
        if isinstance(value, Tensor):
            finish = lambda made: made  # noqa: E731
        elif isinstance(value, np.ndarray | np.generic):
            finish = lambda made: made.numpy().astype(value.dtype)[()]  # noqa: E731
        elif isinstance(value, bool | int | float | list):
            finish = lambda made: made.tolist()  # noqa: E731
        else:
            finish = lambda made: made  # noqa: E731
        return cls(tensor.dtype, tuple(tensor.shape), type(value), finish)

    def matches(self, value: Any) -> bool:
        """Whether a value has this type and shape."""
        if type(value) is not self.type:
            return False
        if isinstance(value, Tensor):
            same = value.dtype == self.dtype and value.layout == torch.strided
        else:
            try:
                value = torch.as_tensor(value)
            except (TypeError, ValueError, RuntimeError, OverflowError):  # text among numbers, or a number too large
                return False
            same = value.dtype == self.dtype
        shape = tuple(value.shape)
        fits = len(shape) == len(self.shape) and all(a in (None, b) for a, b in zip(self.shape, shape, strict=True))
        return same and fits

    def make(self, kind: str, index: int, generator: torch.Generator) -> Any:
        """A value of some kind for the record of this number."""
        shape = [1 if size is None else size for size in self.shape]
        if self.dtype == torch.bool:
            made = _integers("zero one", index, shape, generator).bool()
        elif self.dtype == torch.uint8 and len(shape) > 1:
            made = torch.randint(0, 256, shape, generator=generator)
        elif self.dtype.is_floating_point or self.dtype.is_complex:
            made = _floats(kind, index, shape, generator)
        else:
            made = _integers(kind, index, shape, generator)
        return self.finish(made.to(self.dtype))

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of values that make a difference."""
        if self.dtype == torch.bool or (self.dtype == torch.uint8 and len(self.shape) > 1):
            return ("any",)
        return _FLOATS if self.dtype.is_floating_point or self.dtype.is_complex else _INTEGERS


@dataclasses.dataclass(frozen=True)
class Unused:
    """Text or None in a record: a file's name, for instance, which the collate function leaves out of the batch."""

    type: type
    shape: tuple[int, ...] = ()
    kinds: ClassVar[tuple[str, ...]] = ("any",)

    def matches(self, value: Any) -> bool:
        """Whether a value has this type; text may be missing in a record."""
        return value is None or self.type is type(None) or type(value) is self.type

    def make(self, kind: str, index: int, generator: torch.Generator) -> Any:
        """Empty text, or None."""
        return None if self.type is type(None) else self.type()


def _floats(kind: str, index: int, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    normal, unit = torch.randn(shape, generator=generator), torch.rand(shape, generator=generator)
    size = _GROWTH**index
    match kind:
        case "normal":
            return size * normal
        case "unit":
            return 0.05 + 0.9 * unit
        case "signed unit":
            return 1.8 * unit - 0.9
        case "positive":
            return size * (0.5 + unit)
        case "negative":
            return -size * (0.5 + unit)
        case "counts":
            return torch.floor(4 * unit) + 1 + index
        case _:
            return _integers("zero one", index, shape, generator).float()


def _integers(kind: str, index: int, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    count = int(np.prod(shape))
    if count <= 1:
        values = {"zero one": (0, 1, 0), "one two": (1, 2, 1), "many": (1, 7, 31)}.get(kind, (0, 1, 2))
        return torch.full(list(shape), values[index])  # b differs from c
    match kind:
        case "zero one":  # a mask's ones, then zeros: of a half, of one and of all positions
            ones = {0: -(-shape[-1] // 2), 1: 1}.get(index, shape[-1])
            return (torch.arange(shape[-1]) < ones).long().expand(list(shape)).clone()
        case "one two":
            made = torch.randint(1, 3, shape, generator=generator)
        case "many":  # in which a maximum or a scale over the batch follows b or c
            made = torch.randint(0, 2 * int(_GROWTH) ** index, shape, generator=generator)
            made.view(-1)[-1] = 2 * int(_GROWTH) ** index - 1
            return made
        case _:
            made = torch.randint(0, 4, shape, generator=generator)
    made.view(-1)[0] = 1 + index % 2  # at least here b differs from c
    return made


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


def matches(form: Any, record: Any) -> bool:
    """Whether a record has the structure, types and shapes of a form."""
    if isinstance(form, Leaf | Unused):
        return form.matches(record)
    if isinstance(form, Mapping):
        return (
            isinstance(record, Mapping)
            and record.keys() == form.keys()
            and all(matches(one, record[key]) for key, one in form.items())
        )
    return (
        type(record) is type(form)
        and len(record) == len(form)
        and all(matches(one, value) for one, value in zip(form, record, strict=True))
    )


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
    for floats, integers in itertools.product(_FLOATS, _INTEGERS):
        by_choice = {_FLOATS: floats, _INTEGERS: integers}
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
