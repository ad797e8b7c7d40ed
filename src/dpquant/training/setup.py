# SPDX-License-Identifier: Apache-2.0
"""Model, optimizer, plan and policy of a run, as one value."""

import dataclasses

import torch

from dpquant.checks.isolation import Findings
from dpquant.privacy.plan import PrivacyPlan
from dpquant.training.policies import Policy
from dpquant.training.steps import Steps


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Setup:
    """Parts of a run that stay the same while it goes on, except for the parameters and the optimizer's state.

    Attributes:
      optimizer: of the model's trainable parameters.
      steps: take its steps, on one process or on several.
      plan: the privacy settings.
      policy: chooses the layers that run quantized.
      seed: seed of the layer schedule; public.
      found: findings of the isolation check; their objective is the prepared model and its loss.
      lengths: that records may have, ascending, where they come in groups of equal length; public.
      step_seconds: time of a step on synthetic records; public.
    """

    optimizer: torch.optim.Optimizer
    steps: Steps
    plan: PrivacyPlan
    policy: Policy
    seed: int
    found: Findings
    lengths: tuple[int, ...] = ()
    step_seconds: float = 0.0
