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
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from dpquant.backends.precision import ieee_float32, input_error
from dpquant.backends.qtensor import QTensor
from dpquant.engine.clock import Clock
from dpquant.engine.contributions import Contribution, Lookup, Materialised, WeightedSum
from dpquant.engine.group_norm import TapedGroupNorm
from dpquant.engine.leaves import Routes, beside_layers
from dpquant.engine.per_example import TOLERANCE, contributions_of, differs, has_formula, one_at_a_time, unlike
from dpquant.engine.quantizable import QuantizableLayer, WeightProduct, repeated
from dpquant.engine.summed import Summed, can_be_summed
from dpquant.engine.weight_gradients import LazyWeightGradient
from dpquant.errors import ModelError

_INPUTS = 16  # an output with cancelling terms has several times the error of its inputs


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
        """Return {parameter name: gradients of the current microbatch}; parameters that got none are missing."""
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
      ModelError: the first axis of a module's input is not the axis of examples.
    """
    for name, norms in squared_norms.items():
        if len(norms) != size:
            raise ModelError(_not_examples(name))


def _not_examples(name: str) -> str:
    return (
        f"Expected the first axis of every module's input to be the example; got one of another length for {name}. "
        "Its gradients would be clipped by rows that are no examples: positions, nodes, or several views of a record. "
        "Put the examples first, and views of one record on a second axis."
    )


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


class Unrouted(ModelError):
    """No per-example gradient was found for trainable parameters, as they are called.

    Attributes:
      names: of these parameters.
    """

    def __init__(self, names: Sequence[str], message: str):
        self.names = names
        super().__init__(message)


class LookedUpOnce(Unrouted):
    """An embedding was called with ids of one axis, which is not that of the examples."""

    def __init__(self, name: str):
        super().__init__([name], _not_examples(name))


class Unreached(Unrouted):
    """Trainable parameters got no per-example gradient."""

    def __init__(self, names: Sequence[str]):
        freeze = "\n".join(f'    model.get_parameter("{name}").requires_grad_(False)' for name in names)
        super().__init__(
            names,
            f"Expected every trainable parameter to get a per-example gradient; {names[0]} got none. Its module was "
            "not called, or its output does not reach the loss, or the parameter is used outside its module. "
            f"Use it through the module that owns it, or freeze what is not used:\n{freeze}",
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
    routes = Routes.of(model)
    device = next((p.device for p in trainable.values()), torch.device("cpu"))
    names: dict[Tensor, str] = {p: name for name, p in trainable.items()}
    leaves = {name: form for name, form in routes.leaves.items() if name in trainable}
    owners = Counter(p for module in model.modules() for p in set(module.parameters(recurse=False)))
    shared = {p for p, count in owners.items() if count > 1}
    tape = GradientTape(names, device, forming=forming, keeping=keeping, clock=clock, leaves=leaves, shared=shared)
    handles: list[RemovableHandle] = []
    for path, module in model.named_modules():
        own = {} if isinstance(module, QuantizableLayer) else routes.owned(module, path, names)
        if own:
            expand, listen = _expander(tape, path in routes.once), _listener(tape, own, whole=path in routes.alone)
            handles.append(module.register_forward_pre_hook(expand, with_kwargs=True))
            # prepended, so that it sees the module's output before other hooks change it
            handles.append(module.register_forward_hook(listen, prepend=True, with_kwargs=True))
    for parameter in trainable.values():
        parameter.requires_grad_(False)
    try:
        yield tape
    finally:
        for parameter in trainable.values():
            parameter.requires_grad_(True)
        for handle in handles:
            handle.remove()


def _expander(tape: GradientTape, once: bool) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]:
    """Return a pre-hook that repeats for each example what a module is called with once for all of them.

    Position ids of shape (1, T), for instance, whose embedding is then added to every example. Only tensors outside of
    autograd are repeated, so no activation is. If `once`, ids of shape (T,) are repeated, too.
    """

    def expand(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensors = [one for one in pytree.tree_leaves((args, kwargs)) if isinstance(one, Tensor) and one.ndim]
        if once and tape.listening and all(one.ndim == 1 for one in tensors):
            return repeated_ids(args, kwargs, tape.size)
        if not tape.listening or not tensors or any(len(one) != 1 or one.requires_grad for one in tensors):
            return None
        return pytree.tree_map_only(Tensor, lambda one: repeated(one, tape.size), (args, kwargs))

    return expand


def repeated_ids(args: tuple[Any, ...], kwargs: dict[str, Any], size: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a call's arguments with ids `(T,)` repeated for each of `size` examples, `(size, T)`."""
    return pytree.tree_map_only(Tensor, lambda ids: ids.expand(size, *ids.shape), (args, kwargs))


def _listener(
    tape: GradientTape, own: Mapping[str, Tensor], *, whole: bool
) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], Any]:
    """Return a forward hook that records the module's per-example gradients once its output's gradient is known.

    Args:
      tape: receives them.
      own: {name inside the module: parameter}.
      whole: the module is evaluated alone with all modules in it, whose parameters `own` has too.
    """

    def listen(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        x = args[0] if args else kwargs.get("input")
        records_itself = isinstance(module, TapedGroupNorm) and isinstance(x, Tensor) and module.records(x)
        if not tape.listening or records_itself:
            return output
        if isinstance(module, nn.Embedding) and isinstance(x, Tensor) and x.ndim == 1 and len(x) != tape.size:
            raise LookedUpOnce(tape.name_of(module.weight))
        if not isinstance(output, Tensor) or output.ndim == 0:
            raise ModelError(
                f"Expected a module with parameters of its own to return one tensor, the examples first; a "
                f"{type(module).__name__} returns a {type(output).__name__}. Its per-example gradients are unknown. "
                "Freeze it, or put its parameters into modules of their own."
            )
        if beside_layers(module) and not whole:
            raise ModelError(
                f"Expected parameters to be used by a module that holds nothing else; a {type(module).__name__} has "
                "parameters of its own beside other layers, and no record showed how they are used. Put them into a "
                "small module of their own, which is called with the batch, or freeze them."
            )
        plain = (
            output.detach() if has_formula(module) else output.detach().clone()
        )  # compared later: the model may overwrite it
        if not output.requires_grad:
            output = output + tape.anchor

        def record(grad: Tensor) -> None:
            tape.listening = False  # `contributions_of` may call the module again
            # the call may have rounded its inputs, which the evaluation below does not
            compare = functools.partial(tape.compare, tolerance=TOLERANCE + _INPUTS * input_error(grad.device))
            with ieee_float32():
                if whole:
                    found = one_at_a_time(module, args, kwargs, plain, grad, compare, own)
                else:
                    found = contributions_of(module, args, kwargs, plain, grad, compare=compare)
            for name, contribution in found.items():
                if name in own:  # a formula may give a bias that the module lacks
                    tape.add(own[name], contribution)
            tape.listening = True

        output.register_hook(record)
        return output

    return listen
