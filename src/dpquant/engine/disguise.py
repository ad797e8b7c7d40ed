# SPDX-License-Identifier: Apache-2.0
"""A tensor of each example that a model's code takes for one tensor of all examples.

A table of relative positions is looked up once for all examples, `(T, T, heads)`. The model's code turns it round, adds
an axis of length 1 in front and adds it to the scores `(B, heads, T, T)` of every example. To know each example's
gradient, every example needs a table of its own; with one more axis in front, the code would turn round the wrong ones.
So the tables of all examples are passed on as one object that shows the shape of a single table. What the code does
with it alone is done to each table. The object ends where its axis of length 1 meets the examples: there the tables,
one after the other on that axis, are what the code expects.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

_FACTS = ("size", "dim", "numel", "stride", "is_contiguous", "is_floating_point", "is_complex", "element_size")
_MEETINGS = (Tensor.expand, Tensor.expand_as, Tensor.repeat, torch.broadcast_to, Tensor.broadcast_to)


def _operator(name: str) -> Callable[..., Any]:
    """Return an operator of Python, which does not look for attributes on the object."""

    def operator(self: "Disguised", *args: Any) -> Any:
        return self.__torch_function__(getattr(Tensor, name), (type(self),), (self, *args))

    return operator


class Disguised:
    """Tensors of shape S, one for each of B examples, that behave as one tensor of shape S.

    Functions and methods of torch act on each of them. With other tensors, or where a first axis of length 1 is
    expanded, they get `(B, *S[1:])`, if S begins with that axis; else a TypeError is raised.
    """

    def __init__(self, each: Tensor):
        """Disguise a tensor `(B, *S)`."""
        self._each = each

    def met(self) -> Tensor:
        """Return the tensors on the axis of the examples: `(B, *S[1:])`. S has to begin with 1."""
        if self._each.ndim < 2 or self._each.shape[1] != 1:
            raise TypeError(f"a tensor of shape {tuple(self.shape)} meets others, and has no axis for the examples")
        return self._each[:, 0]

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        leaves, tree = pytree.tree_flatten((args, dict(kwargs or {})))
        places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, cls)]

        def call(*tensors: Tensor) -> Any:
            given = list(leaves)
            for place, tensor in zip(places, tensors, strict=True):
                given[place] = tensor
            again, named = pytree.tree_unflatten(given, tree)
            return function(*again, **named)

        if function in _MEETINGS or any(isinstance(leaf, Tensor) and leaf.ndim for leaf in leaves):
            return call(*(leaves[place].met() for place in places))
        found = torch.func.vmap(call)(*(leaves[place]._each for place in places))
        return pytree.tree_map_only(Tensor, cls, found)

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(Tensor, name)
        if name in _FACTS or not callable(attribute):  # a property, as shape
            return getattr(self._each[0], name)

        def method(*args: Any, **kwargs: Any) -> Any:
            return self.__torch_function__(attribute, (type(self),), (self, *args), kwargs)

        return method

    def __len__(self) -> int:
        return len(self._each[0])

    __getitem__ = _operator("__getitem__")
    __neg__ = _operator("__neg__")
    __add__, __radd__ = _operator("__add__"), _operator("__radd__")
    __sub__, __rsub__ = _operator("__sub__"), _operator("__rsub__")
    __mul__, __rmul__ = _operator("__mul__"), _operator("__rmul__")
    __truediv__ = _operator("__truediv__")
