# SPDX-License-Identifier: Apache-2.0
"""Poisson sampling: each record takes part in a step independently, with the same probability.

    record i is drawn  <=>  u_i < floor(q * 2^64),    u_i = the i-th 64 bits of the key's stream for (stream, step,
    attempt)

The accounting assumes Poisson sampling: inclusions are independent over records and over draws. The size of a batch is
random; a batch is never truncated, filled up, or drawn again because it is empty. A draw has no state: it does not
depend on earlier draws, on threads, or on how a batch is split. A step that is repeated takes another attempt and so
draws other records. The same records with fresh noise would be one release with less noise, not two releases that were
each sampled.

Epsilon is valid only if nobody knows who was drawn, so the key is secret. Nothing here reads a record.

Symbols: q inclusion probability. Source: Abadi et al., arXiv 1607.00133, section 3.1.
"""

import math

import numpy as np
import torch
from torch import Tensor

from dpquant.errors import SettingError
from dpquant.privacy.secret import Keyed


class PoissonSampler(Keyed):
    """Poisson batches as a function of a secret key and of the stream, step and attempt that they are for."""

    def draw(self, num_records: int, sample_rate: float, *, stream: str, step: int, attempt: int) -> Tensor:
        """Return the records of one Poisson batch.

        Args:
          num_records: size of the data set; records 0 .. num_records - 1 may be drawn.
          sample_rate: q, in (0, 1]. The exact probability is floor(q * 2^64) / 2^64, which is never more than q.
          stream: purpose of the draw, `train` or `analysis` in a run; different streams are independent.
          step: number of the step within the stream.
          attempt: number of the attempt, different each time a batch is drawn for the same step.
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
        return torch.from_numpy(np.flatnonzero(draws < threshold))  # numpy compares uint64 with 2^64 correctly (q = 1)
