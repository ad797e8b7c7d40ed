# SPDX-License-Identifier: Apache-2.0
"""Errors of parameters whose per-example gradients are not found, as their modules are called.

Each names the parameters, for which `routing.py` may find another way.
"""

from collections.abc import Sequence

from torch import nn

from dpquant.errors import ModelError


class Unrouted(ModelError):
    """No per-example gradient was found for trainable parameters, as they are called.

    Attributes:
      names: of these parameters.
    """

    def __init__(self, names: Sequence[str], message: str):
        self.names = names
        super().__init__(message)


class ElsewhereFirst(Unrouted):
    """Modules were called with something else than the examples on the first axis, as an embedding with ids `(T,)`."""

    def __init__(self, names: Sequence[str]):
        super().__init__(
            names,
            "Expected the first axis of every module's input to be the example; got one of another length for "
            f"{names[0]}. Its gradients would be clipped by rows that are no examples: positions, nodes, or several "
            "views of a record. Put the examples first, and views of one record on a second axis; or freeze what is "
            f"the same for all examples, as a table of relative positions:\n{_freezing(names)}",
        )


class WithoutExamples(Unrouted):
    """A module with parameters of its own was called without a tensor of the examples, or returns none."""

    def __init__(self, names: Sequence[str], module: nn.Module):
        super().__init__(
            names,
            f"Expected a {type(module).__name__} with parameters of its own to be called with the examples on the "
            "first axis of a tensor, and to return them so; got none such. Its per-example gradients are unknown. Give "
            f"it the batch, or freeze it:\n{_freezing(names)}",
        )


class ReturnsSeveral(Unrouted):
    """A module with parameters of its own returns something else than one tensor."""

    def __init__(self, names: Sequence[str], module: nn.Module, output: object):
        super().__init__(
            names,
            f"Expected a module with parameters of its own to return one tensor, the examples first; a "
            f"{type(module).__name__} returns a {type(output).__name__}. Its per-example gradients are unknown. "
            "Freeze it, or put its parameters into modules of their own.",
        )


class Unreached(Unrouted):
    """Trainable parameters got no per-example gradient."""

    def __init__(self, names: Sequence[str]):
        super().__init__(
            names,
            f"Expected every trainable parameter to get a per-example gradient; {names[0]} got none. Its module was "
            "not called, or its output does not reach the loss, or the parameter is used outside its module. "
            f"Use it through the module that owns it, or freeze what is not used:\n{_freezing(names)}",
        )


def _freezing(names: Sequence[str]) -> str:
    """Return the lines of Python that freeze parameters."""
    return "\n".join(f'    model.get_parameter("{name}").requires_grad_(False)' for name in names)
