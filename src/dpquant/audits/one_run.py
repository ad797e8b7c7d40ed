# SPDX-License-Identifier: Apache-2.0
"""An audit of a real training: canaries among its records, and an attacker who guesses from the trained model which.

The canaries are images of random black and white pixels with random labels, which nothing but having seen them can
predict. A fair coin decides for each whether it joins the training records. The run is otherwise that of the settings:
the same plan, model, policy and formats. The attacker knows the model before the training and after it, and scores a
canary by how far its loss has fallen. What such guesses say about epsilon is in `guesses.py`.

A trained model has no canaries in it, so the audit trains a copy, on the private records. The copy is charged to a
ledger of its own. It must not be released, and what the audit prints comes from it: whoever publishes that publishes a
release of the copy's epsilon, to be added to the run's.

The attack is weak: it sees two models, not the steps between, and canaries disturb each other. Its bound is far below
epsilon for an honest tool, and can be below it for a broken one.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dpquant.audits.guesses import (
    Guesses,
    ceiling,
    claim_p_value,
    detectable,
    epsilon_bound,
    gaussian_bound,
    guessed,
    mu_of,
    needed,
    power,
    profile_least,
)
from dpquant.audits.taps import Start
from dpquant.data.sizes import PACKED_PREFIX, TABLE_PREFIX, TEXT_PREFIX
from dpquant.data.split import Split
from dpquant.engine.batches import to_device
from dpquant.errors import SettingError
from dpquant.privacy import accounting
from dpquant.privacy.events import Event
from dpquant.runs.evaluation import EVALUATION_BATCH, evaluating, per_example_loss
from dpquant.runs.settings import TrainSettings
from dpquant.runs.sinks import Sink
from dpquant.runs.train import train
from dpquant.training.private import PrivateTraining
from dpquant.training.start import make_private

CONFIDENCE = 0.95
FEWEST, MOST = 20, 10_000  # canaries
_CURVE = 400  # points of the claimed curve


@dataclasses.dataclass(frozen=True, eq=False)
class Canaries:
    """Records whose part in a training is to be guessed.

    Attributes:
      pixels, targets: as of the data set, `(m, C, H, W)` and int64 `(m,)`.
      inside: bool `(m,)`, the coins.
    """

    pixels: Tensor
    targets: Tensor
    inside: Tensor

    @classmethod
    def for_records(cls, records: Split, num_classes: int, count: int, seed: int) -> "Canaries":
        """Toss the coins and draw the images. Uses the shape and the type of the records, and none of them."""
        random = torch.Generator().manual_seed(seed)
        pixels = torch.randint(2, (count, *records.pixels.shape[1:]), generator=random) * records.full_scale
        return cls(
            pixels=pixels.to(records.pixels.dtype),
            targets=torch.randint(num_classes, (count,), generator=random),
            inside=torch.rand(count, generator=random) < 0.5,
        )

    def among(self, records: Split) -> Split:
        """Return the records and, after them, the canaries whose coin says so."""
        return _like(
            records,
            torch.cat([records.pixels, self.pixels[self.inside]]),
            torch.cat([records.targets, self.targets[self.inside]]),
            torch.cat([records.readable, torch.ones(int(self.inside.sum()), dtype=torch.bool)]),
        )

    @torch.no_grad()
    def losses(self, model: nn.Module, records: Split) -> np.ndarray:
        """Return every canary's loss, float64 `(m,)`; one that is not finite is as large as a number can be."""
        own = _like(records, self.pixels, self.targets, torch.ones(len(self.targets), dtype=torch.bool))
        device, found = next(model.parameters()).device, []
        with evaluating(model):
            for ids in torch.arange(len(own)).split(EVALUATION_BATCH):
                found.append(per_example_loss(model, to_device(own.batch(ids), device)).double().cpu())
        return np.nan_to_num(torch.cat(found).numpy(), nan=math.inf)


def _like(records: Split, pixels: Tensor, targets: Tensor, readable: Tensor) -> Split:
    split = Split(pixels, targets, readable=readable, full_scale=records.full_scale)
    split.normalisation = records.normalisation
    return split


