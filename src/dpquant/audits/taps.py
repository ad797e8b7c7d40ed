# SPDX-License-Identifier: Apache-2.0
"""Tap canaries: the law of a run's noised sums, measured through `PrivateTraining` and compared with its ledger.

The model has a tap for each canary: a parameter that only this canary's loss contains, K times. K is so large that the
canary's clipped gradient is C times its tap, whatever the other layers do. A fair coin decides whether the canary is in
the data set. A step's noised sum then has in each tap

    N(0, sigma^2 C^2) + C where the canary was drawn, which has probability q if it is in the data set

independently for all taps: thousands of observations of sampling, clipping, noise and normaliser in one short run. The
numbers sigma and q are read from the events that the run has charged, C and the normaliser from its plan. So a run that
charges less than it does is found, whichever of its parts is wrong. The taps are in full precision, as biases are; the
other layers, which every gradient passes, may be quantized.

No private record is read: images and labels are random.

Symbols: m canaries, T steps, q sample rate, sigma noise multiplier, C clip norm.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpquant.audits.bounds import Floats, normal_p_value, normal_power, variance_p_value, variance_power, variance_z
from dpquant.errors import LedgerError
from dpquant.privacy.events import Event
from dpquant.privacy.plan import PrivacyPlan
from dpquant.training.policies import AllPolicy, NonePolicy
from dpquant.training.private import PrivateTraining
from dpquant.training.start import make_private

Start = Callable[..., PrivateTraining]
"""Starts a run, with the arguments of `make_private`."""

_WEIGHT = 1e5  # K, over C: gradients of the other layers are of the order of 1
_SIDE, _CLASSES, _OTHERS = 6, 4, 64


class Collating(torch.utils.data.TensorDataset):
    """Records in memory that are read many at a time."""

    def dpquant_batch(self, record_ids: Tensor) -> tuple[Tensor, ...]:
        """Return the rows of these records."""
        return tuple(tensor[record_ids] for tensor in self.tensors)


class Tapped(nn.Module):
    """A small convolutional network with a tap for each canary, and one more for all records that are none."""

    def __init__(self, canaries: int):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, _CLASSES))
        self.taps = nn.Embedding(canaries + 1, 1)

    def forward(self, images: Tensor, canary: Tensor) -> tuple[Tensor, Tensor]:
        return self.body(images), self.taps(canary).squeeze(1)


@dataclasses.dataclass(frozen=True)
class Tapping:
    """What is measured, with what.

    Attributes:
      plan: of the run. Its analyses are left out.
      canaries: m.
      format: of the network's layers; None: in full precision.
      seed: of the coins, the network and its images.
      backend: of the quantized layers. `auto` would leave layers as small as these in full precision.
    """

    plan: PrivacyPlan
    canaries: int
    format: str | None
    seed: int
    backend: str = "simulate"


@dataclasses.dataclass(frozen=True, eq=False)
class Sums:
    """Noised sums of a run, at its canaries' taps.

    Attributes:
      values: float64 `(T, m)`, in units of C.
      inside: bool `(m,)`, whether the canary was in the data set.
      event: what the run has charged.
    """

    values: Floats
    inside: np.ndarray
    event: Event


def tapped(tapping: Tapping, *, start: Start = make_private) -> Sums:
    """Train a tapped network through all steps of a plan and return its noised sums.

    Args:
      tapping: plan, number of canaries and format.
      start: starts the run.
    Raises:
      LedgerError: the run has charged something else than one kind of training step.
      DPQuantError: as `make_private`.
    Privacy: reads no private record. The plan's events are charged in memory.
    """
    plan, m = tapping.plan, tapping.canaries
    random = torch.Generator().manual_seed(tapping.seed)
    inside = torch.rand(m, generator=random) < 0.5
    canary = torch.cat([torch.arange(m)[inside], torch.full((_OTHERS,), m)])
    images = torch.randn(len(canary), 1, _SIDE, _SIDE, generator=random)
    labels = torch.randint(_CLASSES, (len(canary),), generator=random)
    records = Collating(images, labels, canary)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(tapping.seed)
        model = Tapped(m)
    weight = _WEIGHT * plan.max_grad_norm

    def loss_fn(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
        logits, taps = model(batch[0], batch[2])
        pull = taps + weight * (taps - taps.detach())  # K in the gradient alone: in the loss it would hide all else
        return F.cross_entropy(logits, batch[1], reduction="none") + torch.where(batch[2] < m, pull, 0.0)

    options: dict[str, Any] = {"policy": NonePolicy()}
    if tapping.format is not None:
        options = {"policy": AllPolicy(), "format": tapping.format, "backend": tapping.backend}
    private = start(
        model,
        torch.optim.SGD(model.parameters(), lr=1e-3),
        records,
        loss_fn=loss_fn,
        plan=plan,
        example=[(torch.randn(1, _SIDE, _SIDE, generator=random), torch.tensor(n), torch.tensor(n)) for n in range(3)],
        microbatch_size=256,
        **options,
    )
    values = []
    for epoch in private.epochs():
        for batch in epoch:
            private.step(batch)
            grad = model.taps.weight.grad
            assert grad is not None, "a step gives every parameter a gradient"
            values.append(grad[:m, 0].double().numpy() * (plan.expected_batch_size / plan.max_grad_norm))
    events = private.events()
    if [event.kind for event in events] != ["train"]:
        raise LedgerError(f"Expected charges of training steps alone; got {len(events)} kinds of events.")
    return Sums(np.stack(values), inside.numpy(), events[0])


@dataclasses.dataclass(frozen=True, kw_only=True)
class TapFound:
    """What the sums of a run say about its noise and its contributions.

    Attributes:
      format: of the network's layers; None: full precision.
      canaries, steps: m and T.
      noise_claimed, noise_measured: noise over sensitivity, as charged and as measured.
      contribution_claimed, contribution_measured: mean of a canary's contributions to a sum, in units of C: q.
      noise_z, contribution_z: by how many standard errors what was measured exceeds what was claimed: the variance, and
        the contribution.
      noise_p, contribution_p: p-values, two-sided.
      steps_p: 0 if another number of steps was charged than were taken, else 1.
      power: chance that a fault would be found at the level: {"noise halved": ..., "contribution doubled": ...}.
    """

    format: str | None
    canaries: int
    steps: int
    noise_claimed: float
    noise_measured: float
    contribution_claimed: float
    contribution_measured: float
    noise_z: float
    contribution_z: float
    noise_p: float
    contribution_p: float
    steps_p: float
    power: dict[str, float]

    def p_values(self) -> list[float]:
        """Return the p-values of all tests."""
        return [self.noise_p, self.contribution_p, self.steps_p]


def moments(sums: Sums, *, format: str | None, alpha: float) -> TapFound:
    """Compare variance and mean of a run's noised sums with what it has charged.

    Args:
      sums: of the run.
      format: for the result.
      alpha: level of a single test, for its power.
    """
    (steps, canaries), inside = sums.values.shape, sums.inside
    sigma, q = sums.event.noise_multiplier, sums.event.sample_rate
    totals = sums.values.sum(0)
    outside = totals[~inside]
    # from the variance of a canary that is in the data set: its draws, too
    error = math.sqrt(steps * sigma**2 / len(outside) + steps * (sigma**2 + q * (1 - q)) / int(inside.sum()))
    difference = float(totals[inside].mean() - outside.mean())
    z = (difference - steps * q) / error
    return TapFound(
        format=format,
        canaries=canaries,
        steps=steps,
        noise_claimed=sigma,
        noise_measured=math.sqrt(float(np.square(outside).mean()) / steps),
        contribution_claimed=q,
        contribution_measured=difference / steps,
        noise_z=variance_z(outside, steps * sigma**2),
        contribution_z=z,
        noise_p=variance_p_value(outside, steps * sigma**2),
        contribution_p=normal_p_value(z),
        steps_p=float(sums.event.count == steps),
        power={
            "noise halved": variance_power(len(outside), 0.25, alpha),
            "contribution doubled": normal_power(steps * q / error, alpha),
        },
    )
