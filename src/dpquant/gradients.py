# SPDX-License-Identifier: Apache-2.0
"""The per-example gradients of one parameter, from one call of the module that owns it, evaluated as late as possible.

A contribution can say every example's squared norm, and add the examples' gradients, weighted, to a total. What it
holds in between is its own affair: the gradients, or operands that give them (`weight_gradients.py`). Norm and sum are
of the same gradients, so that what was clipped is what is summed. Nothing here knows of clipping.

Symbols: B examples, T positions, D features.
Source: book-keeping, Bu et al., arXiv 2210.00038.
"""

import dataclasses
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpquant.errors import ModelError

ROUND_OFF = 2.0**-17
"""More than float32 sums of 16,384 equal terms lose (5.4e-6 was measured): norms are rounded up by it, factors down."""


class Contribution(Protocol):
    """The per-example gradients of one parameter from one call of a layer, evaluated as late as possible."""

    def squared_norms(self) -> Tensor:
        """||G_i||^2, float64 `(B,)`, never less than the true value of what `add_weighted` adds up."""
        ...

    def per_example(self) -> Tensor:
        """G_i, float32 `(B, *parameter shape)`."""
        ...

    def inner_products(self, other: "Contribution") -> Tensor:
        """<G_i, G'_i> with other gradients of the same parameter and examples, `(B,)`."""
        ...

    def add_weighted(self, weights_B: Tensor, total: Any) -> Any:
        """Add sum_i w_i G_i to a total, in place, in a form of its own that `finished` undoes; None begins one."""
        ...

    def finished(self, total: Any) -> Tensor:
        """The total as a float32 tensor of the parameter's shape."""
        ...

    def take(self, rows: Tensor) -> "Contribution":
        """The same for some of the examples."""
        ...


@dataclasses.dataclass
class Formed:
    """Gradients that exist already, `(B, *parameter shape)`."""

    gradients: Tensor

    def squared_norms(self) -> Tensor:
        # Rows in float32, then their squares in float64: nearly as exact as float64 throughout, without its copy.
        rows = self.gradients.reshape(len(self.gradients), -1, self.gradients.shape[-1])
        return torch.linalg.vector_norm(rows, dim=2).double().square().sum(1)

    def per_example(self) -> Tensor:
        return self.gradients

    def inner_products(self, other: Contribution) -> Tensor:
        return (self.per_example() * other.per_example()).flatten(1).sum(1)

    def add_weighted(self, weights_B: Tensor, total: Tensor | None) -> Tensor:
        total = self.gradients.new_zeros(self.gradients.shape[1:]) if total is None else total
        total.view(-1).addmv_(self.gradients.flatten(1).t(), weights_B.to(total.dtype))
        return total

    def finished(self, total: Tensor) -> Tensor:
        return total

    def take(self, rows: Tensor) -> "Formed":
        return dataclasses.replace(self, gradients=self.gradients[rows])


class Lookup:
    """The gradient of an embedding table: rows `g` added at positions `ids`."""

    def __init__(self, ids_BT: Tensor, g_BTD: Tensor, num_rows: int):
        self._ids, self._g, self._num_rows = ids_BT, g_BTD, num_rows

    def squared_norms(self) -> Tensor:
        same = self._ids[:, :, None] == self._ids[:, None, :]
        gram = self._g @ self._g.transpose(1, 2)
        lengths = gram.diagonal(dim1=1, dim2=2).double().sqrt()
        return (gram.double() * same).sum((1, 2)) + ROUND_OFF * lengths.sum(1).square()

    def per_example(self) -> Tensor:
        table = self._g.new_zeros(len(self._ids), self._num_rows, self._g.shape[2])
        return table.scatter_add_(1, self._ids[..., None].expand_as(self._g), self._g)

    def inner_products(self, other: Contribution) -> Tensor:
        return (self.per_example() * other.per_example()).flatten(1).sum(1)

    def add_weighted(self, weights_B: Tensor, total: Tensor | None) -> Tensor:
        total = self._g.new_zeros(self._num_rows, self._g.shape[2]) if total is None else total
        return total.index_add_(0, self._ids.flatten(), (self._g * weights_B[:, None, None]).flatten(0, 1))

    def finished(self, total: Tensor) -> Tensor:
        return total

    def take(self, rows: Tensor) -> "Lookup":
        return Lookup(self._ids[rows], self._g[rows], self._num_rows)


def contributions_of(module: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Contribution]:
    """{parameter name inside the module: its per-example gradients}, from the module's input and output gradient."""
    match module:
        case nn.GroupNorm():
            normalised = F.group_norm(x, module.num_groups, None, None, module.eps)
            return {
                "weight": Formed((grad * normalised).flatten(2).sum(2)) if x.ndim > 2 else Formed(grad * normalised),
                "bias": Formed(grad.flatten(2).sum(2)) if x.ndim > 2 else Formed(grad),
            }
        case nn.LayerNorm():
            normalised = F.layer_norm(x, module.normalized_shape, None, None, module.eps)
            axes = tuple(range(1, x.ndim - len(module.normalized_shape)))
            total = (lambda t: t.sum(axes)) if axes else (lambda t: t)
            return {"weight": Formed(total(grad * normalised)), "bias": Formed(total(grad))}
        case nn.Embedding():
            ids_BT = x.reshape(len(x), -1)
            g_BTD = grad.reshape(len(x), -1, module.embedding_dim)
            if module.padding_idx is not None:
                g_BTD = g_BTD * (ids_BT != module.padding_idx)[..., None]
            return {"weight": Lookup(ids_BT, g_BTD, module.num_embeddings)}
        case _:
            return _by_vmap(module, x, grad)


def _by_vmap(module: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Contribution]:
    """Any other module: differentiate it on one example at a time, vectorised."""
    parameters = {name: p.detach() for name, p in module.named_parameters(recurse=False)}

    def inner(parameters: dict[str, Tensor], x: Tensor, grad: Tensor) -> Tensor:
        y = torch.func.functional_call(module, parameters, (x.unsqueeze(0),))
        return (y.squeeze(0) * grad).sum()

    try:
        with torch.enable_grad():
            gradients = torch.func.vmap(torch.func.grad(inner), (None, 0, 0), randomness="error")(parameters, x, grad)
    except RuntimeError as error:
        raise ModelError(
            f"Expected a {type(module).__name__} whose per-example gradients can be computed; got one that cannot be "
            "evaluated one example at a time. Freeze it, or build it of Conv2d, Linear, GroupNorm, LayerNorm and "
            "Embedding."
        ) from error
    return {name: Formed(gradient) for name, gradient in gradients.items()}
