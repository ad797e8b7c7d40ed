# SPDX-License-Identifier: Apache-2.0
"""Which records take part in a step: each one by itself, with the same probability.

    record i is drawn  <=>  u_i < floor(q * 2^64),    u_i = the i-th 64 bits of the key's stream for (stream, step,
    attempt)

This is Poisson sampling, which the accounting assumes: inclusions are independent over records and over draws. The size
of a batch is random; nothing here truncates it, fills it up or draws again when it is empty. A draw has no state: it
does not depend on earlier draws, on threads or on how a batch is split. The attempt sets a repeated step apart: the
same records under fresh noise would be one release with less noise, not two that were each sampled.

Epsilon counts on nobody knowing who was drawn: the key is secret. Nothing here reads a record.

Symbols: q inclusion probability. Source: Abadi et al., arXiv 1607.00133, section 3.1.
"""

import math

import numpy as np
import torch
from torch import Tensor

from dpquant.errors import SettingError
from dpquant.privacy.secret import Keyed


class PoissonSampler(Keyed):
    """Independent inclusions, as a function of a secret key and of what the draw is for."""

    def draw(self, num_records: int, sample_rate: float, *, stream: str, step: int, attempt: int) -> Tensor:
        """The records of one Poisson batch.

        Args:
          num_records: records 0 .. num_records - 1 may be drawn.
          sample_rate: q, in (0, 1]. The probability realised is floor(q * 2^64) / 2^64: never more than q.
          stream: what the draw is for; draws of different streams are independent.
          step: which of the stream's steps.
          attempt: another number for every time that the step is drawn for.
        Returns: int64 `(B,)`, ascending; B is random, may be 0, and is private.
        Raises:
          SettingError: num_records or sample_rate out of range.
        Privacy: per example, reads no record.
        """
        if num_records < 0:
            raise SettingError(
                f"Expected num_records >= 0; got num_records={num_records}. Records are counted from 0. "
                "Pass the length of the data set."
            )
        if not 0 < sample_rate <= 1:
            raise SettingError(
                f"Expected sample_rate in (0, 1]; got sample_rate={sample_rate}. It is a probability. "
                "Pass the expected batch size divided by a public data set size."
            )
        threshold = int(math.ldexp(sample_rate, 64))  # exact: ldexp only moves the exponent
        draws = self._key.stream("sampling", stream, step, attempt).words(num_records)
        return torch.from_numpy(np.flatnonzero(draws < threshold))  # numpy compares with 2^64 correctly
