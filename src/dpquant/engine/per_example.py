# SPDX-License-Identifier: Apache-2.0
"""Per-example gradients of a module's own parameters, from one call of the module and the gradient of its output.

A few module types have a closed formula. A formula is used for exactly its type and for a call with one tensor, because
a subclass or a call with other arguments may compute something else. Every other module is evaluated again, one example
at a time, with the arguments of the call, and differentiated. If that evaluation does not reproduce the output of the
call, the module depends on more than its arguments, and it is refused.

Symbols: B examples, T positions, D features.
"""

import inspect
import warnings
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dpquant.engine.arrangement import Arrangement, examples_first, put_back
from dpquant.engine.contributions import Contribution, Lookup, Materialised
from dpquant.engine.group_norm import TapedGroupNorm
from dpquant.errors import ModelError

TOLERANCE = 1e-3  # relative to an example's largest output; float32 rounding errors are about a hundred times smaller

Compare = Callable[[nn.Module, Tensor, Tensor], None]
Rule = Callable[[Any, Tensor, Tensor], dict[str, Contribution]]


def _of_group_norm(module: nn.GroupNorm, x: Tensor, grad: Tensor) -> dict[str, Contribution]:
    normalised = F.group_norm(x, module.num_groups, None, None, module.eps)
    return {
        "weight": Materialised((grad * normalised).flatten(2).sum(2))
        if x.ndim > 2
        else Materialised(grad * normalised),
        "bias": Materialised(grad.flatten(2).sum(2)) if x.ndim > 2 else Materialised(grad),
    }


def _of_layer_norm(module: nn.LayerNorm, x: Tensor, grad: Tensor) -> dict[str, Contribution]:
    normalised = F.layer_norm(x, module.normalized_shape, None, None, module.eps)
    axes = tuple(range(1, x.ndim - len(module.normalized_shape)))
    total = (lambda t: t.sum(axes)) if axes else (lambda t: t)
    return {"weight": Materialised(total(grad * normalised)), "bias": Materialised(total(grad))}


def _of_rms_norm(module: nn.RMSNorm, x: Tensor, grad: Tensor) -> dict[str, Contribution]:
    normalised = F.rms_norm(x, module.normalized_shape, None, module.eps)
    axes = tuple(range(1, x.ndim - len(module.normalized_shape)))
    products = grad * normalised
    return {"weight": Materialised(products.sum(axes) if axes else products)}


def _of_embedding(module: nn.Embedding, x: Tensor, grad: Tensor) -> dict[str, Contribution]:
    ids_BT = x.reshape(len(x), -1)
    g_BTD = grad.reshape(len(x), -1, module.embedding_dim)
    if module.padding_idx is not None:
        g_BTD = g_BTD * (ids_BT != module.padding_idx)[..., None]
    return {"weight": Lookup(ids_BT, g_BTD, module.num_embeddings)}


RULES: Mapping[type[nn.Module], Rule] = MappingProxyType(
    {
        nn.GroupNorm: _of_group_norm,
        TapedGroupNorm: _of_group_norm,
        nn.LayerNorm: _of_layer_norm,
        nn.RMSNorm: _of_rms_norm,
        nn.Embedding: _of_embedding,
    }
)


def has_formula(module: nn.Module, rules: Mapping[type[nn.Module], Rule] = RULES) -> bool:
    """Return whether exactly the module's type has a closed formula; a formula of a base class does not count."""
    return type(module) in rules and "forward" not in module.__dict__


def contributions_of(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    output: Tensor,
    grad: Tensor,
    *,
    rules: Mapping[type[nn.Module], Rule] = RULES,
    compare: Compare,
    arrangement: Arrangement = "first",
) -> dict[str, Contribution]:
    """Return {parameter name inside the module: its per-example gradients}.

    Args:
      module: the module that was called.
      args: positional arguments of the call.
      kwargs: keyword arguments of the call.
      output: result of the call, `(B, ...)`.
      grad: gradient of the loss with respect to `output`, of its shape.
      rules: closed formulas, by exact type.
      compare: takes the module, the examples' outputs when each is evaluated alone, and their outputs in the call; not
        called for a module with a formula.
      arrangement: where the module itself expects an example's rows; `args`, `output` and `grad` have them first.
    Raises:
      ModelError: the module cannot be evaluated one example at a time.
    Privacy: per example, reads no other row.
    """
    if has_formula(module, rules):
        try:
            (x,) = inspect.signature(module.forward).bind(*args, **kwargs).arguments.values()
        except (TypeError, ValueError):
            x = None
        if isinstance(x, Tensor):
            return rules[type(module)](module, x.detach(), grad)
    own = dict(module.named_parameters(recurse=False))
    return one_at_a_time(module, args, kwargs, {0: output}, {0: grad}, compare, own, arrangement)


