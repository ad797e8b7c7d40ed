# SPDX-License-Identifier: Apache-2.0
"""Where the tensors of a module's calls have their examples, and how these are brought to the first axis.

A model may put all positions of all examples into one axis (OPT, routers of experts), or sequences first (Longformer,
`nn.Transformer`). Nothing is mixed by that, but what is quantized, clipped and summed is rows of the first axis.

    first    (B, ...)        as everywhere else
    flat     (B * T, ...)    the positions of an example next to each other
    second   (T, B, ...)     positions first

`routing.py` finds out which it is, on a few rows.

Symbols: B examples, T positions.
"""

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor
from torch.utils import _pytree as pytree

Arrangement = Literal["first", "flat", "second"]
ARRANGEMENTS: tuple[Arrangement, ...] = ("first", "flat", "second")


def examples_first(x: Tensor, arrangement: Arrangement, size: int) -> Tensor:
    """Return a view of a tensor of `size` examples with the examples on the first axis: `(B, ...)`."""
    match arrangement:
        case "first":
            return x
        case "flat":
            return x.unflatten(0, (size, -1))
        case "second":
            return x.transpose(0, 1)


def put_back(x: Tensor, arrangement: Arrangement) -> Tensor:
    """Return a tensor `(B, ...)` as the model has it."""
    match arrangement:
        case "first":
            return x
        case "flat":
            return x.flatten(0, 1)
        case "second":
            return x.transpose(0, 1)


def can_be(x: Tensor, arrangement: Arrangement, size: int) -> bool:
    """Return whether a tensor's shape is one of `size` examples in this arrangement."""
    match arrangement:
        case "first":
            return x.ndim > 0 and len(x) == size
        case "flat":
            return x.ndim > 0 and len(x) > size and len(x) % size == 0
        case "second":
            return x.ndim > 1 and x.shape[1] == size


def all_examples_first(tree: Any, output: Tensor, arrangement: Arrangement, size: int) -> Any:
    """Return a tree of arguments with the examples on the first axis of the tensors that have them where `output` has.

    That is of those with as many rows or, sequences first, with as many positions and examples.
    """
    axes = 2 if arrangement == "second" else 1

    def moved(x: Tensor) -> Tensor:
        return examples_first(x, arrangement, size) if x.shape[:axes] == output.shape[:axes] else x

    return tree if arrangement == "first" else pytree.tree_map_only(Tensor, moved, tree)


def arrangement_of(gradients: Sequence[Tensor | None]) -> Arrangement | None:
    """Return how a tensor has its examples: what a row's loss depends on belongs to that row.

    Args:
      gradients: of each row's loss with respect to the tensor; None or zero where it does not depend on it.
    Returns: None if no loss depends on the tensor, or if every arrangement would mix rows.
    """
    size = len(gradients)
    known = [(row, g) for row, g in enumerate(gradients) if g is not None and bool(g.any())]
    for arrangement in ARRANGEMENTS:
        if known and all(can_be(g, arrangement, size) and _is_of(g, row, arrangement, size) for row, g in known):
            return arrangement
    return None


def _is_of(gradient: Tensor, row: int, arrangement: Arrangement, size: int) -> bool:
    """Whether a gradient is zero everywhere but at one row."""
    rows = examples_first(gradient, arrangement, size).clone()
    rows[row] = 0
    return not bool(rows.any())
