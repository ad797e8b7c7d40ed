# SPDX-License-Identifier: Apache-2.0
"""The step context of checks: weights are quantized and packed once for many passes, as long as they stay the same."""

import dataclasses

import torch
from torch import Tensor, nn

from dpquant.backends.interface import PackedWeight
from dpquant.engine.context import StepContext
from dpquant.engine.layers import QuantizableLayer
from dpquant.formats import Recipe


@dataclasses.dataclass(kw_only=True, eq=False)
class TrialStep(StepContext):
    """A step context that keeps a packed weight only while the layer's weight is the one that was packed.

    A step of a run packs a weight once, whatever happens to it during the step. A check must not: a model that sets
    its weights from its input would go unseen.
    """

    _sources: dict[nn.Module, Tensor] = dataclasses.field(default_factory=dict)

    def dense_weight(self, layer: QuantizableLayer, weight: Tensor, size: tuple[int, int]) -> Tensor:
        self._forget_if_changed(layer)
        return super().dense_weight(layer, weight, size)

    def packed_weight(
        self, layer: QuantizableLayer, recipe: Recipe, size: tuple[int, int], *, side: str
    ) -> PackedWeight:
        self._forget_if_changed(layer)
        return super().packed_weight(layer, recipe, size, side=side)

    def _forget_if_changed(self, layer: QuantizableLayer) -> None:
        weight, source = layer.weight.detach(), self._sources.get(layer)
        if source is None or source.dtype != weight.dtype or not torch.equal(source, weight):
            self.forget(layer)
            self._sources[layer] = weight.clone()
