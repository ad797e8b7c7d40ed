# SPDX-License-Identifier: Apache-2.0
"""Layers whose three products can run on number codes: what they have in common, and the linear ones.

A twin in full precision computes what the original layer computes. A quantized twin computes these three products
(algorithm: DPQuant, arXiv 2509.03472), except those that its precision keeps in float32:

    forward   y_i  = s(x_i) s(W) conv(code(x_i), code(W)) + b
    dgrad     gx_i = s(g_i) s(W) conv_transpose(code(g_i), code(W))
    wgrad     G_i  = s(g_i) s(x_i) sum_t code(g_it) code(x_it)^T

x is quantized once, and its codes are kept for wgrad. W is quantized once per logical step, or once per run if it is
frozen; a frozen weight's wgrad is not formed and codes for it are not kept. g is quantized once, for both dgrad and
wgrad. Only if two products use an operand in different formats, it is quantized once per format: with
`mxfp4`, x and g have codes in blocks for forward and dgrad, and int8 codes with one scale per example for wgrad. The
bias gradient is the sum of the output gradient before quantization. Scales of x and g are taken per example, never over
the batch: with a batch-wide scale each example's gradient would depend on every other example, and clipping would not
bound an example's influence.

A layer hands (x, g) to the tape of the `StepContext` in which it runs. It does not clip, sum over examples or add
noise. Without a step context it is an ordinary layer with straight-through gradients.

Symbols: B examples, x activations, g output gradients, W weight, T output positions, s scale.
"""

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from dpquant.backends.algebra import swap_in_out
from dpquant.backends.geometry import Geometry
from dpquant.backends.interface import Backend
from dpquant.backends.qtensor import QTensor
from dpquant.backends.quantize import quantize_rows
from dpquant.engine.arrangement import Arrangement, examples_first, put_back
from dpquant.engine.context import StepContext, anchor_for
from dpquant.engine.products import Convolution, OverPositions, RowProducts, timed
from dpquant.engine.weight_cache import WeightCache
from dpquant.engine.weight_layout import WeightLayout
from dpquant.errors import ModelError
from dpquant.formats import Precision, RoleFormat
from dpquant.rounding import derive_key, row_keys

_POINT = Geometry()


