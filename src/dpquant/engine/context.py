# SPDX-License-Identifier: Apache-2.0
"""The context of one logical step: rounding key, current record ids, gradient tape and the caches of packed weights.

`layers.running` attaches the context to the layers of a model.
"""

import collections
import dataclasses
import weakref
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

from dpquant.backends.interface import Backend, PackedWeight
from dpquant.backends.qtensor import QTensor
from dpquant.engine.clock import Clock
from dpquant.engine.contributions import Materialised
from dpquant.engine.unrouted import ElsewhereFirst
from dpquant.engine.weight_cache import WeightCache
from dpquant.formats import Recipe, RoleFormat, Rounding
from dpquant.rounding import derive_key, row_keys

if TYPE_CHECKING:
    from dpquant.engine.quantizable import WeightProduct

_FROZEN_KEY = 0  # of the rounding draws of frozen weights, which are public

Twin = TypeVar("Twin", bound=nn.Module)


def twin_of(kind: type[Twin], module: nn.Module, **attributes: Any) -> Twin:
    """Return a module of class `kind` that shares all attributes of `module` (parameters, hooks), plus `attributes`."""
    twin = kind.__new__(kind)
    twin.__dict__.update(module.__dict__)
    for name, value in attributes.items():
        setattr(twin, name, value)
    return twin


class Tape(Protocol):
    """Receives per-example gradient operands from layers during the backward pass."""

    anchor: Tensor  # a scalar that requires a gradient, so that backward reaches layers whose parameters are detached
    listening: bool  # False while a module is evaluated again outside the model's forward pass

    def takes(self, parameter: Tensor | None) -> bool:
        """Return whether per-example gradients of a parameter are wanted: it is trained."""
        ...

    def add(self, parameter: Tensor, contribution: Materialised) -> None:
        """Take the per-example gradients of a parameter from one call of its module."""
        ...

    def record(self, layer: "WeightProduct", x: Tensor | QTensor | None, g: Tensor | QTensor, grad: Tensor) -> None:
        """Take the operands of one call: weight gradient scale_i sum_t g_it x_it^T, bias gradient sum_t grad_it.

        x is None if the weight is frozen.
        """
        ...


def anchor_for(tape: Tape | None, *parameters: Tensor | None) -> Tensor | None:
    """Return the tape's anchor for a layer of which a parameter is trained; else None: backward need not reach it."""
    return tape.anchor if tape is not None and any(map(tape.takes, parameters)) else None


class Replay:
    """Stores the outputs of quantizable layers in one forward pass and replays them in later passes, in call order.

    If a later pass differs from the stored one only from some layer on, the layers before it need not be computed.
    """

    def __init__(self):
        self._outputs: list[Tensor] = []
        self._first_call: dict[nn.Module, int] = {}
        self._position = 0
        self._until = 0
        self._remembering = False

    def remember(self) -> None:
        """Store the outputs of the next forward pass."""
        self._outputs, self._first_call = [], {}
        self._position, self._until, self._remembering = 0, 0, True

    def rewind(self, layer: nn.Module) -> None:
        """Replay stored outputs in the next forward pass, for all calls before the first call of `layer`."""
        self._position, self._remembering = 0, False
        self._until = self._first_call.get(layer, len(self._outputs))

    def stored(self) -> Tensor | None:
        """Return a copy (callers work in place) of the next call's stored output, or None if it must be computed."""
        self._position += 1
        known = not self._remembering and self._position <= self._until
        return self._outputs[self._position - 1].clone() if known else None

    def store(self, layer: nn.Module, output: Tensor) -> None:
        """Store the output of the last call if this pass is being stored."""
        if self._remembering:
            self._first_call.setdefault(layer, len(self._outputs))
            self._outputs.append(output.clone())


class SharedCodes:
    """Codes of the last inputs, for layers that read the same tensor: projections of an attention, and their adapters.

    They are those of a role that rounds to nearest, which draws nothing: all layers give a tensor the same codes. The
    tensors themselves are not kept alive. A write through `.data` between two layers is not seen.
    """

    _KEPT = 2  # inputs: between two projections an adapter reads another one

    def __init__(self):
        self._last: list[tuple[weakref.ref[Tensor], Hashable, QTensor]] = []

    def clear(self) -> None:
        self._last = []

    def of(self, source: Tensor, x: Tensor, role: RoleFormat, backend: Backend, ids: Tensor) -> QTensor:
        """Return the codes of a map, quantized now unless a layer has quantized the same one.

        Args:
          source: the tensor that the layer was called with; while it lives, no other tensor is taken for it.
          x: the map `(B, C, H, W)`, a view of it.
          role: format of the codes.
          backend: quantizes them.
          ids: int64 `(B,)`, in place of keys, as nothing is drawn.
        """
        # a write to the source in between changes its version; shape and strides say how it is read as a map
        key = (source._version, x.shape, x.stride(), role, backend)
        for known, its_key, codes in self._last:
            if known() is source and its_key == key:
                return codes
        codes = backend.quantize(x, role, ids)
        alive = [one for one in self._last if one[0]() is not None]
        self._last = [*alive[1 - self._KEPT :], (weakref.ref(source), key, codes)]
        return codes


