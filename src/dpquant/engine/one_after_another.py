# SPDX-License-Identifier: Apache-2.0
"""Modules whose forward method, too, runs one example after another.

What a module computes of an example may follow its batchmates in the last bits, where its code chooses by values: a
router of experts gathers rows of all examples into one product, whose size decides how it is summed. A quantized layer
behind it could turn the last bit into another code. So such a module gets one example at a time in its forward pass.

Symbols: B examples.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dpquant.engine.context import StepContext


@contextlib.contextmanager
def one_after_another(modules: Iterable[nn.Module], run: StepContext) -> Iterator[None]:
    """Let modules take the examples of a step's microbatch one after another until the block ends."""
    before = [(module, module.__dict__.get("forward")) for module in modules]
    for module, _ in before:
        module.forward = _separately(module.forward, run)
    try:
        yield
    finally:
        for module, own in before:
            del module.forward
            if own is not None:
                module.forward = own


def _separately(forward: Callable[..., Any], run: StepContext) -> Callable[..., Any]:
    def separate(*args: Any, **kwargs: Any) -> Any:
        values, tree = pytree.tree_flatten((args, kwargs))
        size = 0 if run.record_ids is None else len(run.record_ids)
        rows = [isinstance(value, Tensor) and value.ndim > 0 and len(value) == size for value in values]
        if size < 2 or not any(rows):  # also where an example is evaluated alone
            return forward(*args, **kwargs)
        found = []
        for row in range(size):
            of_one = [value[row : row + 1] if own else value for value, own in zip(values, rows, strict=True)]
            given, named = pytree.tree_unflatten(of_one, tree)
            found.append(pytree.tree_flatten(forward(*given, **named)))
        parts = zip(*(leaves for leaves, _ in found), strict=True)
        return pytree.tree_unflatten(list(map(_together, parts)), found[0][1])

    return separate


def _together(parts: tuple[Any, ...]) -> Any:
    """Return the rows of all examples as one tensor `(B, ...)`; what is no row of an example, as the first has it."""
    is_row = isinstance(parts[0], Tensor) and parts[0].ndim > 0 and len(parts[0]) == 1
    return torch.cat(parts) if is_row else parts[0]
