# SPDX-License-Identifier: Apache-2.0
"""The step context of checks: weights are quantized and packed once for many passes, as long as they stay the same."""

import dataclasses

from torch import Tensor

from dpquant.backends.interface import PackedWeight
from dpquant.engine.context import StepContext
from dpquant.engine.quantizable import WeightProduct
from dpquant.formats import Recipe


@dataclasses.dataclass(kw_only=True, eq=False)
class TrialStep(StepContext):
    """A step context that packs a weight anew when the layer has another one, or when it was written to.

    A step of a run packs a weight once, whatever happens to it during the step. A check must not: a model that sets
    its weights from its input would go unseen. Writing through `.data` is not noticed here, so the comparisons in full
    precision take a new `StepContext` for every pass.
    """

    _packed_from: dict[WeightProduct, tuple[int, int]] = dataclasses.field(default_factory=dict)

    def dense_weight(self, layer: WeightProduct, weight: Tensor, size: tuple[int, int]) -> Tensor:
        self._forget_if_changed(layer)
        return super().dense_weight(layer, weight, size)

    def packed_weight(self, layer: WeightProduct, recipe: Recipe, size: tuple[int, int], *, side: str) -> PackedWeight:
        self._forget_if_changed(layer)
        return super().packed_weight(layer, recipe, size, side=side)

    def _forget_if_changed(self, layer: WeightProduct) -> None:
        now = layer.weight.data_ptr(), layer.weight._version
        if self._packed_from.setdefault(layer, now) != now:
            self.forget(layer)
            self._packed_from[layer] = now
