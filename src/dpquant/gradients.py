# SPDX-License-Identifier: Apache-2.0
"""The per-example gradients of one parameter, from one call of the module that owns it, evaluated as late as possible.

A contribution can say every example's squared norm, and add up the examples' gradients with weights, without ever
holding them all where that is cheaper. For a weight with G_i = sum_t g_it x_it^T,

    ||G_i||^2 = <g_i g_i^T, x_i x_i^T>      by Gram matrices where there are few positions T, else by forming G_i

Norm and sum come from the same operands, so that what was clipped is what is summed. Nothing here knows of clipping.

Symbols: B examples, T positions, D patch size, O output channels, G groups, C channels.
Source: book-keeping, Bu et al., arXiv 2210.00038; Gram norms, Goodfellow, arXiv 1510.01799.
"""

import dataclasses
import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpquant.errors import ModelError
from dpquant.kernels import (
    Geometry,
    add_patch_products,
    code_values,
    in_weight_order,
    patch_products,
    unfolded,
)
from dpquant.quantizer import QTensor

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

    def add_weighted(self, weights_B: Tensor, total: Tensor | None) -> Tensor:
        """Add sum_i w_i G_i to a total, in place, in an order of its own that `in_parameter_order` undoes; float32."""
        ...

    def in_parameter_order(self, total: Tensor) -> Tensor:
        """The total in the parameter's own order and shape."""
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

    def add_weighted(self, weights_B: Tensor, total: Tensor | None) -> Tensor:
        total = self.gradients.new_zeros(self.gradients.shape[1:]) if total is None else total
        total.view(-1).addmv_(self.gradients.flatten(1).t(), weights_B)
        return total

    def in_parameter_order(self, total: Tensor) -> Tensor:
        return total

    def take(self, rows: Tensor) -> "Formed":
        return dataclasses.replace(self, gradients=self.gradients[rows])


@dataclasses.dataclass
class FormedProduct(Formed):
    """Weight gradients `(B, O, D)` in patch order, put into the weight's own order only after summing."""

    geometry: Geometry
    shape: torch.Size

    def per_example(self) -> Tensor:
        return in_weight_order(self.gradients, self.geometry).reshape(-1, *self.shape)

    def in_parameter_order(self, total: Tensor) -> Tensor:
        return in_weight_order(total, self.geometry).reshape(self.shape)


@dataclasses.dataclass
class Product:
    """Weight gradients as their operands: G_i = scale_i * sum_t g_it x_it^T, x_it the patch that position t sees.

    Attributes:
      patches_BGTD, g_BGTO: values or integer codes of patches and output gradients, float32. scale_B: of the product of
      codes; None = 1.
      geometry, shape: of the layer and its weight.
    """

    patches_BGTD: Tensor
    g_BGTO: Tensor
    scale_B: Tensor | None
    geometry: Geometry
    shape: torch.Size

    @classmethod
    def of(cls, x: Tensor | QTensor, g: Tensor | QTensor, geometry: Geometry, shape: torch.Size) -> "Product":
        """From a layer's operands `(B, C, H, W)` and `(B, O, H', W')`, both quantized or neither."""
        g_BGTO = code_values(g).flatten(2).unflatten(1, (geometry.groups, -1)).transpose(2, 3)
        scale_B = x.scale * g.scale if isinstance(x, QTensor) and isinstance(g, QTensor) else None
        return cls(unfolded(code_values(x), geometry), g_BGTO, scale_B, geometry, shape)

    @property
    def has_few_positions(self) -> bool:
        """Whether two T x T Gram matrices cost less than forming O x D products."""
        positions, out_channels, patch = self.patches_BGTD.shape[2], self.shape[0], math.prod(self.shape[1:])
        return positions * (out_channels + patch) < out_channels * patch

    def squared_norms(self) -> Tensor:
        """By Gram matrices: <x_i x_i^T, g_i g_i^T>, summed in float64, with a margin for the Grams' own round-off."""
        if self.patches_BGTD.shape[2] == 1:
            squares = [t.double().square().sum((2, 3)) for t in (self.patches_BGTD, self.g_BGTO)]
            total_B = (squares[0] * squares[1]).sum(1)
        else:
            grams = [(t @ t.transpose(2, 3)).double() for t in (self.patches_BGTD, self.g_BGTO)]
            lengths = [gram.diagonal(dim1=2, dim2=3).sqrt() for gram in grams]
            margin_B = (lengths[0] * lengths[1]).sum((1, 2)).square()
            total_B = (grams[0] * grams[1]).sum((1, 2, 3)) + ROUND_OFF * margin_B
        return total_B if self.scale_B is None else total_B * self.scale_B.double().square()

    def formed(self) -> FormedProduct:
        """The gradients themselves."""
        gradients = patch_products(self.g_BGTO, self.patches_BGTD)
        if self.scale_B is not None:
            gradients.mul_(self.scale_B[:, None, None])
        return FormedProduct(gradients, self.geometry, self.shape)

    def per_example(self) -> Tensor:
        return self.formed().per_example()

    def add_weighted(self, weights_B: Tensor, total: Tensor | None) -> Tensor:
        if self.scale_B is not None:
            weights_B = weights_B * self.scale_B
        return add_patch_products(self.g_BGTO * weights_B[:, None, None, None], self.patches_BGTD, total)

    def in_parameter_order(self, total: Tensor) -> Tensor:
        return in_weight_order(total.flatten(0, 1), self.geometry).reshape(self.shape)

    def take(self, rows: Tensor) -> "Product":
        scale_B = None if self.scale_B is None else self.scale_B[rows]
        return dataclasses.replace(
            self, patches_BGTD=self.patches_BGTD[rows], g_BGTO=self.g_BGTO[rows], scale_B=scale_B
        )


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

    def add_weighted(self, weights_B: Tensor, total: Tensor | None) -> Tensor:
        total = self._g.new_zeros(self._num_rows, self._g.shape[2]) if total is None else total
        return total.index_add_(0, self._ids.flatten(), (self._g * weights_B[:, None, None]).flatten(0, 1))

    def in_parameter_order(self, total: Tensor) -> Tensor:
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