def one_at_a_time(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    outputs: Mapping[int, Tensor],
    grads: Mapping[int, Tensor],
    compare: Compare,
    parameters: Mapping[str, Tensor],
    arrangement: Arrangement = "first",
    *,
    not_vectorised: Callable[[], None] = lambda: None,
) -> dict[str, Contribution]:
    """Return a module's gradients by evaluating it on one example at a time, vectorised by vmap where that works.

    Args: as for `contributions_of`, and
      outputs: {place among the leaves of the call's result: the tensor there, `(B, ...)`}.
      grads: the gradients of the loss with respect to these.
      parameters: {name inside the module: parameter} of those whose gradients are returned; of inner modules too.
      not_vectorised: called if vmap does not work.
    """
    values, tree = pytree.tree_flatten((args, dict(kwargs)))
    values = [value.detach() if isinstance(value, Tensor) else value for value in values]
    places = list(outputs)
    count = len(grads[places[0]])
    per_example = [isinstance(value, Tensor) and value.ndim > 0 and len(value) == count for value in values]
    if not any(per_example):
        raise ModelError(
            f"Expected a {type(module).__name__} with parameters of its own to be called with the examples on the "
            "first axis of a tensor; got none such. Its per-example gradients are unknown. Give it the batch, or "
            "freeze it."
        )
    fixed = {f"module.{name}": p.detach() for name, p in parameters.items()}
    rows = [value for value, own in zip(values, per_example, strict=True) if own]

    def of_one(parameters: dict[str, Tensor], rows: list[Tensor], grads: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        mine = iter(rows)
        filled = [
            put_back(next(mine).unsqueeze(0), arrangement) if own else value
            for value, own in zip(values, per_example, strict=True)
        ]
        given, named = pytree.tree_unflatten(filled, tree)
        found = pytree.tree_leaves(torch.func.functional_call(_Bare(module), parameters, given, named))
        ys = [found[place] if place < len(found) else None for place in places]
        shapes = [put_back(output[:1], arrangement).shape for output in outputs.values()]
        if [y.shape if isinstance(y, Tensor) else None for y in ys] != shapes:
            raise unlike(module)
        ys = [examples_first(y, arrangement, 1).squeeze(0) for y in ys if y is not None]
        return torch.stack([(y * grad).sum() for y, grad in zip(ys, grads, strict=True)]).sum(), ys

    try:
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of operators that vmap runs slowly
            differentiated = torch.func.vmap(torch.func.grad(of_one, has_aux=True), (None, 0, 0), randomness="error")
            gradients, again = differentiated(fixed, rows, list(grads.values()))
    except ModelError:
        raise
    except Exception:  # vmap knows no such operator, or code that chooses by values raises anything
        not_vectorised()
        gradients, again = _one_by_one(module, of_one, fixed, rows, list(grads.values()))
    for mine, theirs in zip(again, outputs.values(), strict=True):
        compare(module, mine.detach(), theirs.detach())
    return {name.removeprefix("module."): Materialised(gradient.detach()) for name, gradient in gradients.items()}


class _Bare(nn.Module):
    """Calls a module without its hooks: the recorded arguments and output lie between pre-hooks and other hooks."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.forward(*args, **kwargs)


def _one_by_one(
    module: nn.Module, of_one: Callable, parameters: dict[str, Tensor], rows: list[Tensor], grads: list[Tensor]
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Return gradients and outputs of all examples by a loop of autograd: slow, but supports all operators."""
    found, again = [], []
    try:
        with torch.enable_grad():
            for i in range(len(grads[0])):
                leaves = {name: p.clone().requires_grad_() for name, p in parameters.items()}
                value, ys = of_one(leaves, [row[i] for row in rows], [grad[i] for grad in grads])
                found.append(torch.autograd.grad(value, list(leaves.values()), allow_unused=True))
                again.append([y.detach() for y in ys])
    except ModelError:
        raise
    except Exception as error:  # the module's code may raise anything on one example
        raise ModelError(
            f"Expected modules whose per-example gradients can be computed; got {type(module).__name__} with the "
            f"parameters {', '.join(parameters)}, which cannot be evaluated one example at a time "
            f"({type(error).__name__}). Freeze it, or build it of Conv2d, Linear, GroupNorm, LayerNorm and Embedding."
        ) from error
    gradients = {
        name: torch.stack([torch.zeros_like(p) if one[place] is None else one[place] for one in found])
        for place, (name, p) in enumerate(parameters.items())
    }
    return gradients, [torch.stack(of_place) for of_place in zip(*again, strict=True)]


def of_shared_output(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], grad: Tensor
) -> dict[str, Contribution]:
    """Return the gradients of a module whose output is the same for all examples.

    Args:
      module: the module that was called.
      args: positional arguments of the call, which hold no example.
      kwargs: its keyword arguments.
      grad: gradient of each example's loss with respect to the output, `(B, ...)`.
    Privacy: per example: each is the product of one example's row of `grad` with what follows from no example.
    """
    fixed = {f"module.{name}": p.detach() for name, p in module.named_parameters(recurse=False)}

    def output(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(_Bare(module), parameters, args, dict(kwargs))

    y, product = torch.func.vjp(output, fixed)[:2]
    (gradients,) = torch.func.vmap(product)(grad.reshape(len(grad), *y.shape))
    return {name.removeprefix("module."): Materialised(gradient.detach()) for name, gradient in gradients.items()}


def differs(again: Tensor, output: Tensor, tolerance: float = TOLERANCE) -> Tensor:
    """Return whether a finite example's output differs from its output in the call by more than a tolerance: bool."""
    again_BN, output_BN = again.reshape(len(again), -1), output.reshape(len(output), -1)
    finite_B = output_BN.isfinite().all(1)
    gap_B = (again_BN - output_BN).abs().amax(1) if output_BN.shape[1] else again_BN.new_zeros(len(again))
    close_B = gap_B <= tolerance * output_BN.abs().amax(1) if output_BN.shape[1] else gap_B == 0
    return ~(close_B | ~finite_B).all()


def unlike(module: nn.Module) -> ModelError:
    """Return the error for a module whose output for an example alone differs from that in its call."""
    return ModelError(
        f"Expected a {type(module).__name__} with parameters of its own to compute each example's output from that "
        "example's arguments; evaluated on one example at a time it gives another one. It uses state that was put on "
        "it before the call, or the other examples, so its per-example gradients are unknown. Pass what it needs as "
        "arguments with the examples on the first axis, or freeze it."
    )
