# SPDX-License-Identifier: Apache-2.0
"""The tape on which a backward pass records every example's parameter gradients, and the hooks that record them.

Trainable parameters are detached while a tape is in place, so the model never holds an unclipped gradient. A trainable
parameter without a per-example gradient is an error. This module does not clip.

All norms and sums are formed in float32 products whose inputs are not rounded, whatever the user allows for the passes
themselves (`backends/precision.py`): else a contribution could exceed the clipping norm.

Symbols: B examples, G_i the gradient of example i.
"""

import contextlib
import functools
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dpquant.backends.precision import ieee_float32, input_error
from dpquant.backends.qtensor import QTensor
from dpquant.engine.clock import Clock
from dpquant.engine.contributions import Contribution, Lookup, Materialised, WeightedSum
from dpquant.engine.group_norm import TapedGroupNorm
from dpquant.engine.layers import QuantizableLayer
from dpquant.engine.per_example import TOLERANCE, contributions_of, differs, has_formula, unlike
from dpquant.engine.weight_gradients import LazyWeightGradient
from dpquant.errors import ModelError

_INPUTS = 16  # an output with cancelling terms has several times the error of its inputs


class GradientTape:
    """Collects contributions during a backward pass, computes their norms and accumulates their weighted sums.

    Attributes:
      anchor: a scalar that requires a gradient; added to outputs and losses, it makes backward reach every layer.
      listening: False while a module is evaluated again outside the model's forward pass.
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
    ):
        """Make an empty tape.

        Args:
          names: {trainable parameter: its name}.
          device: of the model.
          forming: weight gradients may be materialised at once, if that makes norm and sum faster; else their operands
            are kept.
          keeping: keep the operands' codes and scales, to compare them with those of another microbatch.
          clock: times norms and sums under the name of the module that owns the parameter; None = no timing.
        """
        self.anchor = torch.zeros((), device=device, requires_grad=True)
        self._names = names
        self._forming, self._keeping, self._clock = forming, keeping, clock
        self._contributions: dict[str, list[Contribution]] = {}
        self._sums: dict[tuple[str, Hashable], WeightedSum[Any]] = {}
        self._gaps: dict[nn.Module, Tensor] = {}
        self.operands: list[QTensor] = []
        self.listening = True

    def rewind(self) -> None:
        """Discard the contributions of the last microbatch; sums are kept."""
        self._contributions = {name: [] for name in self._names.values()}
        self.operands = []

    def owns(self, module: nn.Module) -> bool:
        """Return whether the module itself, not a child, has a trainable parameter."""
        return any(self.takes(p) for p in module.parameters(recurse=False))

    def takes(self, parameter: Tensor | None) -> bool:
        return parameter is not None and parameter in self._names

    @ieee_float32()
    def record(self, layer: QuantizableLayer, x: Tensor | QTensor | None, g: Tensor | QTensor, grad: Tensor) -> None:
        if self._keeping:
            self.operands += [operand for operand in (x, g) if isinstance(operand, QTensor)]
        squares_B = None
        if x is not None:
            recipe = layer.precision.wgrad
            bits = 0 if recipe is None else recipe.gradient.format.significant_bits
            gradient = LazyWeightGradient.of(
                x, g, layer.geometry, layer.weight.shape, backend=layer.backend, significant_bits=bits
            )
            self.add(layer.weight, gradient.evaluated() if self._forming else gradient)
            if self._forming and gradient.operands.rank_one and g is grad:
                squares_B = gradient.operands.row_squares[1]  # a factor of the weight's norm is the bias's
        if self.takes(layer.bias):
            one_position = grad.shape[2:] == (1, 1)
            rows = grad.flatten(1) if one_position else grad.flatten(2).sum(2)
            self.add(layer.bias, Materialised(rows, squares_B))

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
        """Return {parameter name: gradients of the current microbatch}; parameters that got none are missing."""
        return {name: _one_contribution(found) for name, found in self._contributions.items() if found}

    @ieee_float32()
    def totals(self, trainable: Mapping[str, nn.Parameter], complete: bool) -> dict[str, Tensor]:
        """Return {parameter name: sum over all microbatches}; without a sum it is zero or, if `complete`, an error."""
        self.settle()
        totals: dict[str, Tensor] = {}
        for (name, _), one in self._sums.items():
            totals[name] = one.value() if name not in totals else totals[name] + one.value()
        if complete and totals.keys() < trainable.keys():
            raise no_gradient(next(name for name in trainable if name not in totals))
        return {name: totals[name] if name in totals else torch.zeros_like(p) for name, p in trainable.items()}

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
      ModelError: the first axis of a module's input is not the axis of examples.
    """
    for name, norms in squared_norms.items():
        if len(norms) != size:
            raise ModelError(
                "Expected the first axis of every module's input to be the example; got one of another length for "
                f"{name}. Its gradients would be clipped by rows that are no examples: positions, nodes, or "
                "several views of a record. Put the examples first, and views of one record on a second axis."
            )


