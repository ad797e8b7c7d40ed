# SPDX-License-Identifier: Apache-2.0
"""The hooks by which a pass over a model records every example's parameter gradients on the tape.

Trainable parameters are detached while they are in place, so the model never holds an unclipped gradient.
"""

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from dpquant.backends.precision import ieee_float32, input_error
from dpquant.engine.arrangement import Arrangement, all_examples_first, examples_first
from dpquant.engine.clock import Clock
from dpquant.engine.disguise import Disguised
from dpquant.engine.group_norm import TapedGroupNorm
from dpquant.engine.leaves import Kind, Routes, beside_layers
from dpquant.engine.per_example import (
    TOLERANCE,
    Compare,
    contributions_of,
    has_formula,
    of_shared_output,
    one_at_a_time,
)
from dpquant.engine.quantizable import QuantizableLayer, repeated
from dpquant.engine.tape import GradientTape
from dpquant.engine.unrouted import ElsewhereFirst, ReturnsSeveral, WithoutExamples
from dpquant.errors import ModelError

_INPUTS = 16  # an output with cancelling terms has several times the error of its inputs


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
            arrangement = routes.arranged.get(path, "first")
            kind = routes.kind_of(path)
            listen = _listener(tape, own, kind, arrangement, disguised=path in routes.disguised)
            if kind != "shared":
                expand = _expander(tape, path in routes.once)
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
    autograd are repeated, so no activation is; beside tensors of all examples, only integers of two axes or more. If
    `once`, ids of shape (T,) are repeated, too.
    """

    def expand(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensors = [one for one in pytree.tree_leaves((args, kwargs)) if isinstance(one, Tensor) and one.ndim]
        if once and tape.listening and all(one.ndim == 1 for one in tensors):
            return repeated_ids(args, kwargs, tape.size)
        if not tape.listening or not tensors or any(one.requires_grad for one in tensors):
            return None
        if all(len(one) == 1 for one in tensors):
            return pytree.tree_map_only(Tensor, lambda one: repeated(one, tape.size), (args, kwargs))
        if any(_is_row_of_ids(one) for one in tensors) and all(len(one) in (1, tape.size) for one in tensors):
            return pytree.tree_map_only(
                Tensor, lambda one: repeated(one, tape.size) if _is_row_of_ids(one) else one, (args, kwargs)
            )
        return None

    return expand


def _is_row_of_ids(x: Tensor) -> bool:
    return x.ndim > 1 and len(x) == 1 and not x.is_floating_point()


def repeated_ids(args: tuple[Any, ...], kwargs: dict[str, Any], size: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a call's arguments with ids `(T,)` repeated for each of `size` examples, `(size, T)`."""
    return pytree.tree_map_only(Tensor, lambda ids: ids.expand(size, *ids.shape), (args, kwargs))


