# SPDX-License-Identifier: Apache-2.0
"""Measures how a step's time grows with its examples, for `dpquant plan --world-size`."""

import datetime

import torch

from dpquant.app.synthetic import Synthetic
from dpquant.engine.batches import Microbatch, to_device
from dpquant.engine.layers import set_policy, set_precisions
from dpquant.engine.passes import Objective, PerExampleLoss
from dpquant.machine import now
from dpquant.runs.settings import TrainSettings, policy_of
from dpquant.training.private import PrivateTraining
from dpquant.training.scaling import StepTimes
from dpquant.training.sums import step_sum

_ROUNDS = 3  # of which the best counts


def step_times(
    settings: TrainSettings, private: PrivateTraining, synthetic: Synthetic, loss_fn: PerExampleLoss, step: float
) -> StepTimes:
    """Return the line that a step's time follows, from sums of the batch and of a quarter of it, timed in turn.

    Args:
      settings: of the assessment.
      private: the run on synthetic records, whose epochs are over.
      synthetic: the records.
      loss_fn: their loss.
      step: seconds of a whole step of the batch.
    """
    execution, found = private.execution, Objective(private.model, loss_fn)
    layers = policy_of(settings).choose(private.macs, None, epoch=0, key=0, excluded=execution.excluded_layers)
    set_precisions(private.model, execution.precisions(private.macs, layers))
    many = len(synthetic)
    few, size = max(many // 4, 1), min(execution.microbatch_size, max(many // 4, 1))
    device = next(private.model.parameters()).device
    piece = Microbatch(to_device(synthetic.first(size), device), torch.arange(size), size)
    seconds: dict[int, list[float]] = {few: [], many: []}
    for _ in range(_ROUNDS):
        for examples, times in seconds.items():
            pieces = [piece] * max(round(examples / size), 1)
            began = now()
            step_sum(found, pieces, private.plan, 0, leaves_out=False)
            times.append((now() - began) * examples / (len(pieces) * size))
    set_policy(private.model, ())
    return StepTimes.through(
        (few, min(seconds[few])),
        (many, min(seconds[many])),
        values=sum(p.numel() for p in private.model.parameters() if p.requires_grad),
        source=f"measured on this machine on {datetime.date.today():%Y-%m-%d}, {torch.get_num_threads()} threads",
        whole=step,
    )
