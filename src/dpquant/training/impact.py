# SPDX-License-Identifier: Apache-2.0
"""Impact of quantizing each layer: per-example impact vectors, clipped and summed over a batch.

A policy p quantizes some layers; here each policy quantizes one layer alone. For example i, the mean over rounding
repeats of

    v_i[p] = loss_i(model with p quantized) - loss_i(model in full precision)       score "loss", the paper's
    v_i[p] = 1 - cosine(gradient of loss_i with p quantized, in full precision)     score "gradient"

is its impact vector v_i, and the sum is over clip_C(v_i). The loss depends on the forward product only. The gradient's
direction, which is what remains of a gradient once it is clipped, depends on all three products. Each v_i depends on
the public model, on record i and on the record's own roundings, so adding or removing one record moves the sum by at
most C. The paper clips the aggregated vector instead, which has sensitivity 2 C: two vectors in a ball of radius C can
be 2 C apart. (The paper calls this quantity "loss sensitivity"; here `sensitivity` is the privacy bound and nothing
else.) Nothing here updates the model. Parameters, buffers, modes, precisions and random streams are left bitwise
unchanged.

Symbols: B examples, P policies, C clipping norm, v impact. Source: DPQuant, arXiv 2509.03472, with the correction
above; the gradient score is our own.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from dpquant.checks.probe import left_as_it_was
from dpquant.engine.batches import Microbatch
from dpquant.engine.clip import clip_factors
from dpquant.engine.context import Replay, StepContext
from dpquant.engine.contributions import Contribution, rows_or_zero
from dpquant.engine.grid_sum import grid_factors, rounded_sum
from dpquant.engine.layers import (
    quantizable_layers,
    running,
    set_policy,
)
from dpquant.engine.passes import Objective, caused_by_records, copies, gradients_of_rows
from dpquant.engine.randomness import seeded
from dpquant.errors import SettingError
from dpquant.privacy.analysis_plan import Score
from dpquant.rounding import derive_key


@dataclasses.dataclass(frozen=True)
class ImpactSum:
    """A sum over examples of clipped impact vectors, before noise.

    Attributes:
      impacts: float64 `(P,)`, in units of the score, in the order of the names given; int64 if there is a grid.
      sensitivity: largest L2 norm by which adding or removing one record can change `impacts`, in units of the score.
      grid: what 1 in `impacts` stands for, in units of the score; None if they are impacts themselves.
    Privacy: computed from private data, and not private itself.
    """

    impacts: Tensor
    sensitivity: float
    grid: float | None = None


def impact_sum(
    objective: Objective,
    pieces: Iterable[Microbatch],
    *,
    names: Sequence[str],
    max_norm: float,
    keys: Sequence[int],
    score: Score = "loss",
    grid: float | None = None,
) -> ImpactSum:
    """Sum per-example impact vectors over a batch, each clipped to norm `max_norm`.

    The model runs in evaluation mode, without dropout. The loss score needs forward passes only. The pass that
    quantizes a layer reuses the full-precision outputs of all layers before it, which saves half of the products on
    average. The gradient score needs a forward and a backward pass for each policy. A record on which model or loss
    raise contributes nothing and raises nothing, because an error would reveal that it is there.

    Args:
      objective: a prepared model and its loss.
      pieces: microbatches of one size; without any, the sum is zero.
      names: layers, one policy for each.
      max_norm: C > 0, in units of the score.
      keys: keys of the roundings, from `analysis_keys`. Impacts are averaged over them before clipping.
      score: `loss` or `gradient`.
      grid: if given, each clipped vector is rounded to its multiples, as in `engine/grid_sum.py`.
    Returns: ImpactSum with sensitivity `max_norm`. An example whose impact vector is not finite contributes zero.
    Raises:
      SettingError: an argument out of range, or a name that is not a quantizable layer.
    Privacy: per example; no noise is added here.
    """
    if not 0 < max_norm < math.inf:
        raise SettingError(f"Expected max_norm > 0 and finite; got max_norm={max_norm}.")
    if not keys:
        raise SettingError("Expected at least one of keys; got none. Impacts are averaged over them.")
    if unknown := [name for name in names if name not in quantizable_layers(objective.model)]:
        raise SettingError(
            f"Expected names of quantizable layers; got {unknown[0]!r}. Call dpquant.prepare(model) first."
        )
    vectors = {"loss": impact_vectors, "gradient": gradient_impact_vectors}[score]
    total = None
    for piece in pieces:
        v_BP = _of_sound_rows(lambda piece: vectors(objective, piece, names, keys), piece, len(names))
        if grid is None:
            factors_B, finite_B = clip_factors(v_BP.square().sum(1), max_norm)
            finite_B[piece.num_examples :] = False
            clipped = factors_B.mul(finite_B).double() @ rows_or_zero(finite_B, v_BP)
        else:
            factors_B = grid_factors(v_BP.square().sum(1), max_norm, grid)
            factors_B[piece.num_examples :] = 0
            clipped = rounded_sum(v_BP, factors_B)
        total = clipped if total is None else total + clipped
    dtype = torch.float64 if grid is None else torch.int64
    impacts = torch.zeros(len(names), dtype=dtype) if total is None else total.cpu()
    return ImpactSum(impacts=impacts, sensitivity=float(max_norm), grid=grid)


def analysis_keys(seed: int, step: int, repeats: int = 1) -> list[int]:
    """Return the keys of an analysis' roundings, one for each repeat. They are as secret as the seed.

    Args:
      seed: an integer from which the keys are derived; secret in a private run.
      step: number of the analysis; each analysis has other keys.
      repeats: number of roundings that are averaged.
    """
    return [derive_key(seed, "analysis", step, repeat) for repeat in range(repeats)]


def _of_sound_rows(of: Callable[[Microbatch], Tensor], piece: Microbatch, width: int) -> Tensor:
    """Return the rows' vectors `(B, P)`, NaN for a row on which the model raises.

    If the model raises on the batch, each row is run alone, filled up with copies of itself, so that no other row
    decides whether it counts.
    """
    try:
        return of(piece)
    except Exception as error:
        if not caused_by_records(error):
            raise
    rows = []
    for row in range(len(piece.record_ids)):
        try:
            rows.append(of(copies(piece, row))[0])
        except Exception as error:
            if not caused_by_records(error):
                raise
            rows.append(None)
    known = next((row for row in rows if row is not None), torch.empty(width, dtype=torch.float64))
    return torch.stack([torch.full_like(known, math.nan) if row is None else row for row in rows])


def impact_vectors(objective: Objective, piece: Microbatch, names: Sequence[str], keys: Sequence[int]) -> Tensor:
    """Compute each example's impacts v on its loss, without clipping.

    Args: as for `impact_sum`, with one microbatch.
    Returns: float64 `(B, P)`.
    Privacy: per example and unbounded.
    """
    layers, replay = quantizable_layers(objective.model), Replay()

    def losses(key: int, policy: Sequence[str]) -> Tensor:
        def forward() -> Tensor:
            if policy:
                replay.rewind(layers[policy[0]])
            else:
                replay.remember()
            with running(objective.model, StepContext(key=key, record_ids=piece.record_ids, replay=replay)):
                return objective.losses(piece).double()

        set_policy(objective.model, policy)
        with seeded(key):
            return drawing.by_record(forward, key, piece.record_ids)

    drawing = objective.drawing.unknown()  # evaluation mode may draw differently than training
    with _undisturbed(objective.model), torch.no_grad():
        full_precision_B = losses(keys[0], ())
        v_BP = full_precision_B.new_zeros(len(piece.record_ids), len(names))
        for column, name in enumerate(names):
            for key in keys:
                v_BP[:, column] += (losses(key, (name,)) - full_precision_B) / len(keys)
    return v_BP


def gradient_impact_vectors(
    objective: Objective, piece: Microbatch, names: Sequence[str], keys: Sequence[int]
) -> Tensor:
    """Compute each example's impacts v on the direction of its gradient, without clipping.

    Args: as for `impact_sum`, with one microbatch.
    Returns: float64 `(B, P)`, in [0, 2]; NaN where a gradient is zero or not finite.
    Privacy: per example; bounded only by the range of the cosine.
    """
    evaluated = dataclasses.replace(
        objective, drawing=objective.drawing.unknown()
    )  # evaluation mode may draw differently than training
    whole = dataclasses.replace(piece, num_examples=len(piece.record_ids))

    def gradients(key: int, policy: Sequence[str]) -> dict[str, Contribution]:
        set_policy(objective.model, policy)
        return gradients_of_rows(evaluated, whole, StepContext(key=key)).parts

    def inner_products(a: dict[str, Contribution], b: dict[str, Contribution]) -> Tensor:
        shared = [a[name].inner_products(b[name]).double() for name in a if name in b]
        return torch.stack(shared).sum(0) if shared else torch.zeros(len(piece.record_ids), dtype=torch.float64)

    with _undisturbed(objective.model), torch.enable_grad():
        full_precision = gradients(keys[0], ())
        squares_B = inner_products(full_precision, full_precision)
        v_BP = squares_B.new_zeros(len(piece.record_ids), len(names))
        for column, name in enumerate(names):
            for key in keys:
                quantized = gradients(key, (name,))
                lengths_B = (squares_B * inner_products(quantized, quantized)).sqrt()
                v_BP[:, column] += (1 - inner_products(full_precision, quantized) / lengths_B) / len(keys)
    return v_BP


@contextlib.contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode within the block; afterwards restore its modes and precisions."""
    with left_as_it_was(model):
        model.eval()
        yield
