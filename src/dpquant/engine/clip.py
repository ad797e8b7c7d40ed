# SPDX-License-Identifier: Apache-2.0
"""The sum of clipped per-example gradients of a model, from one forward and one backward pass per microbatch.

The clip factor must be computed from the norm of exactly those gradients that are summed. A second backward pass would
redraw the stochastic rounding and give other gradients. So layers record the operands of their weight gradients on a
tape during the one backward pass; the squared norm of each example and the clipped sum are both computed from these
operands (book-keeping; Bu et al., arXiv 2210.00038; `engine/contributions.py` has the algebra).

Trainable parameters are detached while the passes run (`engine/tape.py`), so the model never holds an unclipped
gradient. An example whose gradient is not finite contributes exactly zero.

Symbols: B examples, O output channels, C clip norm, G_i the whole gradient of example i, c_i its clip factor.
"""

import dataclasses
import math
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dpquant.backends.algebra import ROUND_OFF
from dpquant.backends.malloc import working_memory
from dpquant.engine.batches import Microbatch, check_rows, microbatches
from dpquant.engine.clock import Clock
from dpquant.engine.context import StepContext
from dpquant.engine.layers import quantizable_layers, quantizable_twin, running
from dpquant.engine.leaves import Routes
from dpquant.engine.listening import taping
from dpquant.engine.passes import Objective, Passes, PerExampleLoss
from dpquant.engine.tape import GradientTape
from dpquant.engine.unrouted import Unrouted
from dpquant.errors import ModelError, SettingError, expect
from dpquant.rounding import derive_key

_SMALLEST_NORMAL = torch.finfo(torch.float32).tiny  # rounding a smaller factor to float32 could double it

MICROBATCH = 128
"""Default number of examples per microbatch. When it was chosen, three networks were timed at 64, 128 and 256: 128 was
within 2 % of the best on two; on the third, whose weights outweigh its activations (ResNet18 on 32x32 images), 256 took
15 % less time. A run measures its own size (`training/tuning.py`)."""


@dataclasses.dataclass(frozen=True)
class ClippedSum:
    """The sum over examples of clipped gradients, before noise.

    Attributes:
      grads: {parameter name: float32 tensor of the parameter's shape; int64 if there is a grid}.
      sensitivity: upper bound on the L2 norm of the change of `grads`, as one vector, when one record is added or
        removed; in units of the gradient.
      grid: what 1 in `grads` stands for, in units of the gradient; None if they are gradients themselves.
    Privacy: computed from private data and not private itself. Release it only after adding noise whose standard
      deviation is proportional to `sensitivity`.
    """

    grads: dict[str, Tensor]
    sensitivity: float
    grid: float | None = None


def clipped_sum(
    model: nn.Module,
    loss_fn: PerExampleLoss,
    batch: Any,
    *,
    max_grad_norm: float,
    record_ids: Tensor,
    step: int,
    seed: int,
    microbatch_size: int | None = None,
    clock: Clock | None = None,
) -> ClippedSum:
    """Return the sum over a batch of per-example gradients, each scaled to a norm of at most `max_grad_norm`.

    Example i's contribution depends only on the model, on its own record and on its own draws (rounding, dropout), and
    the draws are fixed by (seed, step, record id). Hence the sums over two batches that differ in one record differ by
    at most `max_grad_norm` if the other records keep their ids. If ids are positions, removing a record moves the ids
    of the records after it; the bound then holds for a secret seed only (`engine/randomness.py` has the argument).

    All microbatches have the same size (the last one is padded), so an example's contribution does not depend on how
    many other examples there are. Another microbatch size changes memory, time and the last bits of every sum. Where a
    quantized layer follows one in full precision, a different last bit can give a different code.

    The first call on a model finds out on a few of the batch's rows how gradients of parameters beside its layers are
    got (class tokens, positions), and keeps that on the model (`engine/leaves.py`). A run does it on synthetic records.

    Args:
      model: a prepared model (`dpquant.prepare`) that can be trained privately (`check_trainable`).
      loss_fn: `(model, batch) -> Tensor (B,)`, the loss of each example.
      batch: tensors whose first axis is the example, or tuples, lists and mappings of them.
      max_grad_norm: the clipping norm C > 0.
      record_ids: int64 `(B,)`, the identity of each example.
      step: the logical step. Each step has its own draws.
      seed: seeds the draws. Keep it secret if record ids can move.
      microbatch_size: examples per forward and backward pass; None means 128. Smaller batches are padded to it.
      clock: if given, receives each layer's seconds: its three products, quantization included, its norm and its sum.
    Returns: a ClippedSum with sensitivity C; zeros for an empty batch.
    Raises:
      SettingError: an argument is out of range, or the loss is not one number per example.
      DataError: a tensor of the batch does not have one row for each record id.
      ModelError: a parameter's per-example gradients cannot be computed.
    Privacy: per example. No noise is added here, and no event is charged.
    Source: Abadi et al., arXiv 1607.00133, Algorithm 1 (clipping); algorithm of DPQuant, arXiv 2509.03472.
    """
    if not (isinstance(max_grad_norm, int | float) and 0 < max_grad_norm < math.inf):
        raise SettingError(
            f"Expected max_grad_norm > 0 and finite; got max_grad_norm={max_grad_norm}. Without a bound there is no "
            "sensitivity. Pass the clipping norm C."
        )
    todo = "Number the batch's rows, as torch.arange(len(inputs))"
    expect("record_ids", record_ids, Tensor, "a tensor of int64", todo)
    size = MICROBATCH if microbatch_size is None else microbatch_size
    if size < 1:
        raise SettingError(f"Expected microbatch_size >= 1; got microbatch_size={microbatch_size}.")
    if not quantizable_layers(model) and any(
        quantizable_twin(type(m)) and not Routes.of(model).within(path) for path, m in model.named_modules()
    ):
        raise ModelError("Expected a prepared model; got one without quantizable layers. Call dpquant.prepare(model).")
    record_ids = record_ids.cpu()  # which rows belong together is decided there
    objective, key = Objective(model, loss_fn), step_key(seed, step)
    sum_of = partial(clipped_sum_of, objective, max_grad_norm=max_grad_norm, key=key, clock=clock)
    with working_memory():
        if len(record_ids) == 0:
            return sum_of(())
        check_rows(batch, len(record_ids))
        objective.learn(first := next(microbatches(batch, record_ids, size)))
        objective.try_routes(first, key)
        while True:
            try:
                return sum_of(microbatches(batch, record_ids, size))
            except Unrouted as error:
                if not objective.learn_of(first, error):
                    raise


