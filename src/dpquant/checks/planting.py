# SPDX-License-Identifier: Apache-2.0
"""Couplings of examples that the check plants itself, to show that it would see the model's own, and where it can."""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from dpquant.engine.batches import Microbatch, leaves, with_leaves
from dpquant.engine.passes import Objective
from dpquant.engine.randomness import seeded
from dpquant.errors import ModelError


class Blind(ModelError):
    """The check did not see a coupling that it planted itself."""


def places(objective: Objective, piece: Microbatch, key: int) -> tuple[dict[int, str], list[nn.Module]]:
    """Return where couplings can be planted: {number of a leaf of the batch: its path}, and modules.

    The leaves are those that enter a computation. The modules, in the order of their calls, have trainable parameters
    of their own and return a tensor of examples. A module whose output is the same for all records, such as learnt
    positions, is left out: its mean couples nothing.

    Args:
      objective: the model and its loss.
      piece: three records, each another.
      key: of the random draws.
    """
    called: dict[nn.Module, None] = {}

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        of_examples = isinstance(output, Tensor) and output.is_floating_point() and output.ndim and len(output) == 3
        if of_examples and not (torch.equal(output[0], output[1]) and torch.equal(output[0], output[2])):
            called[module] = None

    own = [m for m in objective.model.modules() if any(p.requires_grad for p in m.parameters(recurse=False))]
    handles = [module.register_forward_hook(note) for module in own]
    paths, tensors = zip(*leaves(piece.data), strict=True)
    try:
        with seeded(key), torch.no_grad(), _Watched(tensors) as watched:
            objective.loss_fn(objective.model, piece.data)
    finally:
        for handle in handles:
            handle.remove()
    return {number: paths[number] for number in sorted(watched.used)}, list(called)


def add_mean(module: Any, inputs: Any, output: Any) -> Any:
    """Add the batch's mean to each row: a coupling to plant as a forward hook or on a loss."""
    if isinstance(output, Tensor) and output.is_floating_point() and output.ndim:
        return output + output.detach().mean(0, keepdim=True)
    return output


def add_means_of_pairs(module: Any, inputs: Any, output: Any) -> Any:
    """Add to each row of two batches of two, side by side, the mean of its batch: as `add_mean` on either."""
    if isinstance(output, Tensor) and output.is_floating_point() and output.ndim and len(output) == 4:
        return output + output.detach().unflatten(0, (2, 2)).mean(1).repeat_interleave(2, 0)
    return output


def swapped_in_pairs(batch: Any, number: int) -> Any:
    """Exchange one leaf's rows within each of two batches of two: each example gets the other's."""
    numbers = itertools.count()

    def exchanged(leaf: Any) -> Any:
        return torch.stack([leaf[row] for row in (1, 0, 3, 2)]) if next(numbers) == number else leaf

    return with_leaves(batch, exchanged)


def blind(place: str) -> Blind:
    """Return the error for a coupling that was planted and not seen."""
    return Blind(
        f"Expected synthetic records that would show a coupling of examples in {place}; one that was planted there had "
        "no effect. So the check could not see whether examples are kept apart. Give example= a few public or "
        "synthetic records that differ in every value, or leave out of the batch what has no effect."
    )


_CARRIES = {
    getattr(torch.ops.aten, name)
    for name in (
        *("_to_copy", "alias", "clone", "detach", "expand", "permute", "select", "slice", "squeeze", "t"),
        *("transpose", "unsqueeze", "view", "_unsafe_view", "split", "unbind"),
    )
}  # operators that return the values they are given, and compute nothing with them


class _Watched(TorchDispatchMode):
    """Records which of some tensors enter a computation, also through views, copies and conversions of them.

    Attributes:
      used: the numbers of these tensors.
    """

    def __init__(self, tensors: Sequence[Tensor]):
        super().__init__()
        self._numbers: dict[int, set[int]] = {}  # by the address of their memory
        for number, tensor in enumerate(tensors):
            self._numbers.setdefault(_memory(tensor), set()).add(number)
        self._kept = list(tensors)  # alive, so that no address is used for another tensor
        self.used: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        numbers = set().union(*(self._numbers.get(_memory(t), ()) for t in given))
        if numbers and func.overloadpacket in _CARRIES:
            made = [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]
            for tensor in made:
                self._numbers.setdefault(_memory(tensor), set()).update(numbers)
            self._kept += made
        else:
            self.used |= numbers
        return result


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
