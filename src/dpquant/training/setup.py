# SPDX-License-Identifier: Apache-2.0
"""What travels together through the start of a run and into it."""

import dataclasses

import torch

from dpquant.checks.isolation import Findings
from dpquant.privacy.plan import PrivacyPlan
from dpquant.training.policies import Policy


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Setup:
    """What a run trains, and by which rules. Nothing of it changes while the run goes on but what the optimizer moves.

    Attributes:
      optimizer: of the model's trainable parameters.
      plan: the privacy settings.
      policy: which layers run quantized.
      seed: of the schedule; public.
      found: of the isolation check; its objective is the prepared model and the loss.
    """

    optimizer: torch.optim.Optimizer
    plan: PrivacyPlan
    policy: Policy
    seed: int
    found: Findings
