# SPDX-License-Identifier: Apache-2.0
"""The context of one logical step over a model: which records are in hand, which key rounds, who takes the gradients.

A model's layers find it while it is `running` (`layers.py`). What is made of weights is kept in it for the whole step.
"""

import collections
import dataclasses
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

from dpquant.backends.geometry import Geometry
from dpquant.backends.interface import PackedWeight
from dpquant.backends.qtensor import QTensor
from dpquant.engine.clock import Clock
from dpquant.engine.contributions import Materialised
from dpquant.formats import Recipe, RoleFormat
from dpquant.rounding import derive_key, row_keys

if TYPE_CHECKING:
    from dpquant.engine.layers import QuantizableLayer

Twin = TypeVar("Twin", bound=nn.Module)


def twin_of(kind: type[Twin], module: nn.Module, **attributes: Any) -> Twin:
    """Return a module of another kind with the module's own parameters, hooks and settings, and some attributes."""
    twin = kind.__new__(kind)
    twin.__dict__.update(module.__dict__)
    for name, value in attributes.items():
        setattr(twin, name, value)
    return twin


class Tape(Protocol):
    """Where layers leave, during a backward pass, what each example's gradient is made of."""

    anchor: Tensor  # a scalar that requires a gradient, so that backward reaches layers whose parameters are detached
    listening: bool  # False while a module is evaluated again, apart from the model

    def add(self, parameter: Tensor, contribution: Materialised) -> None:
        """One call's per-example gradients of a parameter."""
        ...

    def record(self, layer: "QuantizableLayer", x: Tensor | QTensor, g: Tensor | QTensor, grad: Tensor) -> None:
        """One call's operands: the weight gradient is scale_i sum_t g_it x_it^T, the bias gradient sum_t grad_it."""
        ...


class Replay:
    """Outputs of the quantizable layers of a forward pass, in the order of their calls, to be used again.

    A forward pass that differs from the remembered one only from some layer on need not compute what comes before it.
    """

    def __init__(self):
        self._outputs: list[Tensor] = []
        self._first_call: dict[nn.Module, int] = {}
        self._position = 0
        self._until = 0
        self._remembering = False

    def remember(self) -> None:
        """The next forward pass is stored."""
        self._outputs, self._first_call = [], {}
        self._position, self._until, self._remembering = 0, 0, True

    def rewind(self, layer: nn.Module) -> None:
        """The next forward pass takes stored outputs for all calls before the first call of `layer`."""
        self._position, self._remembering = 0, False
        self._until = self._first_call.get(layer, len(self._outputs))

    def stored(self) -> Tensor | None:
        """The output of the coming call, if it is to be taken from the store; a copy, because callers work in place."""
        self._position += 1
        known = not self._remembering and self._position <= self._until
        return self._outputs[self._position - 1].clone() if known else None

    def store(self, layer: nn.Module, output: Tensor) -> None:
        """Keep the output of the call just made, while remembering."""
        if self._remembering:
            self._first_call.setdefault(layer, len(self._outputs))
            self._outputs.append(output.clone())


@dataclasses.dataclass(kw_only=True, eq=False)
class StepContext:
    """One logical step over a model: which records are in hand, which random stream rounds, who takes the gradients.

    Attributes:
      key: 64 bits that, with layer, role, call and record id, fix every rounding draw of the step.
      record_ids: int64 `(B,)`, of the microbatch in hand; None = 0..B-1.
      tape: takes the operands of per-example gradients; None = ordinary autograd.
      replay: outputs to be remembered or used again; None = compute everything.
      clock: measures what each layer's products take; None = nothing is measured.
      phase: under a tape, whether the losses are being computed (`forward`) or differentiated (`backward`).
    """

    key: int
    record_ids: Tensor | None = None
    tape: Tape | None = None
    replay: Replay | None = None
    clock: Clock | None = None
    phase: Literal["forward", "backward"] | None = None
    _weights: dict[tuple[nn.Module, RoleFormat, str], QTensor] = dataclasses.field(default_factory=dict)
    _dense_weights: dict[tuple[nn.Module, Geometry], Tensor] = dataclasses.field(default_factory=dict)
    _packed: dict[tuple[nn.Module, Recipe, str, Geometry], PackedWeight] = dataclasses.field(default_factory=dict)
    _calls: collections.Counter = dataclasses.field(default_factory=collections.Counter)

    def begin(self, record_ids: Tensor) -> None:
        """Take the next microbatch; the packed weights stay."""
        self.record_ids = record_ids
        self._calls.clear()
        if self.clock is not None:
            self.clock.begin()

    def next_call(self, layer: nn.Module) -> int:
        """How many times `layer` has been called on this microbatch before: a reused layer draws anew at each call."""
        self._calls[layer] += 1
        return self._calls[layer] - 1

    def draw_keys(self, layer: "QuantizableLayer", role: str, call: int, batch_size: int) -> Tensor:
        """One key per example for the rounding draws of a role in a layer: int64 `(B,)`."""
        ids = self.record_ids if self.record_ids is not None else torch.arange(batch_size)
        return row_keys(derive_key(self.key, layer.name, role, call), ids)

    def dense_weight(self, layer: "QuantizableLayer", weight: Tensor, size: tuple[int, int]) -> Tensor:
        """The layer's weight `(O, C / G, *taps)` for inputs of `size`, in their layout; made once."""
        geometry, taps = layer.geometry.cropped(size)
        if (layer, geometry) not in self._dense_weights:
            self._dense_weights[layer, geometry] = weight[:, :, *taps].contiguous(memory_format=torch.channels_last)
        return self._dense_weights[layer, geometry]

    def packed_weight(
        self, layer: "QuantizableLayer", recipe: Recipe, size: tuple[int, int], *, side: str
    ) -> PackedWeight:
        """Return the layer's quantized weight, packed for inputs of `size`; made once.

        Args:
          layer: whose weight.
          recipe: of the product.
          size: (H, W) of the layer's input.
          side: whose channels the product keeps, and may have a scale each: `output` (forward) or `input` (dgrad).
        """
        kept = side if recipe.weight.per_channel else ""
        geometry, taps = layer.geometry.cropped(size)
        if (layer, recipe, kept, geometry) not in self._packed:
            weight = self._quantized_weight(layer, recipe.weight, kept)
            cropped = dataclasses.replace(weight, codes=weight.codes[:, :, *taps].contiguous())
            packed = layer.backend.pack(cropped, geometry, max_code=recipe.max_code)
            self._packed[layer, recipe, kept, geometry] = packed
        return self._packed[layer, recipe, kept, geometry]

    def _quantized_weight(self, layer: "QuantizableLayer", role: RoleFormat, kept: str) -> QTensor:
        if (layer, role, kept) not in self._weights:
            self._weights[layer, role, kept] = layer.quantize_weight(self, role, kept)
        return self._weights[layer, role, kept]
