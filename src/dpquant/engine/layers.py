# SPDX-License-Identifier: Apache-2.0
"""Quantizable twins of Conv2d and Linear, whose three products can run on number codes.

`prepare` replaces every Conv2d and Linear by its twin: a subclass with the same parameters and state_dict. A twin in
full precision computes what the original computes. A quantized twin computes these three products (algorithm: DPQuant,
arXiv 2509.03472), except those that its precision keeps in float32:

    forward   y_i  = s(x_i) s(W) conv(code(x_i), code(W)) + b
    dgrad     gx_i = s(g_i) s(W) conv_transpose(code(g_i), code(W))
    wgrad     G_i  = s(g_i) s(x_i) sum_t code(g_it) code(x_it)^T

x is quantized once, and its codes are kept for wgrad. W is quantized once per logical step, or once per run if it is
frozen; a frozen weight's wgrad is not formed and codes for it are not kept. g is quantized once, for
both dgrad and wgrad. Only if two products use an operand in different formats, it is quantized once per format: with
`mxfp4`, x and g have codes in blocks for forward and dgrad, and int8 codes with one scale per example for wgrad. The
bias gradient is the sum of the output gradient before quantization. Scales of x and g are taken per example, never over
the batch: with a batch-wide scale each example's gradient would depend on every other example, and clipping would not
bound an example's influence.

A layer hands (x, g) to the tape of the `StepContext` in which it runs. It does not clip, sum over examples or add
noise. Without a step context it is an ordinary layer with straight-through gradients.

Symbols: B examples, x activations, g output gradients, W weight, T output positions, s scale.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpquant.backends.algebra import swap_in_out
from dpquant.backends.geometry import Geometry
from dpquant.backends.interface import Backend
from dpquant.backends.qtensor import QTensor
from dpquant.backends.quantize import quantize_rows
from dpquant.backends.registry import resolve
from dpquant.engine.context import StepContext, twin_of
from dpquant.engine.group_norm import TapedGroupNorm
from dpquant.engine.products import Convolution, RowProducts, timed
from dpquant.engine.weight_cache import WeightCache
from dpquant.errors import ModelError, SettingError, expect
from dpquant.formats import FULL_PRECISION, Precision, Recipe, RoleFormat, precision
from dpquant.rounding import derive_key, row_keys

_POINT = Geometry()


class QuantizableLayer(nn.Module):
    """Base class of the quantizable twins: a layer with a backend, a precision and a step context.

    Attributes:
      name: of the layer in its model; it selects the layer's rounding draws.
      backend: quantizes the layer's operands and multiplies their codes.
      chosen: the precision of the layer when a policy selects it (`set_policy`).
      precision: the current precision.
      current: the step context in which the layer runs; None = an ordinary layer.
      frozen: forms of the layer's weight that outlive a step, used while it is frozen.
    """

    weight: Tensor
    bias: Any
    name: str
    backend: Backend
    chosen: Precision
    precision: Precision
    current: StepContext | None
    frozen: WeightCache

    @property
    def quantized(self) -> bool:
        """Whether at least one of the layer's products runs quantized in its current precision."""
        return self.precision.quantized

    @property
    def geometry(self) -> Geometry:
        """Kernel, stride, padding, dilation and groups of the layer as a convolution of its (already padded) input."""
        return _POINT

    def quantize_weight(self, run: StepContext, role: RoleFormat, kept: str = "") -> QTensor:
        """Quantize W to codes `(O, C / G, *kernel)`, with one scale, or with one scale per kept channel.

        W holds released values only, so a scale may depend on all of it.

        Args:
          run: the step, whose key fixes the rounding draws.
          role: the format of the codes and their rounding.
          kept: the channels that get a scale each, `output` or `input`; empty: one scale for all of W.
        """
        weight = self.weight.detach().reshape(self.weight.shape[0], -1, *self.geometry.kernel)
        weight = swap_in_out(weight, self.geometry.groups) if kept == "input" else weight
        rows = weight.flatten(1) if kept else weight.reshape(1, -1)
        rows = weight if role.blocks is not None else rows  # maps: a block is channels of one tap
        keys = row_keys(
            derive_key(run.weight_key(self), self.name, "weight"), torch.arange(len(rows), device=weight.device)
        )
        q = quantize_rows(rows, role, keys).rearranged(lambda part: part.view(weight.shape))
        return q.rearranged(lambda part: swap_in_out(part, self.geometry.groups)) if kept == "input" else q

    def convolve(self, x: Tensor) -> Tensor:
        """Apply the convolution to x `(B, C, H, W)`; return `(B, O, H', W')`.

        Within a step context with a tape, backward records the operands of the per-example gradients. Otherwise the
        layer behaves as an ordinary one, with straight-through gradients.
        """
        weight = self.weight.view(self.weight.shape[0], -1, *self.geometry.kernel)
        x = x.contiguous(memory_format=torch.channels_last)  # the layout of all fast operators, pooling included
        return self.computed(Convolution, x, weight)

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
        trained = run.trains(self.weight) or run.trains(self.bias)
        anchor = run.tape.anchor if run.tape is not None and trained else None
        function = products if run.clock is None else timed(products)
        y = cast(Tensor, function.apply(x, weight, self.bias, anchor, self, run))
        if run.replay is not None:
            run.replay.store(self, y)
        return y

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, precision={self.precision.name}"


