# SPDX-License-Identifier: Apache-2.0
"""The tape on which a backward pass leaves every example's parameter gradients, and the hooks that put them there.

Trainable parameters are detached while a tape is in place: no gradient that is not clipped ever exists on the model.
A parameter without a per-example gradient is an error. Nothing here knows of clipping.

Symbols: B examples, G_i the gradient of example i.
"""

import contextlib
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dpquant.backends.qtensor import QTensor
from dpquant.engine.clock import Clock
from dpquant.engine.contributions import Contribution, Lookup, Materialised, WeightedSum
from dpquant.engine.group_norm import TapedGroupNorm
from dpquant.engine.layers import QuantizableLayer
from dpquant.engine.per_example import contributions_of, has_formula
from dpquant.engine.weight_gradients import LazyWeightGradient
from dpquant.errors import ModelError


class GradientTape:
    """Collects contributions during a backward pass and adds them up, weighted.

    forming: weight gradients may be formed at once, where that makes norm and sum faster; else operands are kept.
    keeping: codes and scales are kept, to be compared with those in another microbatch.
    clock: measures what norms and sums take, under the name of the module that owns the parameter; None: nothing does.
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
        self.anchor = torch.zeros((), device=device, requires_grad=True)
        self._names = names  # of the trainable parameters
        self._forming, self._keeping, self._clock = forming, keeping, clock
        self._contributions: dict[str, list[Contribution]] = {}
        self._sums: dict[tuple[str, Hashable], WeightedSum[Any]] = {}
        self.operands: list[QTensor] = []
        self.listening = True

    def rewind(self) -> None:
        """Forget the last microbatch."""
        self._contributions = {name: [] for name in self._names.values()}
        self.operands = []

    def owns(self, module: nn.Module) -> bool:
        """Whether some trainable parameter is the module's own."""
        return any(p in self._names for p in module.parameters(recurse=False))

    def record(self, layer: QuantizableLayer, x: Tensor | QTensor, g: Tensor | QTensor, grad: Tensor) -> None:
        if self._keeping:
            self.operands += [operand for operand in (x, g) if isinstance(operand, QTensor)]
        if layer.weight in self._names:  # spares a frozen layer the operands' copies
            recipe = layer.precision.wgrad
            bits = 0 if recipe is None else recipe.gradient.format.significant_bits
            gradient = LazyWeightGradient.of(
                x, g, layer.geometry, layer.weight.shape, backend=layer.backend, significant_bits=bits
            )
            self.add(layer.weight, gradient.evaluated() if self._forming else gradient)
        if layer.bias is not None:
            one_position = grad.shape[2:] == (1, 1)
            self.add(layer.bias, Materialised(grad.flatten(1) if one_position else grad.flatten(2).sum(2)))

    def add(self, parameter: Tensor, contribution: Contribution) -> None:
        """One more contribution to a parameter's per-example gradients; a frozen parameter needs none."""
        if parameter in self._names:
            self._contributions[self._names[parameter]].append(contribution)

    def add_up(self, parts: Mapping[str, Contribution], weights_B: Tensor) -> None:
        """Add sum_i w_i G_i to the totals."""
        for name, part in parts.items():
            with self._timing(name):
                if (name, part.kind) not in self._sums:
                    self._sums[name, part.kind] = part.begin_sum()
                self._sums[name, part.kind].add(part, weights_B)

    def contributions(self) -> dict[str, Contribution]:
        """{parameter name: the microbatch's gradients}, without parameters that got none."""
        return {name: _one_contribution(found) for name, found in self._contributions.items() if found}

    def totals(self, trainable: Mapping[str, nn.Parameter], complete: bool) -> dict[str, Tensor]:
        """{parameter name: the sum over all microbatches}; where there is none, zero or, if complete, an error."""
        totals: dict[str, Tensor] = {}
        for (name, _), one in self._sums.items():
            totals[name] = one.value() if name not in totals else totals[name] + one.value()
        if complete and totals.keys() < trainable.keys():
            raise no_gradient(next(name for name in trainable if name not in totals))
        return {name: totals[name] if name in totals else torch.zeros_like(p) for name, p in trainable.items()}

    def squared_norms(self, parts: Mapping[str, Contribution], size: int) -> Tensor:
        """Each example's squared norm over all parameters, float64 `(B,)`."""
        squared_norms: dict[str, Tensor] = {}
        for name, part in parts.items():
            with self._timing(name):
                squared_norms[name] = part.squared_norms()
        check_examples_first(squared_norms, size)
        return torch.stack(list(squared_norms.values())).sum(0)

    def _timing(self, parameter: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self._clock is None else self._clock.timing(parameter.rpartition(".")[0])


def check_examples_first(squared_norms: Mapping[str, Tensor], size: int) -> None:
    """Refuse per-example gradients of some parameter that are not of `size` examples.

    Raises:
      ModelError: a module's input had another first axis than the examples.
    """
    for name, norms in squared_norms.items():
        if len(norms) != size:
            raise ModelError(
                "Expected the first axis of every module's input to be the example; got one of another length for "
                f"{name}. Its gradients would be clipped by rows that are no examples: positions, nodes, or "
                "several views of a record. Put the examples first, and views of one record on a second axis."
            )


def _one_contribution(found: list[Contribution]) -> Contribution:
    """A parameter used once keeps its operands, as do lookups; else one that is shared or reused is formed."""
    if len(found) == 1:
        return found[0]
    lookups = [one for one in found if isinstance(one, Lookup)]
    if len(lookups) == len(found):
        return Lookup.merged(lookups)
    return Materialised(torch.stack([one.per_example() for one in found]).sum(0))


def no_gradient(name: str) -> ModelError:
    """The error for a parameter that no module call reached."""
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
    """Detach all parameters and listen to the modules that own any, until the block ends."""
    device = next((p.device for p in trainable.values()), torch.device("cpu"))
    names: dict[Tensor, str] = {p: name for name, p in trainable.items()}
    tape = GradientTape(names, device, forming=forming, keeping=keeping, clock=clock)
    # ours comes first, so that it sees what the module gave before other hooks change it
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
    """A forward hook that, once the output's gradient is known, records the module's per-example gradients."""

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
        )  # to be compared: may be overwritten
        if not output.requires_grad:
            output = output + tape.anchor

        def record(grad: Tensor) -> None:
            tape.listening = False  # the module may be evaluated again
            own = dict(module.named_parameters(recurse=False))
            for name, contribution in contributions_of(module, args, kwargs, plain, grad).items():
                if name in own:  # a norm may have no bias
                    tape.add(own[name], contribution)
            tape.listening = True

        output.register_hook(record)
        return output

    return listen