def _one_contribution(found: list[Contribution]) -> Contribution:
    """Merge the contributions to one parameter: one is kept as it is, lookups are joined, others materialised."""
    if len(found) == 1:
        return found[0]
    lookups = [one for one in found if isinstance(one, Lookup)]
    if len(lookups) == len(found):
        return Lookup.merged(lookups)
    return Materialised(torch.stack([one.per_example() for one in found]).sum(0))


def no_gradient(name: str) -> ModelError:
    """Return the error for a trainable parameter that got no per-example gradient."""
    return ModelError(
        f"Expected every trainable parameter to get a per-example gradient; {name} got none. Its module was "
        "not called, or its output does not reach the loss, or the parameter is used outside its module. "
        "Freeze it with requires_grad_(False), or use it through the module that owns it."
    )


@contextlib.contextmanager
def taping(
    model: nn.Module,
    trainable: dict[str, nn.Parameter],
    *,
    forming: bool = True,
    keeping: bool = False,
    clock: Clock | None = None,
) -> Iterator[GradientTape]:
    """Detach trainable parameters and hook the modules that own them until the block ends; options as of the tape."""
    device = next((p.device for p in trainable.values()), torch.device("cpu"))
    names: dict[Tensor, str] = {p: name for name, p in trainable.items()}
    tape = GradientTape(names, device, forming=forming, keeping=keeping, clock=clock)
    # prepended, so that it sees the module's output before other hooks change it
    handles = [
        module.register_forward_hook(_listener(tape), prepend=True, with_kwargs=True)
        for module in model.modules()
        if not isinstance(module, QuantizableLayer) and tape.owns(module)
    ]
    for parameter in trainable.values():
        parameter.requires_grad_(False)
    try:
        yield tape
    finally:
        for parameter in trainable.values():
            parameter.requires_grad_(True)
        for handle in handles:
            handle.remove()


def _listener(tape: GradientTape) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], Any]:
    """Return a forward hook that records the module's per-example gradients once its output's gradient is known."""

    def listen(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        x = args[0] if args else kwargs.get("input")
        records_itself = isinstance(module, TapedGroupNorm) and isinstance(x, Tensor) and module.records(x)
        if not tape.listening or records_itself:
            return output
        if not isinstance(output, Tensor) or output.ndim == 0:
            raise ModelError(
                f"Expected a module with parameters of its own to return one tensor, the examples first; a "
                f"{type(module).__name__} returns a {type(output).__name__}. Its per-example gradients are unknown. "
                "Freeze it, or put its parameters into modules of their own."
            )
        if not has_formula(module) and any(isinstance(inner, QuantizableLayer) for inner in module.modules()):
            raise ModelError(
                f"Expected parameters to be used by a module that holds nothing else; a {type(module).__name__} has "
                "parameters of its own beside other layers. Their per-example gradients are unknown. Put them into a "
                "small module of their own, which is called with the batch, or freeze them."
            )
        plain = (
            output.detach() if has_formula(module) else output.detach().clone()
        )  # compared later: the model may overwrite it
        if not output.requires_grad:
            output = output + tape.anchor

        def record(grad: Tensor) -> None:
            tape.listening = False  # `contributions_of` may call the module again
            own = dict(module.named_parameters(recurse=False))
            # the call may have rounded its inputs, which the evaluation below does not
            compare = functools.partial(tape.compare, tolerance=TOLERANCE + _INPUTS * input_error(grad.device))
            with ieee_float32():
                found = contributions_of(module, args, kwargs, plain, grad, compare=compare)
            for name, contribution in found.items():
                if name in own:  # a formula may give a bias that the module lacks
                    tape.add(own[name], contribution)
            tape.listening = True

        output.register_hook(record)
        return output

    return listen