@dataclasses.dataclass(kw_only=True, eq=False)
class StepContext:
    """Context of one logical step: rounding key, current record ids, gradient tape and packed-weight cache.

    Attributes:
      key: 64 bits. Together with layer, role, call and record id it fixes every rounding draw of the step.
      record_ids: int64 `(B,)`, of the current microbatch; None = 0..B-1.
      tape: receives the operands of per-example gradients; None = ordinary autograd.
      replay: stores or replays layer outputs; None = compute every layer.
      clock: times each layer's products; None = no timing.
      phase: under a tape, `forward` while the losses are computed and `backward` while they are differentiated.
      elsewhere: names of the weights of layers that were called with something else than examples on the first axis.
    """

    key: int
    record_ids: Tensor | None = None
    tape: Tape | None = None
    replay: Replay | None = None
    clock: Clock | None = None
    phase: Literal["forward", "backward"] | None = None
    elsewhere: set[str] = dataclasses.field(default_factory=set)
    _weights: dict[Any, WeightCache] = dataclasses.field(default_factory=dict)
    _calls: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    _shared: SharedCodes = dataclasses.field(default_factory=SharedCodes)

    def begin(self, record_ids: Tensor) -> None:
        """Begin the next microbatch. Packed weights are kept."""
        self.record_ids = record_ids
        self._calls.clear()
        self._shared.clear()
        if self.clock is not None:
            self.clock.begin()

    def next_call(self, layer: nn.Module) -> int:
        """Count a call of `layer` on this microbatch; return its number from 0, which selects the rounding draws."""
        self._calls[layer] += 1
        return self._calls[layer] - 1

    def draw_keys(self, layer: "WeightProduct", role: str, call: int, batch_size: int) -> Tensor:
        """Return one key per example, int64 `(B,)` on the layer's device, for the draws of one role in one call."""
        if len(ids := self._ids(layer, batch_size)) != batch_size:
            raise ElsewhereFirst([f"{layer.name}.weight"])
        return row_keys(derive_key(self.key, layer.name, role, call), ids)

    def codes(
        self, layer: "WeightProduct", role: Literal["activation", "gradient"], call: int, source: Tensor, x: Tensor,
        wanted: RoleFormat,
    ) -> QTensor:  # fmt: skip
        """Quantize an operand of a layer's products, with the layer's own draws.

        Args:
          layer: the layer.
          role: of the operand.
          call: number of the layer's call, which selects the draws.
          source: the tensor that the operand came in.
          x: the same as a map `(B, C, H, W)`.
          wanted: format, rounding and scale.
        """
        if wanted.rounding is Rounding.NEAREST:
            return self._shared.of(source, x, wanted, layer.backend, self._ids(layer, len(x)))
        return layer.backend.quantize(x, wanted, self.draw_keys(layer, role, call, len(x)))

    def _ids(self, layer: "WeightProduct", batch_size: int) -> Tensor:
        device = layer.weight.device
        if self.record_ids is None:
            self.record_ids = torch.arange(batch_size)
        if self.record_ids.device != device:  # copied once a microbatch
            self.record_ids = self.record_ids.to(device, non_blocking=True)
        return self.record_ids

    def trains(self, parameter: Tensor | None) -> bool:
        """Return whether gradients of a layer's parameter are wanted. None, a bias that is not there, has none."""
        if self.tape is not None:  # which has detached the parameters
            return self.tape.takes(parameter)
        return parameter is not None and parameter.requires_grad

    def weight_key(self, layer: "WeightProduct") -> int:
        """Return the key of the draws that round the layer's weight: the step's, or one for a whole run if frozen."""
        return self.key if self.trains(layer.weight) else _FROZEN_KEY

    def cache(self, layer: "WeightProduct") -> WeightCache:
        """Return the forms of the layer's weight: for this step or, of a frozen weight, for the run."""
        if self.trains(layer.weight):
            return self._weights.setdefault(layer, WeightCache())
        return layer.frozen.of(layer.weight)

    def dense_weight(self, layer: "WeightProduct", weight: Tensor, size: tuple[int, int]) -> Tensor:
        """Return the weight cropped for inputs of `size`, `(O, C / G, *taps)`, channels last; cached."""
        geometry, taps = layer.geometry.cropped(size)
        dense = self.cache(layer).dense
        if geometry not in dense:
            dense[geometry] = weight[:, :, *taps].contiguous(memory_format=torch.channels_last)
        return dense[geometry]

    def packed_weight(
        self, layer: "WeightProduct", recipe: Recipe, size: tuple[int, int], *, side: str
    ) -> PackedWeight:
        """Return the layer's quantized weight, packed for inputs of `size`; cached.

        Args:
          layer: the layer whose weight is packed.
          recipe: of the product.
          size: (H, W) of the layer's input.
          side: the weight's channel axis that the product does not sum over, `output` (forward) or `input` (dgrad).
            Per-channel scales are scales of these channels.
        """
        kept = side if recipe.weight.per_channel else ""
        geometry, taps = layer.geometry.cropped(size)
        packed, key = self.cache(layer).packed, (recipe, kept, geometry)  # hashed once: it takes a while
        if (found := packed.get(key)) is None:
            weight = self._quantized_weight(layer, recipe.weight, kept)
            cropped = weight.rearranged(lambda part: part[:, :, *taps].contiguous())
            found = packed[key] = layer.backend.pack(cropped, geometry, max_code=recipe.max_code)
        return found

    def _quantized_weight(self, layer: "WeightProduct", role: RoleFormat, kept: str) -> QTensor:
        quantized = self.cache(layer).quantized
        if (role, kept) not in quantized:
            quantized[role, kept] = layer.quantize_weight(self, role, kept)
        return quantized[role, kept]