class QuantConv2d(QuantizableLayer, nn.Conv2d):
    """A Conv2d whose products can run quantized, with any stride, padding, dilation, groups and padding mode."""

    @property
    def geometry(self) -> Geometry:
        pairs = {name: (pair[0], pair[1]) for name, pair in self._pairs().items()}
        return Geometry(**pairs, groups=self.groups)

    def _pairs(self) -> dict[str, tuple[int, ...]]:
        padding = self.padding if self._pads_inside else (0, 0)
        return {
            "kernel": self.kernel_size,
            "stride": self.stride,
            "padding": cast(tuple[int, ...], padding),
            "dilation": self.dilation,
        }

    @property
    def _pads_inside(self) -> bool:
        """Whether the convolution pads by itself: with zeros, equally on both sides. Else `forward` pads before."""
        return self.padding_mode == "zeros" and not isinstance(self.padding, str)

    def forward(self, input: Tensor) -> Tensor:
        if not self._pads_inside:
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=mode)
        return self.convolve(input)


class QuantLinear(QuantizableLayer, nn.Linear):
    """A Linear whose products can run quantized. It is computed as a 1x1 convolution over T positions."""

    def forward(self, input: Tensor) -> Tensor:
        if input.ndim < 2 or input.shape[-1] != self.in_features:
            raise ModelError(
                f"Expected input of layer {self.name!r} to have shape (B, ..., {self.in_features}); got "
                f"{tuple(input.shape)}. Its first axis is the example, whose gradient is clipped; its last the "
                "features. Reshape the input."
            )
        if input.ndim == 2 and not self.quantized:
            return self.computed(RowProducts, input, self.weight)
        if input.ndim == 2:  # fewer nodes for autograd
            return self.convolve(input[:, :, None, None]).flatten(1)
        positions_BTD = input.flatten(1, -2)
        y_BOT1 = self.convolve(positions_BTD.transpose(1, 2).unsqueeze(3))
        return y_BOT1.squeeze(3).transpose(1, 2).reshape(*input.shape[:-1], self.out_features)


_TWINS: dict[type[nn.Module], Callable[[Any], nn.Module]] = {
    nn.Conv2d: lambda module: twin_of(QuantConv2d, module, precision=FULL_PRECISION, current=None),
    nn.Linear: lambda module: twin_of(QuantLinear, module, precision=FULL_PRECISION, current=None),
    nn.GroupNorm: lambda module: twin_of(TapedGroupNorm, module, tape=None),
}


def prepare(
    model: nn.Module, *, format: str | Recipe | Precision = "luq-fp4", backend: str | Backend = "auto"
) -> nn.Module:
    """Replace every Conv2d and Linear of a model by its quantizable twin, and every GroupNorm by a `TapedGroupNorm`.

    All layers run in full precision until `set_policy` or `set_precisions`. The model is changed in place and returned;
    if it is itself a Conv2d, Linear or GroupNorm, its twin is returned. Parameters are the same objects, so an existing
    optimizer stays valid, and the state_dict has the same keys and values. A second call changes recipe and backend.

    Args:
      model: any module with float32 parameters.
      format: of the layers that a policy selects: a recipe's name (`luq-fp4`, `int8`, `mxfp4`, ...), a `Recipe`, or a
        `Precision` of the three products; `dpquant.formats` explains all names.
      backend: `auto`, `simulate` (any device), `int8` (a CPU whose int8 convolution is exact), `cuda` (a GPU whose
        tensor cores are), or a `Backend`.
    Returns: the prepared model.
    Raises:
      FormatError: the recipe or the backend is unknown, or the recipe cannot run on the backend.
      ModelError: model is not a module, has parameters that are not float32, or is on two devices.
    Privacy: reads no data.
    """
    expect("model", model, nn.Module, "a torch.nn.Module", "Pass the model itself", ModelError)
    chosen = precision(format)
    device = _device_of(model)
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.float32:
            raise ModelError(
                f"Expected model's parameters to be float32; got {name} of {parameter.dtype}. Clipping and noise are "
                "calibrated in float32. Call model.float() first."
            )
    resolved = resolve(backend, [chosen], device)
    twins: dict[nn.Module, nn.Module] = {}
    for module in list(model.modules()):
        if type(module) in _TWINS:
            twins[module] = _TWINS[type(module)](module)
    for parent in list(model.modules()):
        for child_name, child in parent._modules.items():
            if child in twins:
                setattr(parent, child_name, twins[child])
    model = twins.get(model, model)
    for name, layer in quantizable_layers(model).items():
        layer.name, layer.chosen, layer.backend, layer.frozen = name, chosen, resolved, WeightCache()
    return model