class WeightProduct:
    """A weight whose three products can run quantized: that of a layer, or of a part of one (`PartOfLayer`).

    Attributes:
      weight, bias: the parameters in which weight and bias lie; bias may be None.
      layer: the layer that a policy selects, whose precision, backend and name these are.
      name: of the layer in its model; it selects the rounding draws.
      backend: quantizes the operands and multiplies their codes.
      precision: the current precision.
      current: the step context in which the layer runs; None = an ordinary layer.
      frozen: forms of the weight that outlive a step, used while it is frozen.
    """

    weight: Any
    bias: Any
    name: Any
    backend: Any
    precision: Any
    current: Any
    frozen: WeightCache

    @property
    def layer(self) -> "QuantizableLayer":
        raise NotImplementedError

    @property
    def layout(self) -> WeightLayout:
        """Where the product's weight lies in the parameter."""
        return WeightLayout(self.weight.shape)

    @property
    def bias_layout(self) -> WeightLayout:
        """Where the product's bias lies in its parameter."""
        return WeightLayout(self.bias.shape)

    @property
    def geometry(self) -> Geometry:
        """Kernel, stride, padding, dilation and groups of the layer as a convolution of its (already padded) input."""
        return _POINT

    def matrix(self) -> Tensor:
        """Return W as the products use it, `(O, C / G, *kernel)`: a view of the parameter."""
        return self.layout.of(self.weight, self.geometry.kernel)

    def quantize_weight(self, run: StepContext, role: RoleFormat, kept: str = "") -> QTensor:
        """Quantize W to codes `(O, C / G, *kernel)`, with one scale, or with one scale per kept channel.

        W holds released values only, so a scale may depend on all of it.

        Args:
          run: the step, whose key fixes the rounding draws.
          role: the format of the codes and their rounding.
          kept: the channels that get a scale each, `output` or `input`; empty: one scale for all of W.
        """
        weight = self.matrix().detach()
        weight = swap_in_out(weight, self.geometry.groups) if kept == "input" else weight
        rows = weight.flatten(1) if kept else weight.reshape(1, -1)
        rows = weight if role.blocks is not None else rows  # maps: a block is channels of one tap
        key = derive_key(run.weight_key(self), self.name, "weight", *(self.layout.rows or ()))
        keys = row_keys(key, torch.arange(len(rows), device=weight.device))
        q = quantize_rows(rows, role, keys).rearranged(lambda part: part.view(weight.shape))
        return q.rearranged(lambda part: swap_in_out(part, self.geometry.groups)) if kept == "input" else q

    def for_each_example(self, x: Tensor) -> Tensor:
        """Return x, repeated for each example of the microbatch if it is one row outside of autograd, as for positions.

        Each example then has its own gradient and its own rounding draws. Another number of rows is noted.
        """
        run = self.current
        if run is None or run.record_ids is None or x.shape[0] == (size := run.record_ids.shape[0]):
            return x
        if x.shape[0] == 1 and not x.requires_grad:
            return repeated(x, size)
        run.elsewhere.add(f"{self.name}.weight")
        return x

    def convolve(self, x: Tensor) -> Tensor:
        """Apply the convolution to x `(B, C, H, W)`; return `(B, O, H', W')`.

        Within a step context with a tape, backward records the operands of the per-example gradients. Otherwise the
        layer behaves as an ordinary one, with straight-through gradients.
        """
        weight = self.matrix()
        x = x.contiguous(memory_format=torch.channels_last)  # the layout of all fast operators, pooling included
        return self.computed(Convolution, x, weight)

    def over_positions(self, x: Tensor) -> Tensor:
        """Apply the product to the last axis of x `(B, ..., C)`; return `(B, ..., O)`."""
        return self.computed(OverPositions, x, self.matrix())

    def computed(self, products: type[torch.autograd.Function], x: Tensor, weight: Tensor) -> Tensor:
        """Apply one of the functions of `products.py` in the layer's step context, if it has one."""
        run = self.current or StepContext(key=0)
        if run.phase == "backward":
            raise ModelError(
                "Expected no layer to be called during the backward pass; got activation checkpointing, which computes "
                f"layer {self.name!r} again there. Forward and backward would belong to different roundings. Turn it "
                "off: a smaller microbatch_size saves as much memory."
            )
        if run.replay is not None and (stored := run.replay.stored()) is not None:
            return stored
        anchor = anchor_for(run.tape, self.weight, self.bias)
        bias = None if self.bias is None else self.bias_layout.part(self.bias)
        function = products if run.clock is None else timed(products)
        y = cast(Tensor, function.apply(x, weight, bias, anchor, self, run))
        if run.replay is not None:
            run.replay.store(self.layer, y)
        return y