class Attacker:
    """Plants canaries into a training, as the `start` of a run, and scores them once it has ended.

    Args:
      count: m, number of canaries.
      seed: of the coins and the canaries.
      start: starts the run.
    Attributes:
      inside: bool `(m,)`, the coins.
    """

    def __init__(self, count: int, seed: int, start: Start = make_private):
        self._count, self._seed, self._start = count, seed, start

    def __call__(self, model: nn.Module, optimizer: torch.optim.Optimizer, records: Split, **options: Any) -> Any:
        """Start the run with the canaries among its records."""
        with torch.no_grad(), evaluating(model):
            blank = torch.zeros(1, *records.pixels.shape[1:], device=next(model.parameters()).device)
            num_classes = model(blank).shape[1]
        self._canaries, self._records = Canaries.for_records(records, num_classes, self._count, self._seed), records
        self._before = self._canaries.losses(model, records)
        self.private: PrivateTraining = self._start(model, optimizer, self._canaries.among(records), **options)
        return self.private

    @property
    def inside(self) -> np.ndarray:
        return self._canaries.inside.numpy()

    def scores(self) -> np.ndarray:
        """Return how far each canary's loss has fallen, `(m,)`. Privacy: post-processing of the trained parameters."""
        return self._before - self._canaries.losses(self.private.model, self._records)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OneRunFound:
    """What one training shows.

    Attributes:
      canaries: m.
      accuracy_test: of the copy.
      epsilon_claimed: of what the copy has charged, at `delta`; None: infinite.
      delta: of the plan.
      guesses: in each number that was tried, how many were right.
      epsilon_bound: lower bound on epsilon at 95 % confidence, whatever the mechanism (Steinke et al.).
      epsilon_bound_gaussian: the same for mechanisms with a Gaussian curve (Mahloujifar et al.).
      p_value: of the claimed mechanism's own curve.
      ceiling: no claim above this epsilon can be refuted with so many canaries, were all guesses right.
      detectable: true epsilon that the best attack would find nine times out of ten; None: none below the ceiling.
      power: chance that the best attack would find a fault: {"noise halved": ..., "epsilon doubled": ...}.
    """

    canaries: int
    accuracy_test: float
    epsilon_claimed: float | None
    delta: float
    guesses: list[Guesses]
    epsilon_bound: float
    epsilon_bound_gaussian: float
    p_value: float
    ceiling: float
    detectable: float | None
    power: dict[str, float]

    def p_values(self) -> list[float]:
        """Return the p-values of all tests."""
        return [self.p_value]


def check_images(settings: TrainSettings) -> None:
    """Check that a run is on images, as the canaries are.

    Raises:
      SettingError: it is not.
    """
    if settings.data.startswith((TABLE_PREFIX, TEXT_PREFIX, PACKED_PREFIX)):
        raise SettingError(
            f"Expected a run on images in memory; got data={settings.data}. Canaries are images. Give --mode tap or "
            "--mode game, which try the plan's numbers on the real code."
        )


def check_count(canaries: int, settings: TrainSettings, records: float) -> None:
    """Check that a training can have so many canaries: with more than records, it would not be that training.

    Args:
      canaries: m.
      settings: of the run.
      records: their number, as the plan takes it to be.
    Raises:
      SettingError: there are too few or too many.
    """
    most = min(MOST, round(records))
    if not FEWEST <= canaries <= most:
        raise SettingError(
            f"Expected canaries in {FEWEST} .. {most}; got canaries={canaries}. Fewer say nothing; more than there are "
            f"records of {settings.data} would be another training. Leave it out, or give a number in between."
        )


def one_run(
    settings: TrainSettings,
    out: Path,
    *,
    attacker: Attacker,
    alpha: float,
    command: str = "",
    sinks: Sequence[Sink] = (),
) -> OneRunFound:
    """Train a copy of a run with canaries among its records, guess which, and return what the guesses say.

    Args:
      settings: of the run.
      out: directory of the copy; it must be missing or empty.
      attacker: plants and scores the canaries.
      alpha: level of the test, for its power.
      command: the command line, for the copy's record.
      sinks: notified of the copy's progress.
    Raises:
      DPQuantError: as `runs.train.train`.
    Privacy: charges the plan's events to out/ledger.jsonl. The result is post-processing of the copy.
    """
    record = train(settings, out, command=command, sinks=sinks, start=attacker)
    found = guessed(attacker.scores(), attacker.inside)
    assert record.accuracy_test is not None, "check_images refuses other tasks than telling images apart"
    return judged(found, attacker.private.events(), settings.delta, record.accuracy_test, alpha)


def judged(
    found: list[Guesses], events: Sequence[Event], delta: float, accuracy_test: float, alpha: float
) -> OneRunFound:
    """Return what guesses say about the events that a training has charged."""
    epsilon, canaries = accounting.epsilon(events, delta), found[0].canaries
    epsilons = np.linspace(0.0, 2 * epsilon + 5, _CURVE)
    least = profile_least(epsilons, np.array(accounting.deltas(events, epsilons)))
    wanted, mu = needed(canaries, least, alpha), mu_of(epsilon, delta)
    halved = [dataclasses.replace(event, noise_multiplier=event.noise_multiplier / 2) for event in events]
    true = {
        "noise halved": mu_of(accounting.epsilon(halved, delta), delta),
        "epsilon doubled": mu_of(2 * epsilon, delta),
    }
    return OneRunFound(
        canaries=canaries,
        accuracy_test=accuracy_test,
        epsilon_claimed=epsilon if math.isfinite(epsilon) else None,
        delta=delta,
        guesses=found,
        epsilon_bound=epsilon_bound(found, delta, 1 - CONFIDENCE),
        epsilon_bound_gaussian=gaussian_bound(found, delta, 1 - CONFIDENCE),
        p_value=claim_p_value(found, least),
        ceiling=ceiling(canaries, delta, alpha),
        detectable=detectable(canaries, mu, delta, wanted),
        power={fault: power(canaries, mu, wanted) for fault, mu in true.items()},
    )