def _device_of(model: nn.Module) -> torch.device:
    """Return the device of all parameters and buffers; the CPU if there are none."""
    tensors = list(itertools.chain(model.named_parameters(), model.named_buffers()))
    if not tensors:
        return torch.device("cpu")
    first, here = tensors[0][0], tensors[0][1].device
    for name, tensor in tensors:
        if tensor.device != here:
            raise ModelError(
                f"Expected model's parameters and buffers to be on one device; got {first} on {here} and {name} on "
                f"{tensor.device}. A step computes on one. Call model.to(device) before the optimizer is made."
            )
    return here


def quantizable_layers(model: nn.Module) -> dict[str, QuantizableLayer]:
    """Return {name: layer} of a prepared model's quantizable layers, in the order in which the model defines them.

    Raises:
      ModelError: model is no torch.nn.Module.
    """
    expect("model", model, nn.Module, "a torch.nn.Module", "Pass the model itself", ModelError)
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizableLayer)}


def set_policy(model: nn.Module, names: Iterable[str]) -> None:
    """Run exactly these layers in the `format` given to `prepare`, all others in full precision; () quantizes none.

    Raises:
      SettingError: a name is not a quantizable layer of the model, or names are no collection.
    Privacy: reads no data; the choice itself must come from released numbers only.
    """
    layers = quantizable_layers(model)
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise SettingError(
            f"Expected names to be a collection of layer names; got names={names!r}. () quantizes none. Put names into "
            "a tuple."
        )
    set_precisions(model, {name: layers[name].chosen if name in layers else FULL_PRECISION for name in names})


def set_precisions(model: nn.Module, precisions: Mapping[str, Precision]) -> None:
    """Set the precision of each of these layers; all other layers run in full precision.

    Raises:
      SettingError: a name is not a quantizable layer of the model.
      FormatError: the model's backend cannot run a precision.
    Privacy: reads no data; the choice itself must come from released numbers only.
    """
    layers = quantizable_layers(model)
    if unknown := sorted(precisions.keys() - layers.keys()):
        raise SettingError(
            f"Expected names to be quantizable layers of the model; got {unknown[0]!r}. "
            f"Known layers: {', '.join(layers) or 'none (call dpquant.prepare(model) first)'}."
        )
    for name, one in precisions.items():
        resolve(layers[name].backend, [one], layers[name].weight.device)
    for name, layer in layers.items():
        layer.precision = precisions.get(name, FULL_PRECISION)


def current_precisions(model: nn.Module) -> dict[str, Precision]:
    """Return {name: precision} of the layers that currently run quantized."""
    return {name: layer.precision for name, layer in quantizable_layers(model).items() if layer.quantized}


def count_macs(
    model: nn.Module, forward: Callable[[], object], *, layers: Mapping[str, nn.Module] | None = None
) -> dict[str, float]:
    """Return {layer's name: multiply-accumulates of its forward product for one example}.

    Args:
      model: a prepared model, or any model if layers are given.
      forward: runs the model once on a batch; it is called without autograd.
      layers: {name: convolution or linear layer} of the model; None: its quantizable layers.
    """
    layers = quantizable_layers(model) if layers is None else layers
    macs = dict.fromkeys(layers, 0.0)

    def counter(name: str) -> Callable[..., None]:
        def count(module: nn.Module, inputs: Any, output: Tensor) -> None:
            macs[name] += output[0].numel() * cast(Tensor, module.weight)[0].numel()

        return count

    handles = [layer.register_forward_hook(counter(name)) for name, layer in layers.items()]
    try:
        with torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return macs


@contextlib.contextmanager
def running(model: nn.Module, run: StepContext) -> Iterator[StepContext]:
    """Attach a step context to every quantizable layer, and its tape to every GroupNorm twin, until the block ends."""
    layers = quantizable_layers(model).values()
    norms = [module for module in model.modules() if isinstance(module, TapedGroupNorm)]
    for layer in layers:
        layer.current = run
    for norm in norms:
        norm.tape = run.tape
    try:
        yield run
    finally:
        for layer in layers:
            layer.current = None
        for norm in norms:
            norm.tape = None
