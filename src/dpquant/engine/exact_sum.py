# SPDX-License-Identifier: Apache-2.0
"""The sum of clipped per-example gradients, exact over microbatches: each microbatch's sum is rounded to a grid.

    S_m = sum over microbatch m of c_i G_i, float32     k_m = round(S_m / grid),   grid = C / 2^40     sum_m k_m, int64

Integers add up to the same in any order. So the total depends on how a batch is cut into microbatches, and not on which
process sums which of them, nor on how many processes there are.

Rounding moves each value of S_m by half a grid step at most. Adding or removing a record changes the microbatches from
its own on, because the records after it move up. In the worst case each of M microbatches is then rounded the other
way, which moves the total of d values by M sqrt(d) grid, besides what the record contributes. So records are clipped to
C (1 - 2^-17), and M sqrt(d) grid is at most C 2^-17: `most_microbatches`. A run is refused if that does not hold for
64 microbatches more than four expected batches have; a batch that is larger has a probability below 2^-200.

A sum overflows if it exceeds 2^23 C in one value, for which more than 8 million records have to be in one batch.

Symbols: C clip norm, M microbatches, d values of all parameters, m number of a microbatch, c_i clip factor.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from dpquant.engine.batches import Microbatch
from dpquant.engine.clip import ClippedSum, add_clipped
from dpquant.engine.context import StepContext
from dpquant.engine.layers import running
from dpquant.engine.listening import taping
from dpquant.engine.passes import Objective, Passes
from dpquant.errors import SettingError

_BITS = 40
_MARGIN = 2.0**-17  # of the clipping norm, left for rounding
LARGEST_BATCH = 2**20  # expected examples; eight times as many could overflow


def exact_grid(max_norm: float) -> float:
    """Return the grid of exact sums of vectors of at most this norm, in their units; exact."""
    return math.ldexp(max_norm, -_BITS)


def most_microbatches(num_values: int) -> float:
    """Return the largest number of microbatches whose rounding stays within the margin, for so many values."""
    return _MARGIN * 2**_BITS / math.sqrt(max(num_values, 1))


def check_exact(num_values: int, expected_batch_size: float, microbatch_size: int) -> None:
    """Refuse exact sums of so many values if rounding could use up the margin, or a sum overflow.

    Raises:
      SettingError: the batches are too large, or have too many microbatches.
    """
    expected = math.ceil(expected_batch_size / microbatch_size)
    if expected_batch_size > LARGEST_BATCH:
        raise SettingError(
            f"Expected batches of at most {LARGEST_BATCH} examples with exact_sums; got {expected_batch_size:g}. Their "
            "sum would not fit into 64 bits. Leave exact_sums out."
        )
    if 4 * expected + 64 > most_microbatches(num_values):
        raise SettingError(
            f"Expected larger microbatches with exact_sums; got {expected} of {microbatch_size} in a batch. The sum of "
            "each is rounded, which clipping has to make up for. Give a larger microbatch_size, or leave exact_sums "
            "out."
        )


def exact_sum_of(
    objective: Objective,
    pieces: Iterable[Microbatch],
    *,
    max_grad_norm: float,
    key: int,
    leaves_out: bool = False,
) -> ClippedSum:
    """Return the sum of per-example gradients, clipped to `max_grad_norm`, as integers on a grid.

    Args: as for `clip.clipped_sum_of`.
    Returns: int64 sums of integers. A parameter that no microbatch reached has zeros, as has an example whose gradient
      is not finite.
    Privacy: per example. No noise is added here, and no event is charged.
    """
    model, trainable, grid = objective.model, objective.trainable(), exact_grid(max_grad_norm)
    totals = {name: torch.zeros(p.shape, dtype=torch.int64, device=p.device) for name, p in trainable.items()}
    with taping(model, trainable) as tape, running(model, StepContext(key=key, tape=tape)) as run:
        for kept in Passes(objective, run, tape).over_pieces(pieces, leaves_out=leaves_out):
            if kept is not None:
                add_clipped(tape, max_grad_norm * (1 - _MARGIN), len(kept.record_ids), kept.num_examples)
                for name, total in tape.taken_totals().items():
                    totals[name] += on_grid(total, grid)
        tape.settle()
    return ClippedSum(grads=totals, sensitivity=float(max_grad_norm), grid=grid)


def on_grid(total: Tensor, grid: float) -> Tensor:
    """Return a float32 or float64 tensor in multiples of a grid, rounded to the nearest, int64."""
    return (total.double() / grid).round_().to(torch.int64)