class QuantizableLayer(WeightProduct, nn.Module):
    """Base class of the quantizable twins: a layer with a backend, a precision and a step context.

    Attributes:
      chosen: the precision of the layer when a policy selects it (`set_policy`).
      arrangement: where the layer's calls have the examples.
    """

    name: str
    backend: Backend
    chosen: Precision
    precision: Precision
    current: StepContext | None
    arrangement: Arrangement = "first"

    @property
    def layer(self) -> "QuantizableLayer":
        return self

    def by_example(self, product: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Apply a product of the layer's to x with the examples on the first axis, wherever the model has them."""
        run = self.current
        if self.arrangement == "first" or run is None or run.record_ids is None:
            return product(self.for_each_example(x))
        return put_back(product(examples_first(x, self.arrangement, len(run.record_ids))), self.arrangement)

    @property
    def quantized(self) -> bool:
        """Whether at least one of the layer's products runs quantized in its current precision."""
        return self.precision.quantized

    def macs(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> float:
        """Return the multiply-accumulates of the forward products of a call, for one example.

        Args:
          args: positional arguments of the call.
          kwargs: keyword arguments of the call.
          output: its result, the examples first.
        """
        return output[0].numel() * self.matrix()[0].numel()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, precision={self.precision.name}"


class PartOfLayer(WeightProduct):
    """One of several products of a layer: it has its own weight, and all else is the layer's.

    It is no module, so that the layer's state_dict does not change and a policy selects all parts together.
    """

    def __init__(
        self,
        layer: QuantizableLayer,
        weight: str,
        bias: str | None,
        *,
        rows: tuple[int, int] | None = None,
        bias_rows: tuple[int, int] | None = None,
    ):
        """Make the part of a layer that uses these parameters of it.

        Args:
          layer: the layer.
          weight: name of the parameter `(O, C)` in which the weight lies.
          bias: name of the parameter in which the bias lies; None: there is no bias.
          rows: (first, last + 1) row of the weight's parameter that the part uses; None: all.
          bias_rows: the same for the bias.
        """
        self._layer, self._weight, self._bias = layer, weight, bias
        self._rows, self._bias_rows = rows, bias_rows
        self.frozen = WeightCache()

    @property
    def layer(self) -> QuantizableLayer:
        return self._layer

    @property
    def weight(self) -> Tensor:
        return getattr(self._layer, self._weight)

    @property
    def bias(self) -> Tensor | None:
        return None if self._bias is None else getattr(self._layer, self._bias)

    @property
    def layout(self) -> WeightLayout:
        return WeightLayout(self.weight.shape, self._rows)

    @property
    def bias_layout(self) -> WeightLayout:
        assert self.bias is not None
        return WeightLayout(self.bias.shape, self._bias_rows)

    @property
    def name(self) -> str:
        return self._layer.name

    @property
    def backend(self) -> Backend:
        return self._layer.backend

    @property
    def precision(self) -> Precision:
        return self._layer.precision

    @property
    def current(self) -> StepContext | None:
        return self._layer.current


class QuantLinear(QuantizableLayer, nn.Linear):
    """A Linear whose products can run quantized. It is computed as a 1x1 convolution over T positions."""

    def forward(self, input: Tensor) -> Tensor:
        check_features(self, input, self.in_features)
        return self.by_example(self._product, input)

    def _product(self, x: Tensor) -> Tensor:
        if x.ndim == 2 and not self.quantized:
            return self.computed(RowProducts, x, self.weight)
        return self.over_positions(x)


class QuantTransposedLinear(QuantizableLayer):
    """GPT-2's linear layer (`Conv1D` of transformers), whose weight is `(inputs, outputs)`, quantizable.

    Attributes:
      plain: the class that it replaces.
    """

    weight: nn.Parameter
    bias: nn.Parameter
    plain: type[nn.Module]

    @property
    def layout(self) -> WeightLayout:
        return WeightLayout(self.weight.shape, transposed=True)

    def forward(self, x: Tensor) -> Tensor:
        check_features(self, x, self.weight.shape[0])
        return self.by_example(self.over_positions, x)


def repeated(row: Tensor, size: int) -> Tensor:
    """Return a tensor of one row as `size` rows that share memory; a tensor without axes as it is."""
    return row.expand(size, *row.shape[1:]) if row.ndim else row


def check_features(layer: QuantizableLayer, input: Tensor, features: int) -> None:
    """Raise ModelError unless an input has a first axis of examples and a last one of so many features."""
    if input.ndim < 2 or input.shape[-1] != features:
        raise ModelError(
            f"Expected input of layer {layer.name!r} to have shape (B, ..., {features}); got "
            f"{tuple(input.shape)}. Its first axis is the example, whose gradient is clipped; its last the "
            "features. Reshape the input."
        )
