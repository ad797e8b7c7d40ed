# SPDX-License-Identifier: Apache-2.0
"""The sum of clipped per-example gradients of a model, from one forward and one backward pass.

The norm that is clipped must be the norm of what is summed. A second backward pass would redraw the stochastic
rounding, so there is none: layers leave their operands on a tape, every example's squared norm is taken from those,
then the clipped sum from the same operands (book-keeping; Bu et al., arXiv 2210.00038; `engine/contributions.py` has
the algebra).

Trainable parameters are detached while the passes run (`engine/tape.py`): no gradient that is not clipped ever exists
on the model. An example whose gradient is not finite contributes exactly zero.

Symbols: B examples, O output channels, C clip norm, G_i the whole gradient of example i, c_i its clip factor.
"""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dpquant.backends.algebra import ROUND_OFF
from dpquant.backends.malloc import working_memory
from dpquant.engine.batches import Microbatch, check_rows, microbatches
from dpquant.engine.clock import Clock
from dpquant.engine.context import StepContext
from dpquant.engine.layers import quantizable_layers, running
from dpquant.engine.passes import Objective, Passes, PerExampleLoss
from dpquant.engine.tape import GradientTape, taping
from dpquant.errors import ModelError, SettingError
from dpquant.rounding import derive_key

_SMALLEST_NORMAL = torch.finfo(torch.float32).tiny  # below it, rounding to float32 could double a factor

MICROBATCH = 128
"""Examples a backward pass, by default. On two networks of three it is within 2 % of the best of 64, 128 and 256; where
weights outweigh activations (ResNet18 on 32x32 images) 256 takes 15 % less. A run measures its own."""


@dataclasses.dataclass(frozen=True)
class ClippedSum:
    """A sum over examples of clipped gradients, before noise.

    Attributes:
      grads: {parameter name: float32 tensor of the parameter's shape}.
      sensitivity: L2 norm by which adding or removing one record can change `grads` as one vector.
    Privacy: reads private data and is not private itself; release it only through noise of std proportional to
      `sensitivity`.
    """

    grads: dict[str, Tensor]
    sensitivity: float


def clipped_sum(
    model: nn.Module,
    loss_fn: PerExampleLoss,
    batch: Any,
    *,
    max_grad_norm: float,
    record_ids: Tensor,
    step: int,
    seed: int,
    microbatch_size: int = MICROBATCH,
    clock: Clock | None = None,
) -> ClippedSum:
    """The sum over a batch of per-example gradients, each scaled to at most `max_grad_norm`.

    Example i's contribution depends on the model, on its own record and on its own draws (rounding, dropout), which are
    fixed by (seed, step, record id): on nothing else. So the sum over any two batches that differ in one record, the
    others keeping their ids, differs by at most `max_grad_norm`. Where ids are positions and a record is removed, the
    others' ids move: then the same bound needs draws that nobody knows, that is a secret seed (`engine/randomness.py`).
    Every microbatch has the same size, filled up where need be, so that an example's own contribution does not depend
    on how many others there are. Another size changes memory and time, and the last bits of every sum; where layers run
    quantized after others that do not, a last bit can become another code.

    Args:
      model: a prepared model (`dpquant.prepare`), trainable privately (`check_trainable`).
      loss_fn: `(model, batch) -> Tensor (B,)`, the loss of each example.
      batch: tensors whose first axis is the example, or tuples, lists and mappings of them.
      max_grad_norm: C > 0.
      record_ids: int64 `(B,)`: the identity of each example.
      step: the logical step; another step draws anew.
      seed: of the draws; secret wherever record ids can move.
      microbatch_size: examples a backward pass. Fewer examples are filled up, so that their number changes nothing.
      clock: if given, gets each layer's seconds: its three products, quantization included, and its norm and sum.
    Returns: ClippedSum with sensitivity C; zeros for an empty batch.
    Raises:
      SettingError: an argument out of range, or a loss that is not one number per example.
      DataError: a tensor of the batch has not one row for each record id.
      ModelError: a parameter's per-example gradients cannot be computed.
    Privacy: per example; no noise is added here.
    Source: Abadi et al., arXiv 1607.00133, Algorithm 1 (clipping); algorithm of DPQuant, arXiv 2509.03472.
    """
    if not (isinstance(max_grad_norm, int | float) and 0 < max_grad_norm < math.inf):
        raise SettingError(
            f"Expected max_grad_norm > 0 and finite; got max_grad_norm={max_grad_norm}. Without a bound there is no "
            "sensitivity. Pass the clipping norm C."
        )
    if microbatch_size < 1:
        raise SettingError(f"Expected microbatch_size >= 1; got microbatch_size={microbatch_size}.")
    if not quantizable_layers(model) and any(type(m) in (nn.Conv2d, nn.Linear) for m in model.modules()):
        raise ModelError("Expected a prepared model; got one without quantizable layers. Call dpquant.prepare(model).")
    pieces: Iterable[Microbatch] = ()
    if len(record_ids) > 0:
        check_rows(batch, len(record_ids))
        pieces = microbatches(batch, record_ids, microbatch_size)
    objective, key = Objective(model, loss_fn), step_key(seed, step)
    with working_memory():
        return clipped_sum_of(objective, pieces, max_grad_norm=max_grad_norm, key=key, clock=clock)


