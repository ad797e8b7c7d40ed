# SPDX-License-Identifier: Apache-2.0
"""What a layer's quantization costs: the impact vector of a batch, clipped per example and summed.

For example i and policy p (by default: one policy per quantizable layer, that layer alone quantized), the mean over
rounding repeats of

    v_i[p] = loss_i(model with p quantized) - loss_i(model in full precision)       score "loss", the paper's
    v_i[p] = 1 - cosine(gradient of loss_i with p quantized, in full precision)     score "gradient"

and the sum is over clip_C(v_i). The loss sees the forward product only; the gradient's direction, which is what is left
of a gradient once it is clipped, sees all three. Each v_i depends on the public model, on record i and on its own
rounding draws, so adding or removing one record moves the sum by at most C. The paper clips the aggregated vector
instead, which has sensitivity 2 C: two vectors of a ball can be its diameter apart. (The paper calls this quantity
"loss sensitivity"; here `sensitivity` is the privacy bound and nothing else.) No model update happens inside;
parameters, buffers, modes, policy and random streams are left bitwise as they were.

Symbols: B examples, P policies, C clip norm, v impact. Source: DPQuant, arXiv 2509.03472, corrected as said above; the
gradient's score is our own.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dpquant.engine.batches import Microbatch, check_rows, microbatches
from dpquant.engine.clip import clip_factors
from dpquant.engine.context import Pass, Replay
from dpquant.engine.contributions import Contribution
from dpquant.engine.layers import (
    current_precisions,
    quantizable_layers,
    running,
    set_policy,
    set_precisions,
)
from dpquant.engine.passes import PerExampleLoss, caused_by_records, copies, gradients_of_rows, per_example_losses
from dpquant.engine.randomness import Drawing, drawn_by_record, seeded
from dpquant.errors import SettingError
from dpquant.privacy.plan import Score
from dpquant.rounding import derive_key


@dataclasses.dataclass(frozen=True)
class ImpactSum:
    """A sum over examples of clipped impact vectors, before noise.

    Attributes:
      impacts: float64 `(P,)`, in units of the loss, in the order of the names asked for.
      sensitivity: L2 norm by which adding or removing one record can change `impacts`.
    Privacy: reads private data and is not private itself.
    """

    impacts: Tensor
    sensitivity: float


def impact_sum(
    model: nn.Module,
    loss_fn: PerExampleLoss,
    batch: Any,
    *,
    names: Sequence[str],
    max_norm: float,
    record_ids: Tensor,
    step: int,
    seed: int,
    repeats: int = 1,
    microbatch_size: int = 64,
    score: Score = "loss",
) -> ImpactSum:
    """The sum over a batch of per-example impact vectors, each scaled to at most `max_norm`.

    In evaluation mode (no dropout). For the loss there are forward passes only, and the one that quantizes a layer
    takes everything before that layer from the full-precision pass: on average half of the products are computed. The
    gradient takes a forward and a backward pass for each policy.

    Args:
      model: a prepared model.
      loss_fn: `(model, batch) -> Tensor (B,)`.
      batch: as for `clipped_sum`.
      names: layers, one policy each.
      max_norm: C > 0, in units of the score.
      record_ids: int64 `(B,)`.
      step: the number of the analysis; another number draws other roundings.
      seed: of the rounding draws.
      repeats: rounding draws averaged before the clip.
      microbatch_size: examples a pass.
      score: what is compared, the loss or the gradient's direction.
    Returns: ImpactSum with sensitivity `max_norm`; zeros for an empty batch. An example with an impact that is not
    finite
      contributes zero.
    Raises:
      SettingError: an argument out of range, or a name that is not a quantizable layer.
    Privacy: per example; no noise is added here.
    """
    if not 0 < max_norm < math.inf:
        raise SettingError(f"Expected max_norm > 0 and finite; got max_norm={max_norm}.")
    if repeats < 1:
        raise SettingError(f"Expected repeats >= 1; got repeats={repeats}.")
    if unknown := [name for name in names if name not in quantizable_layers(model)]:
        raise SettingError(
            f"Expected names of quantizable layers; got {unknown[0]!r}. Call dpquant.prepare(model) first."
        )
    pieces: Iterable[Microbatch] = ()
    if len(record_ids) > 0:
        check_rows(batch, len(record_ids))
        pieces = microbatches(batch, record_ids, microbatch_size)
    return impact_sum_of(
        model, loss_fn, pieces, names=names, max_norm=max_norm, step=step, seed=seed, repeats=repeats, score=score
    )


def impact_sum_of(
    model: nn.Module,
    loss_fn: PerExampleLoss,
    pieces: Iterable[Microbatch],
    *,
    names: Sequence[str],
    max_norm: float,
    step: int,
    seed: int,
    repeats: int = 1,
    score: Score = "loss",
) -> ImpactSum:
    """`impact_sum` of microbatches that exist already, or are read when their turn comes.

    A record on which model or loss raises contributes nothing, silently: an error would tell about it.
    """
    vectors = {"loss": impact_vectors, "gradient": gradient_impact_vectors}[score]

    def of(piece: Microbatch) -> Tensor:
        return vectors(model, loss_fn, piece.data, names, piece.record_ids, step=step, seed=seed, repeats=repeats)

    total = torch.zeros(len(names), dtype=torch.float64)
    for piece in pieces:
        v_BP = _of_sound_rows(of, piece, len(names))
        factors_B, finite_B = clip_factors(v_BP.square().sum(1), max_norm)
        finite_B[piece.num_examples :] = False
        total += factors_B[finite_B].double() @ v_BP[finite_B]
    return ImpactSum(impacts=total, sensitivity=float(max_norm))


def _of_sound_rows(of: Callable[[Microbatch], Tensor], piece: Microbatch, width: int) -> Tensor:
    """The rows' vectors `(B, P)`; NaN for a row on which the model raises, which the row alone decides."""
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
    missing = torch.full((width,), math.nan, dtype=torch.float64)
    return torch.stack([missing if row is None else row for row in rows])


