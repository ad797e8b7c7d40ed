# SPDX-License-Identifier: Apache-2.0
"""The tape on which a backward pass records every example's parameter gradients; `listening.py` has the hooks.

A trainable parameter without a per-example gradient is an error. This module does not clip.

All norms and sums are formed in float32 products whose inputs are not rounded, whatever the user allows for the passes
themselves (`backends/precision.py`): else a contribution could exceed the clipping norm.

Symbols: B examples, G_i the gradient of example i.
"""

import contextlib
from collections.abc import Collection, Hashable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from dpquant.backends.precision import ieee_float32
from dpquant.backends.qtensor import QTensor
from dpquant.engine.clock import Clock
from dpquant.engine.contributions import Contribution, Lookup, Materialised, WeightedSum
from dpquant.engine.per_example import (
    differs,
    unlike,
)
from dpquant.engine.quantizable import WeightProduct
from dpquant.engine.summed import Summed, can_be_summed
from dpquant.engine.unrouted import ElsewhereFirst, Unreached
from dpquant.engine.weight_gradients import LazyWeightGradient


class GradientTape:
    """Collects contributions during a backward pass, computes their norms and accumulates their weighted sums.

    Attributes:
      anchor: a scalar that requires a gradient; added to outputs and losses, it makes backward reach every layer.
      listening: False while a module is evaluated again outside the model's forward pass.
      size: number of examples of the current microbatch, padding included.
      leaves: {name: form} of the parameters in whose places a pass puts leaves, see `leaves.py`.
      operands: codes and scales of the current microbatch, if they are kept.
    """

    def __init__(
        self,
        names: dict[Tensor, str],
        device: torch.device,
        *,
        forming: bool,
        keeping: bool,
        clock: Clock | None,
        leaves: Mapping[str, int] = MappingProxyType({}),
        shared: Collection[Tensor] = (),
    ):
        """Make an empty tape.

        Args:
          names: {trainable parameter: its name}.
          device: of the model.
          forming: weight gradients may be materialised at once, if that makes norm and sum faster; else their operands
            are kept.
          keeping: keep the operands' codes and scales, to compare them with those of another microbatch.
          clock: times norms and sums under the name of the module that owns the parameter; None = no timing.
          leaves: see above.
          shared: the parameters that several modules own.
        """
        self.anchor = torch.zeros((), device=device, requires_grad=True)
        self._names = names
        self._shared = shared
        self._forming, self._keeping, self._clock = forming, keeping, clock
        self._contributions: dict[str, list[Contribution]] = {}
        self._sums: dict[tuple[str, Hashable], WeightedSum[Any]] = {}
        self._gaps: dict[nn.Module, Tensor] = {}
        self.size, self.leaves = 0, leaves
        self.operands: list[QTensor] = []
        self.listening = True

    def rewind(self, size: int) -> None:
        """Discard the contributions of the last microbatch; sums are kept. The next one has `size` examples."""
        self.size = size
        self._contributions = {name: [] for name in self._names.values()}
        self.operands = []

    def takes(self, parameter: Tensor | None) -> bool:
        return parameter is not None and parameter in self._names

    def name_of(self, parameter: Tensor) -> str:
        """Return the name of a trainable parameter."""
        return self._names[parameter]

    @ieee_float32()
    def record(self, layer: WeightProduct, x: Tensor | QTensor | None, g: Tensor | QTensor, grad: Tensor) -> None:
        if self._keeping:
            self.operands += [operand for operand in (x, g) if isinstance(operand, QTensor)]
        squares_B = None
        if x is not None:
            recipe = layer.precision.wgrad
            bits = 0 if recipe is None else recipe.gradient.format.significant_bits
            gradient = LazyWeightGradient.of(
                x, g, layer.geometry, layer.layout, backend=layer.backend, significant_bits=bits
            )
            # a parameter that is used elsewhere too is normed with that use, and is not materialised for this one
            forms = self._forming and layer.weight not in self._shared
            self.add(layer.weight, gradient.evaluated() if forms else gradient)
            if self._forming and gradient.operands.rank_one and g is grad:
                squares_B = gradient.operands.row_squares[1]  # a factor of the weight's norm is the bias's
        if self.takes(layer.bias):
            one_position = grad.shape[2:] == (1, 1)
            rows = grad.flatten(1) if one_position else grad.flatten(2).sum(2)
            self.add(layer.bias, Materialised(layer.bias_layout.in_rows(rows), squares_B))

    def add(self, parameter: Tensor, contribution: Contribution) -> None:
        """Record a contribution to a parameter's per-example gradients. Those of a frozen parameter are ignored."""
        if parameter in self._names:
            self._contributions[self._names[parameter]].append(contribution)

    @ieee_float32()
    def add_up(self, parts: Mapping[str, Contribution], weights_B: Tensor) -> None:
        """Add sum_i w_i G_i of each parameter to its total."""
        for name, part in parts.items():
            with self._timing(name):
                if (name, part.kind) not in self._sums:
                    self._sums[name, part.kind] = part.begin_sum()
                self._sums[name, part.kind].add(part, weights_B)

    @ieee_float32()
    def contributions(self) -> dict[str, Contribution]:
        """Return {parameter name: gradients of the current microbatch}; parameters that got none are missing.

        Raises:
          ElsewhereFirst: the calls of a module had different numbers of rows.
        """
        several = {name: found for name, found in self._contributions.items() if len(found) > 1}
        for name, found in several.items():  # a layer that is called in two ways has rows of two kinds
            if len({len(one.tensors()[0]) for one in found}) > 1:
                raise ElsewhereFirst([name])
        return {name: _one_contribution(found) for name, found in self._contributions.items() if found}

    @ieee_float32()
    def totals(self, trainable: Mapping[str, nn.Parameter], complete: bool) -> dict[str, Tensor]:
        """Return {parameter name: sum over all microbatches}; without a sum it is zero or, if `complete`, an error."""
        self.settle()
        totals = self.taken_totals()
        if complete and totals.keys() < trainable.keys():
            raise Unreached([name for name in trainable if name not in totals])
        return {name: totals[name] if name in totals else torch.zeros_like(p) for name, p in trainable.items()}

    @ieee_float32()
    def taken_totals(self) -> dict[str, Tensor]:
        """Return {parameter name: sum over all microbatches so far}, and begin the sums anew."""
        totals: dict[str, Tensor] = {}
        for (name, _), one in self._sums.items():
            totals[name] = one.value() if name not in totals else totals[name] + one.value()
        self._sums = {}
        return totals

    def compare(self, module: nn.Module, again: Tensor, output: Tensor, *, tolerance: float) -> None:
        """Compare a module's output for examples that are evaluated alone with that of its call, for `settle`."""
        gap = differs(again, output, tolerance)
        self._gaps[module] = self._gaps[module] | gap if module in self._gaps else gap

    def settle(self) -> None:
        """Raise a ModelError if a comparison has failed. The answers are read here, as reading one waits for a GPU."""
        if self._gaps and bool(torch.stack(list(self._gaps.values())).any()):
            raise unlike(next(module for module, gap in self._gaps.items() if gap))

    @ieee_float32()
    def squared_norms(self, parts: Mapping[str, Contribution], size: int) -> Tensor:
        """Return each example's squared norm over all parameters, float64 `(B,)`."""
        squared_norms: dict[str, Tensor] = {}
        for name, part in parts.items():
            with self._timing(name):
                squared_norms[name] = part.squared_norms()
        check_examples_first(squared_norms, size)
        return torch.stack(list(squared_norms.values())).sum(0)

    def _timing(self, parameter: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self._clock is None else self._clock.timing(parameter.rpartition(".")[0])


def check_examples_first(squared_norms: Mapping[str, Tensor], size: int) -> None:
    """Check that the per-example gradients of every parameter are of `size` examples.

    Raises:
      ElsewhereFirst: the first axis of a module's input is not the axis of examples.
    """
    if elsewhere := [name for name, norms in squared_norms.items() if len(norms) != size]:
        raise ElsewhereFirst(elsewhere)


def _one_contribution(found: list[Contribution]) -> Contribution:
    """Merge the contributions to one parameter: lookups are joined, all others kept apart or materialised."""
    lookups = [one for one in found if isinstance(one, Lookup)]
    if len(lookups) > 1:
        found = [Lookup.merged(lookups), *(one for one in found if not isinstance(one, Lookup))]
    if len(found) == 1:
        return found[0]
    if can_be_summed(found):
        return Summed(found)
    return Materialised(torch.stack([one.per_example() for one in found]).sum(0))
