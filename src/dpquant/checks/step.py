# SPDX-License-Identifier: Apache-2.0
"""The step context of checks: weights are quantized and packed once for many passes, as long as they stay the same."""

import dataclasses

from dpquant.engine.context import StepContext
from dpquant.engine.layers import QuantizableLayer
from dpquant.engine.weight_cache import WeightCache


@dataclasses.dataclass(kw_only=True, eq=False)
class TrialStep(StepContext):
    """A step context that packs a weight anew when the layer has another one, or when it was written to.

    A step of a run packs a trainable weight once, whatever happens to it during the step. A check must not: a model
    that sets its weights from its input would go unseen. Writing through `.data` is not noticed here, so the
    comparisons in full precision take a new `StepContext` for every pass.
    """

    def cache(self, layer: QuantizableLayer) -> WeightCache:
        return super().cache(layer).of(layer.weight)
