# SPDX-License-Identifier: Apache-2.0
"""What travels together through the start of a run and into it."""

import dataclasses

import torch
from torch import nn

from dpquant.checks.isolation import Findings
from dpquant.engine.passes import PerExampleLoss
from dpquant.privacy.plan import PrivacyPlan
from dpquant.training.policies import Policy


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Setup:
    """What a run trains, and by which rules. Nothing of it changes while the run goes on but what the optimizer moves.

    Attributes:
      model: prepared.
      optimizer: of the model's trainable parameters.
      loss_fn: `(model, batch) -> Tensor (B,)`.
      plan: the privacy settings.
      policy: which layers run quantized.
      seed: of the schedule; public.
      found: of the isolation check.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss_fn: PerExampleLoss
    plan: PrivacyPlan
    policy: Policy
    seed: int
    found: Findings