def impact_vectors(
    model: nn.Module,
    loss_fn: PerExampleLoss,
    batch: Any,
    names: Sequence[str],
    record_ids: Tensor,
    *,
    step: int,
    seed: int,
    repeats: int = 1,
) -> Tensor:
    """Each example's own impacts v on the loss, not clipped; arguments as of `impact_sum`, but for one microbatch.

    Returns: float64 `(B, P)`.
    Privacy: per example; reads private data, and nothing bounds it.
    """
    layers = quantizable_layers(model)
    replay, drawing = Replay(), Drawing()
    v_BP = torch.zeros(len(record_ids), len(names), dtype=torch.float64)

    def losses(repeat: int, policy: Sequence[str]) -> Tensor:
        key = derive_key(seed, "analysis", step, repeat)

        def forward() -> Tensor:
            if policy:
                replay.rewind(layers[policy[0]])
            else:
                replay.remember()
            with running(model, Pass(key=key, record_ids=record_ids, replay=replay)):
                return per_example_losses(loss_fn, model, batch, len(record_ids)).double().cpu()

        set_policy(model, policy)
        with seeded(key):
            return drawn_by_record(forward, key, record_ids, drawing)

    with _undisturbed(model), torch.no_grad():
        full_precision_B = losses(0, ())
        for column, name in enumerate(names):
            for repeat in range(repeats):
                v_BP[:, column] += (losses(repeat, (name,)) - full_precision_B) / repeats
    return v_BP


def gradient_impact_vectors(
    model: nn.Module,
    loss_fn: PerExampleLoss,
    batch: Any,
    names: Sequence[str],
    record_ids: Tensor,
    *,
    step: int,
    seed: int,
    repeats: int = 1,
) -> Tensor:
    """Each example's own impacts v on its gradient's direction; arguments as of `impact_vectors`.

    Returns: float64 `(B, P)`, in [0, 2]; NaN where a gradient is zero or not finite.
    Privacy: per example; reads private data, and nothing but the cosine's range bounds it.
    """
    piece, drawing = Microbatch(batch, record_ids, len(record_ids)), Drawing()

    def gradients(repeat: int, policy: Sequence[str]) -> dict[str, Contribution]:
        set_policy(model, policy)
        key = derive_key(seed, "analysis", step, repeat)
        return gradients_of_rows(model, loss_fn, piece, key=key, drawing=drawing).parts

    def inner_products(a: dict[str, Contribution], b: dict[str, Contribution]) -> Tensor:
        shared = [a[name].inner_products(b[name]).double() for name in a if name in b]
        return torch.stack(shared).sum(0) if shared else torch.zeros(len(record_ids), dtype=torch.float64)

    v_BP = torch.zeros(len(record_ids), len(names), dtype=torch.float64)
    with _undisturbed(model), torch.enable_grad():
        full_precision = gradients(0, ())
        squares_B = inner_products(full_precision, full_precision)
        for column, name in enumerate(names):
            for repeat in range(repeats):
                quantized = gradients(repeat, (name,))
                lengths_B = (squares_B * inner_products(quantized, quantized)).sqrt()
                v_BP[:, column] += (1 - inner_products(full_precision, quantized) / lengths_B).cpu() / repeats
    return v_BP


@contextlib.contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; modes and policy are given back as they were."""
    precisions, modes = current_precisions(model), {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        set_precisions(model, precisions)
        for module, training in modes.items():
            module.training = training
