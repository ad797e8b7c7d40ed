# SPDX-License-Identifier: Apache-2.0
"""What a model does on a few rows: the calls of its modules, and each row's gradients, from which routes are found."""

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dpquant.engine.arrangement import Arrangement, arrangement_of
from dpquant.engine.leaves import beside_layers
from dpquant.engine.quantizable import QuantizableLayer, QuantLinear, QuantTransposedLinear


@dataclasses.dataclass
class Call:
    """One call of a module: detached copies of its arguments, its output, and the loss' gradient of each tensor of it.

    Attributes:
      args, kwargs: as the forward method got them.
      outputs: {place among the leaves of the output: tensor that takes part in autograd}, detached once the gradients
        are known.
      tensor: whether the output is one tensor.
      grads: the gradients of the sum of the losses, in the order of outputs; None where there is none.
      arrangement: where the output, of one tensor, has the rows; None: it has them nowhere, or no loss depends on it.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: dict[int, Tensor] = dataclasses.field(default_factory=dict)
    tensor: bool = False
    grads: list[Tensor | None] = dataclasses.field(default_factory=list)
    arrangement: Arrangement | None = None


@dataclasses.dataclass(frozen=True)
class Observed:
    """One pass of the model as it is, over a few rows.

    Attributes:
      size: number of rows.
      calls: {module: its calls}, of modules that hold trainable parameters, and of quantizable layers.
      rows: {parameter's name: each row's gradient, `(rows, *parameter shape)`}; None if it is not part of the losses.
    """

    size: int
    calls: dict[nn.Module, list[Call]]
    rows: dict[str, Tensor | None]

    @classmethod
    def of(
        cls, model: nn.Module, trainable: dict[str, nn.Parameter], names: Collection[str], losses: Callable[[], Tensor]
    ) -> "Observed":
        """Run the model and differentiate each row's loss alone.

        Args:
          model: the model.
          trainable: its trainable parameters.
          names: of the parameters in question; those that no module that is called has are added, frozen ones left out.
          losses: runs the model on a few rows.
        """
        holders = [
            module
            for module in model.modules()
            if isinstance(module, QuantizableLayer) or any(p.requires_grad for p in module.parameters())
        ]
        calls: dict[nn.Module, list[Call]] = {}
        with contextlib.ExitStack() as stack:
            for module in holders:
                _watch(module, calls, stack)
            found = losses()
        called = {p for module in calls for p in module.parameters(recurse=False)}  # a tied one by any of its modules
        asked = [name for name, parameter in trainable.items() if name in names or parameter not in called]
        parameters = [trainable[name] for name in asked]
        each = [torch.autograd.grad(y, parameters, retain_graph=True, allow_unused=True) for y in found if parameters]
        made = [call for of_module in calls.values() for call in of_module]
        for module in filter(_can_be_arranged, calls):
            for call in calls[module]:
                if call.tensor and call.outputs:
                    (output,) = call.outputs.values()
                    of_rows = [torch.autograd.grad(y, output, retain_graph=True, allow_unused=True)[0] for y in found]
                    call.arrangement = arrangement_of(of_rows)
        outputs = [output for call in made for output in call.outputs.values()]
        grads = iter(torch.autograd.grad(found.sum(), outputs, allow_unused=True) if outputs else ())
        for call in made:
            call.grads = [next(grads) for _ in call.outputs]
            call.outputs = {place: output.detach() for place, output in call.outputs.items()}
        of_each = zip(*each, strict=True)
        rows = {name: _rows(list(mine), trainable[name]) for name, mine in zip(asked, of_each, strict=True)}
        return cls(len(found), calls, rows)


def arrangements_in(calls: Iterable[Call]) -> set[Arrangement]:
    """Return where calls have the rows, of those on which a loss depends."""
    return {call.arrangement for call in calls if call.arrangement is not None}


def _can_be_arranged(module: nn.Module) -> bool:
    """Return whether a module does the same at each position, so that its examples may be on any axis."""
    if isinstance(module, QuantizableLayer):
        return isinstance(module, QuantLinear | QuantTransposedLinear)
    own = any(True for _ in module.parameters(recurse=False))
    return own and not isinstance(module, nn.GroupNorm) and not beside_layers(module)


def _rows(gradients: Sequence[Tensor | None], parameter: Tensor) -> Tensor | None:
    """Return the rows' gradients as one tensor; None if the parameter is not part of any row's loss."""
    if all(one is None for one in gradients):
        return None
    return torch.stack([torch.zeros_like(parameter) if one is None else one.to_dense() for one in gradients])


def _watch(module: nn.Module, calls: dict[nn.Module, list[Call]], stack: contextlib.ExitStack) -> None:
    """Note the module's calls until the stack is closed. What follows gets copies, into which it may write."""
    begun: list[Call] = []

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        begun.append(Call(*pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), (args, kwargs))))

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        call = begun.pop()
        leaves, tree = pytree.tree_flatten(output)
        # copies: one output may be computed from another, and the loss' gradient is that of what the model goes on with
        leaves = [one.clone() if isinstance(one, Tensor) and one.requires_grad else one for one in leaves]
        call.outputs = {k: one for k, one in enumerate(leaves) if isinstance(one, Tensor) and one.requires_grad}
        call.tensor = isinstance(output, Tensor)
        calls.setdefault(module, []).append(call)
        return pytree.tree_unflatten(leaves, tree)

    stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
    stack.callback(module.register_forward_hook(after, prepend=True, with_kwargs=True).remove)
