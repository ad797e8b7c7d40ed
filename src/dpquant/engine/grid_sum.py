# SPDX-License-Identifier: Apache-2.0
"""The sum of clipped per-example gradients in integers: each example's is rounded to a grid, and integers are added.

    k_i = trunc(c_i G_i / grid),   sum_i k_i in int64,   ||k_i|| grid <= C

A sum of floats depends in its last bits on order and on company, so that one record can move it by more than C. A sum
of integers does not: it is exact, in any order, on any number of processes. Every k_i is a vector of length at most
C / grid, because rounding towards zero lengthens nothing; so one record moves the sum by at most C / grid, exactly. (An
int64 that overflowed would wrap around, which is a function of the exact sum, so that noise added to it hides as much.)

k_i has to depend on record i alone, to the last bit. With one example a pass it does, since nothing of another record
is there. With more it does not: the last bits of a float32 product depend on the row in which an example stands, and so
on how many others come before it (`tests/invariants/test_porosity.py` shows it). Runs pass records one by one.

G_i is materialised and its norm is taken of the same values, in float64: squares of float32 values are exact there, and
a sum of D of them has a relative error of at most D 2^-53, which `ROUND_OFF` covers up to D = 2^35.

Symbols: B examples, G_i the whole gradient of example i, c_i its clip factor, C clip norm.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from dpquant.backends.algebra import ROUND_OFF
from dpquant.backends.precision import ieee_float32
from dpquant.engine.batches import Microbatch
from dpquant.engine.clip import ClippedSum
from dpquant.engine.context import StepContext
from dpquant.engine.contributions import Contribution, rows_or_zero
from dpquant.engine.layers import running
from dpquant.engine.listening import taping
from dpquant.engine.passes import Objective, Passes
from dpquant.engine.tape import check_examples_first


def grid_sum_of(
    objective: Objective,
    pieces: Iterable[Microbatch],
    *,
    max_grad_norm: float,
    grid: float,
    key: int,
    leaves_out: bool = False,
) -> ClippedSum:
    """Return the sum of per-example gradients, each clipped to `max_grad_norm` and rounded to multiples of `grid`.

    Args:
      objective: model and loss.
      pieces: microbatches of one size; of one example, if the bound has to hold to the last bit.
      max_grad_norm: the clipping norm C.
      grid: the step of the grid, in units of the gradient; C / grid has to be below 2^53.
      key: of the step's draws, from `clip.step_key`.
      leaves_out: as for `clip.clipped_sum_of`.
    Returns: int64 sums of integers. A parameter that no microbatch reached has zeros, as has an example whose gradient
      is not finite.
    Privacy: per example. No noise is added here, and no event is charged.
    """
    model, trainable = objective.model, objective.trainable()
    totals = {name: torch.zeros(p.shape, dtype=torch.int64, device=p.device) for name, p in trainable.items()}
    with taping(model, trainable, forming=False) as tape, running(model, StepContext(key=key, tape=tape)) as run:
        for kept in Passes(objective, run, tape).over_pieces(pieces, leaves_out=leaves_out):
            if kept is not None:
                _add_rounded(totals, tape.contributions(), kept, max_grad_norm, grid)
        tape.settle()
    return ClippedSum(grads=totals, sensitivity=float(max_grad_norm), grid=grid)


@ieee_float32()
def _add_rounded(
    totals: dict[str, Tensor], parts: dict[str, Contribution], piece: Microbatch, max_grad_norm: float, grid: float
) -> None:
    """Add the integers of the rows that count to the totals."""
    gradients = {name: part.per_example() for name, part in parts.items()}
    squares = {name: squares_of(gradient) for name, gradient in gradients.items()}
    check_examples_first(squares, len(piece.record_ids))
    if not squares:
        return
    factors_B = grid_factors(torch.stack(list(squares.values())).sum(0), max_grad_norm, grid)
    factors_B[piece.num_examples :] = 0
    for name, gradient in gradients.items():
        totals[name] += rounded_sum(gradient, factors_B)


def squares_of(gradients: Tensor) -> Tensor:
    """Return the squared norms, float64 `(B,)`, of float32 `(B, ...)`, summed in float64."""
    rows = gradients.reshape(len(gradients), -1)
    return torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).square()


def grid_factors(squared_norms_B: Tensor, max_norm: float, grid: float) -> Tensor:
    """Return c_i / grid, float64 `(B,)`, rounded down; 0 where the norm is not finite."""
    factors_B = (max_norm / squared_norms_B.sqrt()).clamp(max=1) * ((1 - ROUND_OFF) / grid)
    return rows_or_zero(squared_norms_B.isfinite(), factors_B)


def rounded_sum(vectors: Tensor, factors_B: Tensor) -> Tensor:
    """Return the sum of factors times vectors, each rounded towards zero to integers.

    Args:
      vectors: float32 or float64 `(B, ...)`; those with factor 0 may hold anything.
      factors_B: float64 `(B,)`, from `grid_factors`.
    Returns: int64 `(...)`.
    Privacy: per example.
    """
    scaled = vectors * factors_B.view(-1, *[1] * (vectors.ndim - 1))  # float64; only 0 times a broken one is not finite
    integers = scaled.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0).to(torch.int64)
    return integers[0] if len(integers) == 1 else integers.sum(0)
