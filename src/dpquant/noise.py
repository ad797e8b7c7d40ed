# SPDX-License-Identifier: Apache-2.0
"""Gaussian noise of a given standard deviation, from a secret key.

    noise = float32(std * z),    z: float64 standard normals from the key's stream for (stream, step, attempt, name)

Every tensor of every step and attempt has a stream of its own: noise drawn twice could be subtracted. What the standard
deviation has to be is the plan's business; nothing here knows of clipping or of epsilon.

Not guaranteed: the proof is about real numbers. Floating-point noise has gaps, and which values a float32 sum can take
depends on what the noise was added to; somebody who reads the last bits of a released gradient can use that (Mironov
2012, "On significance of the least significant bits for differential privacy"; Jin et al., arXiv 2112.05307). Drawing
and scaling in float64 does not close this hole. Nor is the time that a draw takes constant.

Source: Gaussian mechanism: Dwork and Roth 2014, "The algorithmic foundations of differential privacy", appendix A.
"""

from collections.abc import Sequence
from typing import Self

import numpy as np
import torch
from torch import Tensor

from dpquant.errors import SettingError
from dpquant.keys import SecretKey

SMALLEST_STD, LARGEST_STD = 2.0**-100, 2.0**100  # between them float32 neither flushes noise to zero nor overflows


class NoiseSource:
    """Gaussian noise, as a function of a secret key and of what it is for."""

    def __init__(self, key: SecretKey | None = None):
        """A source with its own key; None makes a fresh one."""
        self._key = SecretKey() if key is None else key

    @classmethod
    def from_seed(cls, seed: int) -> Self:
        """A source whose noise can be repeated, for research. NOT PRIVATE."""
        return cls(SecretKey.from_seed(seed))

    @property
    def secure(self) -> bool:
        """False if the noise follows from a seed that a person chose."""
        return self._key.secure

    def gaussian(self, shape: Sequence[int], std: float, *, stream: str, step: int, attempt: int, name: str) -> Tensor:
        """Independent N(0, std^2) entries.

        Args:
          shape: of the result.
          std: in units of what the noise is added to: noise multiplier times sensitivity.
          stream: what the noise is for, as for the sampler.
          step: which of the stream's steps.
          attempt: another number for every time that the step is taken.
          name: the tensor that the noise is for, unique in its step.
        Returns: float32 of that shape, on the CPU; the same for the same key and arguments.
        Raises:
          SettingError: std is not in [2^-100, 2^100].
        Privacy: reads no data. Privacy rests on these values: add each to one sum, once, and release nothing else of
        them.
        """
        if not SMALLEST_STD <= std <= LARGEST_STD:
            raise SettingError(
                f"Expected std in [2^-100, 2^100]; got std={std}. Outside, float32 noise is zero or infinite. "
                "Choose another noise_multiplier or clip norm."
            )
        generator = np.random.Generator(self._key.stream("noise", stream, step, attempt, name))
        noise = std * np.asarray(generator.standard_normal(tuple(shape)))
        return torch.from_numpy(np.asarray(noise, dtype=np.float32))