def step_key(seed: int, step: int) -> int:
    """Return the 64-bit key of all draws of a logical step. It is as secret as the seed."""
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
    """Return what `clipped_sum` returns, for microbatches that are given or produced one after the other.

    Args:
      objective: model and loss.
      pieces: microbatches of one size.
      max_grad_norm: the clipping norm C.
      key: of the step's draws, from `step_key`.
      leaves_out: True: a record on which the model or the loss raises contributes zero and no error is shown, because
        an error would reveal that the record was drawn. False: the exception propagates.
      complete: True: a parameter that no microbatch reached is an error. False: its sum is zero, as in a step in which
        its layer is dropped at random.
      clock: as in `clipped_sum`.
    Privacy: per example. No noise is added here, and no event is charged.
    """
    model, trainable = objective.model, objective.trainable()
    with (
        taping(model, trainable, clock=clock) as tape,
        running(model, StepContext(key=key, tape=tape, clock=clock)) as run,
    ):
        found = False
        for kept in Passes(objective, run, tape).over_pieces(pieces, leaves_out=leaves_out):
            found = True
            if kept is not None:
                add_clipped(tape, max_grad_norm, len(kept.record_ids), kept.num_examples)
        return ClippedSum(grads=tape.totals(trainable, complete and found), sensitivity=float(max_grad_norm))


def add_clipped(tape: GradientTape, max_grad_norm: float, size: int, num_examples: int) -> None:
    """Add sum_i c_i G_i of the microbatch on the tape to the totals. The first `num_examples` of `size` rows count."""
    parts = tape.contributions()
    if not parts:
        return
    factors_B, finite_B = clip_factors(tape.squared_norms(parts, size), max_grad_norm)
    if num_examples < size:
        factors_B[num_examples:] = 0
    if finite_B.device.type != "cpu":  # a GPU would have to be waited for to tell whether all are
        for name, part in parts.items():
            tape.add_up({name: part.masked(finite_B)}, factors_B)
        return
    if not finite_B.all():
        rows = finite_B.nonzero().flatten()
        parts = {name: part.take(rows) for name, part in parts.items()}
        factors_B = factors_B[rows]
    tape.add_up(parts, factors_B)


def clip_factors(squared_norms_B: Tensor, max_grad_norm: float) -> tuple[Tensor, Tensor]:
    """Return the clip factors c_i = min(1, C / ||G_i||), rounded down, and which examples have a finite norm.

    Args:
      squared_norms_B: ||G_i||^2, float64 `(B,)`.
      max_grad_norm: the clipping norm C.
    Returns: c_i, float32 `(B,)`, 0 where the norm is not finite; bool `(B,)`, True where it is finite.
    Privacy: per example.
    """
    finite_B = squared_norms_B.isfinite()
    norms_B = squared_norms_B.clamp(min=0).sqrt()
    factors_B = (max_grad_norm / norms_B).clamp(max=1) * (1 - ROUND_OFF)
    factors_B = torch.where(finite_B & (factors_B >= _SMALLEST_NORMAL), factors_B, 0.0)
    return factors_B.float(), finite_B
