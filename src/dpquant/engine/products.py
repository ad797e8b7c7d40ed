# SPDX-License-Identifier: Apache-2.0
"""The autograd functions of the quantizable layers: forward product, input gradient, and operands for the tape.

Gradients are straight-through: rounding is treated as the identity. `quantizable.py` defines the products.

Symbols: B examples, D input features, x input, g output gradient.
"""

import functools
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from dpquant.backends.algebra import convolved, input_gradient, rows_by_matrix, weight_gradient
from dpquant.backends.qtensor import QTensor, code_values, scaled
from dpquant.engine.context import StepContext
from dpquant.errors import ModelError
from dpquant.formats import Recipe, RoleFormat

if TYPE_CHECKING:
    from dpquant.engine.quantizable import WeightProduct


class Convolution(torch.autograd.Function):
    """Computes the three products of a layer. Gradients are straight-through: rounding is treated as the identity."""

    @staticmethod
    def forward(ctx, x, weight, bias, anchor, layer: "WeightProduct", run: StepContext, source: Tensor | None = None):
        ctx.layer, ctx.run, ctx.call, ctx.precision = layer, run, run.next_call(layer.layer), layer.precision
        ctx.size = x.shape[2:]
        ctx.geometry = geometry = layer.geometry.cropped(ctx.size)[0]
        recipe, dgrad, wgrad = ctx.precision.recipes
        ctx.trains = run.trains(layer.weight)
        wgrad = wgrad if ctx.trains else None
        codes, ctx.x = _codes(ctx, "activation", x if source is None else source, x, recipe, wgrad)
        if recipe is None or dgrad is None:
            weight = run.dense_weight(layer, weight, ctx.size)
        ctx.save_for_backward(x if ctx.trains and wgrad is None else None, weight if dgrad is None else None)
        if recipe is None:
            y = convolved(x, weight, bias, geometry)
        else:
            y = run.packed_weight(layer, recipe, ctx.size, side="output").forward(codes, bias)
        return y.clone() if y._is_view() else y  # autograd forbids to modify a view made in here in place

    @staticmethod
    def backward(ctx, *grads: Tensor):
        grad, layer, run = grads[0], ctx.layer, ctx.run
        check_differentiating(run)
        grad_x = grad_weight = grad_bias = None
        (x, weight), recipe = ctx.saved_tensors, ctx.precision.dgrad
        wgrad = ctx.precision.wgrad if ctx.trains else None
        codes, g = _codes(ctx, "gradient", grad, grad, recipe if ctx.needs_input_grad[0] else None, wgrad)
        x, g = ctx.x or x, g or grad
        if ctx.needs_input_grad[0] and codes is None:
            grad_x = input_gradient(grad, weight, ctx.geometry, ctx.size)
        elif ctx.needs_input_grad[0]:
            weight = run.packed_weight(layer, recipe, ctx.size, side="input")
            grad_x = weight.input_gradient(codes, ctx.size)
        if run.tape is not None:
            run.tape.record(layer, x, g, grad)
            return grad_x, None, None, None, None, None
        if ctx.needs_input_grad[1]:
            g_values = code_values(g)
            if isinstance(g, QTensor) and isinstance(x, QTensor):
                g_values = scaled(g_values, g.scale * x.scale, torch.ones(1, device=g_values.device))
            grad_weight = weight_gradient(g_values, code_values(x), layer.geometry)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum((0, 2, 3))
        return grad_x, grad_weight, grad_bias, None, None, None


class OverPositions(torch.autograd.Function):
    """The products of a linear layer on sequences `(B, ..., D)`, whose positions are those of a map of one column.

    The views are taken in here, where autograd makes no node of each.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, anchor, layer: "WeightProduct", run: StepContext):
        ctx.places = x.shape[1:-1]
        y = Convolution.forward(ctx, _as_map(x), weight, bias, anchor, layer, run, source=x)
        return _as_sequence(y, ctx.places).detach()  # no view for autograd: the model may modify it in place

    @staticmethod
    def backward(ctx, *grads: Tensor):
        grad_x, *others = Convolution.backward(ctx, _as_map(grads[0]))
        return None if grad_x is None else _as_sequence(grad_x, ctx.places), *others


def _as_map(x: Tensor) -> Tensor:
    """Return a sequence `(B, ..., D)` as a map `(B, D, T, 1)`, channels last."""
    x_BTD = x.flatten(1, -2) if x.ndim > 2 else x.unsqueeze(1)
    return x_BTD.transpose(1, 2).unsqueeze(3).contiguous(memory_format=torch.channels_last)


def _as_sequence(y: Tensor, places: torch.Size) -> Tensor:
    """Return a map `(B, D, T, 1)` as a sequence `(B, *places, D)`."""
    return y.squeeze(3).transpose(1, 2).reshape(len(y), *places, y.shape[1])


class RowProducts(torch.autograd.Function):
    """The products of a linear layer in full precision on rows `(B, D)`: what `Convolution` does without its views."""

    @staticmethod
    def forward(ctx, x, weight, bias, anchor, layer: "WeightProduct", run: StepContext):
        ctx.layer, ctx.run, ctx.trains = layer, run, run.trains(layer.weight)
        ctx.save_for_backward(x if ctx.trains else None, weight)
        return rows_by_matrix(x, weight, bias)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        grad, run = grads[0], ctx.run
        check_differentiating(run)
        x, weight = ctx.saved_tensors
        grad_x = rows_by_matrix(grad, weight.t()) if ctx.needs_input_grad[0] else None
        grad_weight = grad_bias = None
        if run.tape is not None:
            g = grad[:, :, None, None]
            run.tape.record(ctx.layer, x[:, :, None, None] if ctx.trains else None, g, g)
        else:
            grad_weight = grad.t() @ x if ctx.needs_input_grad[1] else None
            grad_bias = grad.sum(0) if ctx.needs_input_grad[2] else None
        return grad_x, grad_weight, grad_bias, None, None, None


@functools.cache
def timed(products: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """Return a function whose wall time, forward and backward, is added to the clock of the step context."""

    class Timed(products):
        @staticmethod
        def forward(ctx, x, weight, bias, anchor, layer: "WeightProduct", run: StepContext):
            assert run.clock is not None
            with run.clock.timing(layer.name):
                return products.forward(ctx, x, weight, bias, anchor, layer, run)

        @staticmethod
        def backward(ctx, *grads: Tensor):
            with ctx.run.clock.timing(ctx.layer.name):
                return products.backward(ctx, *grads)

    return Timed


def check_differentiating(run: StepContext) -> None:
    """Raise ModelError if the losses are still being computed."""
    if run.phase == "forward":
        raise ModelError(
            "Expected loss_fn not to differentiate; got a gradient that is taken while the losses are computed. A "
            "gradient penalty's own gradient has no per-example form here. Leave it out of the loss."
        )


def _codes(
    ctx, role: Literal["activation", "gradient"], source: Tensor, x: Tensor, *recipes: Recipe | None
) -> list[Any]:
    """Return an operand's QTensor for each recipe, quantized once per format; None for a recipe that is None."""
    made: dict[RoleFormat, QTensor] = {}
    formats: list[RoleFormat | None] = [recipe and getattr(recipe, role) for recipe in recipes]
    for wanted in filter(None, formats):
        if wanted not in made:
            made[wanted] = ctx.run.codes(ctx.layer, role, ctx.call, source, x, wanted)
    return [wanted and made[wanted] for wanted in formats]
