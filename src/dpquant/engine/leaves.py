# SPDX-License-Identifier: Apache-2.0
"""Per-example gradients of parameters that are used outside of a module of their own.

A class token, learnt positions or a LayerScale lie beside other layers, in a module that is too large to be evaluated
again. During a pass such a parameter is replaced by a leaf with one copy for each example, and the leaf's gradient is
the per-example gradient. How the copies are laid out, so that the model's code broadcasts them along the examples, is
found out once:

    p of shape (1, ...)     leaf (B, ...)                 a class token (1, 1, D), positions (1, T, D)
    p                       leaf (B, 1, ..., 1, *p)       positions (T, D), a scale (C,) of maps (B, H, W, C)

A parameter that its module's forward method takes out of another module (`F.linear(x, self.qkv.weight)`) has no such
leaf as a rule. Then the smallest module around it is evaluated one example at a time: its route is *alone*. Its layers
become plain torch layers, which are not quantized.

A table of positions may be looked up once for all examples, by `self.positions(torch.arange(T))`, whose ids `(T,)`
have no axis of examples. Then the ids are repeated for each example: `(B, T)`. Whether ids `(T,)` are of that kind is
found out too, and not told from their number, which may happen to be that of the examples.

A module may be called without any example, as a table of positions of the library's own. Its output, the same for all
examples, is repeated for each of them; where the model's code does not expect their axis, as behind a table of
relative positions, in disguise (`disguise.py`).

A module may be called with the examples on another axis than the first (`arrangement.py`).

`routing.py` finds out which, on a few rows. This module keeps the answer on the model and puts leaves in place.

Symbols: B examples, T positions, C channels, D features.
"""

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal, Self

from torch import Tensor, nn

from dpquant.engine.arrangement import Arrangement
from dpquant.engine.layers import ROUTES
from dpquant.engine.per_example import has_formula
from dpquant.engine.quantizable import QuantizableLayer

Kind = Literal["usual", "alone", "shared"]


@dataclasses.dataclass
class Routes:
    """How the gradients of a model's parameters are found that are used outside of a module of their own.

    Attributes:
      leaves: {parameter's name: number of axes of length 1 between the examples and the parameter's own; -1 if the
        parameter's first axis, of length 1, becomes the axis of examples}.
      alone: paths of the modules that are evaluated one example at a time, inner modules included.
      separate: those of them whose forward method runs one example after another, too.
      once: paths of embeddings that look ids `(T,)` up for all examples at once.
      shared: paths of modules whose output is the same for all examples.
      disguised: those of them whose output has no axis that could be that of the examples (`disguise.py`).
      arranged: {path of a module: where its calls have the examples}, if not on the first axis.
      unused: names of parameters beside other layers that did not take part in the loss.
      tried: whether passes over other numbers of rows have shown all routes (`passes.Objective.try_routes`).
    """

    leaves: dict[str, int] = dataclasses.field(default_factory=dict)
    alone: list[str] = dataclasses.field(default_factory=list)
    separate: list[str] = dataclasses.field(default_factory=list)
    once: set[str] = dataclasses.field(default_factory=set)
    shared: set[str] = dataclasses.field(default_factory=set)
    disguised: set[str] = dataclasses.field(default_factory=set)
    arranged: dict[str, Arrangement] = dataclasses.field(default_factory=dict)
    unused: set[str] = dataclasses.field(default_factory=set)
    tried: bool = False

    @classmethod
    def of(cls, model: nn.Module) -> "Routes":
        """Return the routes that were learnt for a model; none if none were."""
        return model.__dict__.get(ROUTES) or cls()

    def keep(self, model: nn.Module) -> None:
        """Keep the routes on the model they were learnt for, whose copies keep them, too: they hold names alone."""
        model.__dict__[ROUTES] = self

    def kind_of(self, path: str) -> Kind:
        """Return how a module's calls are listened to."""
        return "alone" if path in self.alone else "shared" if path in self.shared else "usual"

    def within(self, path: str) -> bool:
        """Return whether a module or parameter lies inside a module that is evaluated alone; not for that module."""
        return any(path.startswith(f"{host}.") for host in self.alone)

    def pending(self, model: nn.Module, trainable: dict[str, nn.Parameter]) -> list[str]:
        """Return the names of trainable parameters that lie beside quantizable layers and have no route yet."""
        names = {p: name for name, p in trainable.items()}
        found = [
            names[p]
            for path, module in model.named_modules()
            if path not in self.alone and not self.within(path) and beside_layers(module)
            for p in module.parameters(recurse=False)
            if p in names
        ]
        return [name for name in found if name not in self.leaves]

    def owned(self, module: nn.Module, path: str, names: dict[Tensor, str]) -> dict[str, Tensor]:
        """Return {name in the module: trainable parameter} of those that the module's call has to record."""
        if self.within(path):
            return {}
        found = module.named_parameters(recurse=path in self.alone)
        elsewhere = self.leaves.keys() | self.unused
        return {name: p for name, p in found if p in names and names[p] not in elsewhere}


def beside_layers(module: nn.Module) -> bool:
    """Return whether parameters of the module's own would lie beside quantizable layers."""
    if isinstance(module, QuantizableLayer) or has_formula(module):
        return False
    return any(isinstance(inner, QuantizableLayer) for inner in module.modules())


class Leaves:
    """The leaves that are in their parameters' places during one pass over a microbatch."""

    def __init__(self, leaves: dict[nn.Parameter, Tensor]):
        self._leaves = leaves

    @classmethod
    @contextlib.contextmanager
    def placed(cls, model: nn.Module, forms: Mapping[str, int], size: int) -> Iterator[Self]:
        """Put a leaf of `size` examples in the place of each of these parameters, until the block ends.

        Args:
          model: the model.
          forms: {name: form}, as `Routes.leaves`.
          size: number of examples of the microbatch.
        Privacy: per example, if the forms are right: each copy belongs to one example.
        """
        places = {name: place_of(model, name) for name in forms}
        parameters = {name: owner._parameters[key] for name, (owner, key) in places.items()}
        leaves = {p: leaf_of(p, forms[name], size) for name, p in parameters.items() if p is not None}
        try:
            for name, (owner, key) in places.items():
                owner._parameters[key] = leaves.get(parameters[name])  # pyright: ignore[reportArgumentType]
            yield cls(leaves)
        finally:
            for name, (owner, key) in places.items():
                owner._parameters[key] = parameters[name]

    def leaf(self, parameter: Tensor) -> Tensor:
        """Return the leaf in a parameter's place, `(B, ...)`."""
        return self._leaves[parameter]  # pyright: ignore[reportArgumentType]

    def gradients(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Yield (parameter, per-example gradients `(B, *parameter shape)`) after a backward pass that reached them."""
        for parameter, leaf in self._leaves.items():
            if leaf.grad is not None:
                yield parameter, leaf.grad.reshape(len(leaf), *parameter.shape)


def place_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the module that owns a parameter, and the parameter's name in it."""
    path, _, key = name.rpartition(".")
    return model.get_submodule(path), key


def forms_of(shape: Sequence[int]) -> Iterable[int]:
    """Return the forms of a leaf that are tried for a parameter of this shape, in order."""
    return (*((-1,) if shape and shape[0] == 1 else ()), 0, 1, 2, 3)


def leaf_of(parameter: Tensor, form: int, size: int) -> Tensor:
    """Return a leaf with one copy of a parameter for each of `size` examples."""
    fixed = parameter.detach()
    rows = fixed if form == -1 else fixed.reshape(1, *[1] * form, *parameter.shape)
    return rows.expand(size, *rows.shape[1:]).requires_grad_()
