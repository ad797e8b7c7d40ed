# SPDX-License-Identifier: Apache-2.0
"""The forms of a layer's weight that its products take: quantized, packed, cropped.

A step context keeps those of a trainable weight for one step. Those of a frozen weight are kept by the layer itself for
the whole run, so that a frozen layer quantizes and packs nothing after its first step.
"""

import dataclasses
from typing import Any

from torch import Tensor

from dpquant.backends.geometry import Geometry
from dpquant.backends.interface import PackedWeight
from dpquant.backends.qtensor import QTensor
from dpquant.formats import Recipe, RoleFormat


@dataclasses.dataclass(eq=False)
class WeightCache:
    """Forms of one layer's weight.

    Attributes:
      quantized: {(format, channels with a scale each): codes}.
      dense: {geometry: the weight cropped for it}.
      packed: {(recipe, channels with a scale each, geometry): codes packed by the backend}.
    """

    quantized: dict[tuple[RoleFormat, str], QTensor] = dataclasses.field(default_factory=dict)
    dense: dict[Geometry, Tensor] = dataclasses.field(default_factory=dict)
    packed: dict[tuple[Recipe, str, Geometry], PackedWeight] = dataclasses.field(default_factory=dict)
    _state: tuple[int, int] | None = None

    def of(self, weight: Tensor) -> "WeightCache":
        """Return the cache, emptied if the weight is another one or was written to since the last call.

        A write through `weight.data` into the same memory is not seen.
        """
        state = (weight.data_ptr(), weight._version)
        if state != self._state:
            for forms in (self.quantized, self.dense, self.packed):
                forms.clear()
            self._state = state
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "WeightCache":
        return WeightCache()  # the copy's weight is another one

    def __reduce__(self) -> tuple[type["WeightCache"], tuple[()]]:
        return WeightCache, ()  # packed weights are of this machine
