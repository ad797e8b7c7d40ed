# SPDX-License-Identifier: Apache-2.0
"""Couplings of examples that the check plants itself, to show that it would see the model's own, and where it can."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from dpquant.engine.batches import Microbatch, leaves, with_leaves
from dpquant.engine.leaves import Routes
from dpquant.engine.passes import Objective
from dpquant.engine.randomness import seeded
from dpquant.errors import ModelError


class Blind(ModelError):
    """The check did not see a coupling that it planted itself."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Places:
    """Where couplings can be planted, and what a takes part in there beside b and beside c.

    Attributes:
      leaves: {number of a leaf of the batch: its path}, of the leaves that enter a computation.
      outputs: {module: what it returned for b and c, call by call}, in the order of the first calls. The modules have
        trainable parameters of their own and return a tensor of examples. A module whose output is the same for all
        records, such as learnt positions, is left out: its mean couples nothing.
      losses: of b and c.
    """

    leaves: dict[int, str]
    outputs: dict[nn.Module, list[Tensor | None]]
    losses: Tensor

    @classmethod
    def of(cls, objective: Objective, piece: Microbatch, key: int) -> "Places":
        """Find them in one forward pass.

        Args:
          objective: the model and its loss.
          piece: the records a, b and c.
          key: of the random draws.
        """
        called: dict[nn.Module, list[Tensor | None]] = {}

        def note(module: nn.Module, inputs: Any, output: Any) -> None:
            of_examples = isinstance(output, Tensor) and output.is_floating_point() and output.ndim and len(output) == 3
            varies = of_examples and not (torch.equal(output[0], output[1]) and torch.equal(output[0], output[2]))
            called.setdefault(module, []).append(output[1:].clone() if varies else None)

        routes = Routes.of(objective.model)  # inside a module that is evaluated alone, nothing else must be changed
        modules = [m for path, m in objective.model.named_modules() if not routes.within(path)]
        own = [m for m in modules if any(p.requires_grad for p in m.parameters(recurse=False))]
        handles = [module.register_forward_hook(note) for module in own]
        paths, tensors = zip(*leaves(piece.data), strict=True)
        try:
            with seeded(key), torch.no_grad(), _Watched(tensors) as watched:
                losses = objective.loss_fn(objective.model, piece.data)
        finally:
            for handle in handles:
                handle.remove()
        return cls(
            leaves={number: paths[number] for number in sorted(watched.used)},
            outputs={module: calls for module, calls in called.items() if any(call is not None for call in calls)},
            losses=losses[1:],
        )


def a_twice(piece: Microbatch, leaf: int | None = None) -> Microbatch:
    """Return a microbatch of a and a, of the records a, b and c; with a leaf of b in the first and of c in the second.

    That is what a row of a becomes if this leaf's rows are exchanged in a batch of a and b, and in one of a and c.
    """
    numbers = itertools.count()
    data = with_leaves(piece.data, lambda one: one[1:] if next(numbers) == leaf else torch.stack([one[0], one[0]]))
    return Microbatch(data, piece.record_ids[:1].repeat(2), 2)


def means_with(calls: Sequence[Tensor | None]) -> Callable[[Any, Any, Any], Any]:
    """Return a forward hook that adds to a, in the first row, its mean with b, and in the second, its mean with c.

    That is what `add_mean` makes of a in a batch of a and b, and in one of a and c.

    Args:
      calls: what b and c give in each call.
    """
    left = iter(calls)

    def couple(module: Any, inputs: Any, output: Any) -> Any:
        others = next(left, None)
        if others is None or not isinstance(output, Tensor) or output.shape != others.shape:
            return output
        return output + (output.detach() + others.to(output.dtype)) / 2

    return couple


def add_mean(module: Any, inputs: Any, output: Any) -> Any:
    """Add the batch's mean to each row: a coupling to plant as a forward hook or on a loss.

    Attention and recurrent layers return tuples, whose examples may lie on the second axis: means over both are added.
    """
    if isinstance(output, tuple):
        return tuple(
            add_mean(module, inputs, add_mean(module, inputs, one).transpose(0, 1)).transpose(0, 1)
            if isinstance(one, Tensor) and one.ndim > 1
            else one
            for one in output
        )
    if isinstance(output, Tensor) and output.is_floating_point() and output.ndim:
        return output + output.detach().mean(0, keepdim=True)
    return output


def blind(place: str) -> Blind:
    """Return the error for a coupling that was planted and not seen."""
    return Blind(
        f"Expected synthetic records that would show a coupling of examples in {place}; one that was planted there had "
        "no effect. So the check could not see whether examples are kept apart. Give example= a few public or "
        "synthetic records that differ in every value, or leave out of the batch what has no effect."
    )


def without_zero_factors(objective: Objective) -> Objective:
    """Return the objective with another number wherever model or loss multiply by a constant zero.

    Such a factor hides whatever is multiplied: no coupling in it could be seen. That it keeps examples apart is shown
    with another factor.
    """

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        with _OtherFactors():
            return objective.loss_fn(model, batch)

    return dataclasses.replace(objective, loss_fn=loss_fn)


_FACTOR = 0.7265625  # in place of zero: not 1, so that it cancels nothing
_PRODUCTS = {
    getattr(place, name)
    for place, names in (
        (Tensor, ("mul", "mul_", "multiply", "multiply_", "__mul__", "__rmul__", "__imul__")),
        (torch, ("mul", "multiply")),
    )
    for name in names
}


class _OtherFactors(TorchFunctionMode):
    """Replaces zeros that are numbers, not tensors, in products of tensors."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _PRODUCTS:
            args = tuple(_FACTOR if isinstance(one, int | float) and one == 0 else one for one in args)
        return func(*args, **(kwargs or {}))


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