def step_key(seed: int, step: int) -> int:
    """The key of all draws of a logical step: as secret as the seed is."""
    return derive_key(seed, "step", step)


def clipped_sum_of(
    objective: Objective,
    pieces: Iterable[Microbatch],
    *,
    max_grad_norm: float,
    key: int,
    leaves_out: bool = False,
    complete: bool = True,
    clock: Clock | None = None,
) -> ClippedSum:
    """`clipped_sum` of microbatches that exist already, or are read when their turn comes.

    Args:
      objective: model and loss.
      pieces: microbatches of one size.
      max_grad_norm: as of `clipped_sum`.
      key: of the step's draws, from `step_key`.
      leaves_out: a record on which model or loss raise contributes nothing, silently, since an error would tell about
        it. Otherwise what they raise is passed on.
      complete: a parameter that no microbatch reached is an error. Otherwise its sum is zero, as in a step in which its
        layer is dropped at random.
      clock: as of `clipped_sum`.
    """
    model, trainable = objective.model, objective.trainable()
    with (
        taping(model, trainable, clock=clock) as tape,
        running(model, StepContext(key=key, tape=tape, clock=clock)) as run,
    ):
        passes = Passes(objective, run, tape)
        found = False
        for piece in pieces:
            found = True
            kept = passes.over_sound_rows(piece) if leaves_out else passes.over_all_rows(piece)
            if kept is not None:
                _add_clipped(tape, max_grad_norm, len(kept.record_ids), kept.num_examples)
        return ClippedSum(grads=tape.totals(trainable, complete and found), sensitivity=float(max_grad_norm))


def _add_clipped(tape: GradientTape, max_grad_norm: float, size: int, num_examples: int) -> None:
    """Add sum_i c_i G_i of the microbatch of `size` on the tape to its totals; its first `num_examples` count."""
    parts = tape.contributions()
    if not parts:
        return
    factors_B, finite_B = clip_factors(tape.squared_norms(parts, size), max_grad_norm)
    factors_B[num_examples:] = 0
    if not finite_B.all():
        rows = finite_B.nonzero().flatten()
        parts = {name: part.take(rows) for name, part in parts.items()}
        factors_B = factors_B[rows]
    tape.add_up(parts, factors_B)


def clip_factors(squared_norms_B: Tensor, max_grad_norm: float) -> tuple[Tensor, Tensor]:
    """c_i = min(1, C / ||G_i||), rounded down to float32, and which examples are finite.

    Args:
      squared_norms_B: float64 `(B,)`.
      max_grad_norm: C.
    Returns: c_i float32 `(B,)`, 0 for an example that is not finite; finite, bool `(B,)`.
    """
    finite_B = squared_norms_B.isfinite()
    norms_B = squared_norms_B.clamp(min=0).sqrt()
    factors_B = torch.where(norms_B > max_grad_norm, max_grad_norm / norms_B, 1.0) * (1 - ROUND_OFF)
    factors_B = torch.where(finite_B & (factors_B >= _SMALLEST_NORMAL), factors_B, 0.0)
    return factors_B.float(), finite_B