def _listener(
    tape: GradientTape, own: Mapping[str, Tensor], kind: Kind, arrangement: Arrangement, *, disguised: bool = False
) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], Any]:
    """Return a forward hook that records the module's per-example gradients once its output's gradient is known.

    Args:
      tape: receives them.
      own: {name inside the module: parameter}.
      kind: `alone`: the module is evaluated alone with all modules in it, whose parameters `own` has too; `shared`: its
        output is the same for all examples.
      arrangement: where its calls have the examples.
      disguised: the output of a shared module has to look as it did before it is repeated.
    """

    def listen(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        x = args[0] if args else kwargs.get("input")
        records_itself = isinstance(module, TapedGroupNorm) and isinstance(x, Tensor) and module.records(x)
        if not tape.listening or records_itself:
            return output
        if kind == "alone":
            return _heard_alone(tape, own, module, args, kwargs, output)
        if kind == "shared":
            return _heard_shared(tape, own, module, args, kwargs, output, disguised)
        flat_ids = isinstance(module, nn.Embedding) and isinstance(x, Tensor) and x.ndim == 1 and len(x) != tape.size
        if flat_ids and arrangement == "first":
            raise ElsewhereFirst([tape.name_of(p) for p in own.values()])
        if not isinstance(output, Tensor) or output.ndim == 0:
            raise ReturnsSeveral([tape.name_of(p) for p in own.values()], module, output)
        usual = arrangement == "first" and not has_formula(module)
        if usual and (len(output) != tape.size or not _has_examples((args, kwargs), tape.size)):
            raise WithoutExamples([tape.name_of(p) for p in own.values()], module)
        if beside_layers(module):
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
            given, named = all_examples_first((args, kwargs), plain, arrangement, tape.size)
            y, g = (examples_first(one, arrangement, tape.size) for one in (plain, grad))
            with _evaluating(tape, grad.device) as compare:
                found = contributions_of(module, given, named, y, g, compare=compare, arrangement=arrangement)
            for name, contribution in found.items():
                if name in own:  # a formula may give a bias that the module lacks
                    tape.add(own[name], contribution)

        output.register_hook(record)
        return output

    return listen


def _heard_alone(
    tape: GradientTape, own: Mapping[str, Tensor], module: nn.Module, args: Any, kwargs: Any, output: Any
) -> Any:
    """Return the output of a module that is evaluated alone, which records its gradients when its own is known."""
    leaves, tree = pytree.tree_flatten(output)
    places = [k for k, y in enumerate(leaves) if isinstance(y, Tensor) and y.is_floating_point() and y.ndim]
    plain = {k: leaves[k].detach().clone() for k in places}  # compared later: the model may overwrite it

    def record(gradients: Sequence[Tensor | None]) -> None:
        grads = {k: grad for k, grad in zip(places, gradients, strict=True) if grad is not None}
        if not grads:
            return
        with _evaluating(tape, tape.anchor.device) as compare:
            found = one_at_a_time(module, args, kwargs, {k: plain[k] for k in grads}, grads, compare, own)
        for name, contribution in found.items():
            tape.add(own[name], contribution)

    for k, y in zip(places, Joined.apply(record, tape.anchor, *(leaves[k] for k in places)), strict=True):
        leaves[k] = y
    return pytree.tree_unflatten(leaves, tree)


def _heard_shared(
    tape: GradientTape,
    own: Mapping[str, Tensor],
    module: nn.Module,
    args: Any,
    kwargs: Any,
    output: Tensor,
    disguised: bool,
) -> Any:
    """Return an output that is the same for all examples once for each of them, and record each one's gradient."""
    each = repeated_output(output.detach(), tape.size, disguised=disguised) + tape.anchor

    def record(grad: Tensor) -> None:
        with _evaluating(tape, grad.device):
            found = of_shared_output(module, args, kwargs, grad)
        for name, parameter in own.items():
            tape.add(parameter, found[name])

    each.register_hook(record)
    return Disguised(each) if disguised else each


def repeated_output(output: Tensor, size: int, *, disguised: bool = False) -> Tensor:
    """Return an output `(1, ...)` or `(...)` of all examples as one of each of them, `(size, ...)`.

    In disguise a first axis of length 1 is the output's own, since other calls of the module may have a longer one.
    """
    row = output if len(output) == 1 and not disguised else output.unsqueeze(0)
    return row.expand(size, *row.shape[1:])


def _has_examples(tree: Any, size: int) -> bool:
    """Return whether a tensor among the arguments has as many rows as there are examples."""
    return any(isinstance(one, Tensor) and one.ndim and len(one) == size for one in pytree.tree_leaves(tree))


class Joined(torch.autograd.Function):
    """Tensors as they are; `record` gets all their gradients at once, None for those on which no loss depends."""

    @staticmethod
    def forward(ctx: Any, record: Callable[[Sequence[Tensor | None]], None], anchor: Tensor, *tensors: Tensor) -> Any:
        ctx.record = record
        ctx.set_materialize_grads(False)
        return tuple(one.clone() for one in tensors)  # the model may modify them in place

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        ctx.record(grads)
        return None, None, *grads


@contextlib.contextmanager
def _evaluating(tape: GradientTape, device: torch.device) -> Iterator[Compare]:
    """Evaluate modules again, without listening to them; yields what compares their outputs with those of the call."""
    tape.listening = False
    try:
        with ieee_float32():  # the call may have rounded its inputs, which is not done here
            yield functools.partial(tape.compare, tolerance=TOLERANCE + _INPUTS * input_error(device))
    finally:
        tape.listening = True
