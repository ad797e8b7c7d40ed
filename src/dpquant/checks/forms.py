# SPDX-License-Identifier: Apache-2.0
"""The form of a record (structure, types and shapes, which are public) and synthetic values of that form."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from dpquant.errors import DataError

_GROWTH = 4.0  # ratio of successive records' sizes, so that one of them dominates any statistic over the batch
FLOATS = ("normal", "unit", "positive", "signed unit", "counts", "binary", "negative")
INTEGERS = ("zero one", "one two", "few", "many")


@dataclasses.dataclass(frozen=True)
class Leaf:
    """The public form of one value in a record.

    Attributes:
      dtype: of the tensor that the value is, or is converted to.
      shape: None for each axis in which records may differ.
      type: the value's class.
      finish: converts a tensor to a value of this class.
    """

    dtype: torch.dtype
    shape: tuple[int | None, ...]
    type: type
    finish: Callable[[Tensor], Any] = dataclasses.field(compare=False)

    @classmethod
    def of(cls, value: Any) -> "Leaf | Unused":
        """Return the form of a value.

        Raises:
          DataError: the value cannot be converted to a tensor.
        """
        if isinstance(value, str | bytes | None):
            return Unused(type(value))
        try:
            tensor = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError):
            raise DataError(
                f"Expected records of tensors, numbers, tuples, lists and mappings; got a {type(value).__name__}. "
                "Convert it in the data set's __getitem__."
            ) from None  # its text may quote a record
        return cls(tensor.dtype, tuple(tensor.shape), type(value), _finish(value))

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
        """Return a synthetic value.

        Args:
          kind: one of `kinds`.
          index: the record's number: 0, 1 or 2.
          generator: of the values.
        """
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
        """The kinds of values to try for this type."""
        if self.dtype == torch.bool or (self.dtype == torch.uint8 and len(self.shape) > 1):
            return ("any",)
        return FLOATS if self.dtype.is_floating_point or self.dtype.is_complex else INTEGERS


def _finish(value: Any) -> Callable[[Tensor], Any]:
    """Return the function that converts a tensor to a value of this one's class."""
    if isinstance(value, np.ndarray | np.generic):
        return lambda made: made.numpy().astype(value.dtype)[()]
    if isinstance(value, bool | int | float | list):
        return lambda made: made.tolist()
    return lambda made: made


@dataclasses.dataclass(frozen=True)
class Unused:
    """The form of text or None in a record, such as a file's name, which the collate function leaves out of the batch.

    Attributes:
      type: str, bytes or that of None.
      shape: of a scalar.
      kinds: one: there are no values to vary.
    """

    type: type
    shape: tuple[int, ...] = ()
    kinds: ClassVar[tuple[str, ...]] = ("any",)

    def matches(self, value: Any) -> bool:
        """Whether a value has this type; text may be missing in a record."""
        return value is None or self.type is type(None) or type(value) is self.type

    def make(self, kind: str, index: int, generator: torch.Generator) -> Any:
        """Return empty text, or None."""
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
