# SPDX-License-Identifier: Apache-2.0
"""An audit of a real training: canaries among its records, and an attacker who guesses from the trained model which.

The canaries (`canaries.py`) are random records with random labels, which nothing but having seen them can predict. A
fair coin decides for each whether it joins the training records. The run is otherwise that of the settings:
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
from torch import nn

from dpquant.audits.canaries import Canaries, InMemory
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
from dpquant.data.form import Form
from dpquant.data.sizes import PACKED_PREFIX
from dpquant.engine.batches import to_device
from dpquant.errors import SettingError
from dpquant.privacy import accounting
from dpquant.privacy.events import Event
from dpquant.runs.evaluation import EVALUATION_BATCH, evaluating, loss_of
from dpquant.runs.settings import TrainSettings
from dpquant.runs.sinks import Sink
from dpquant.runs.train import train
from dpquant.training.private import PrivateTraining
from dpquant.training.start import make_private

CONFIDENCE = 0.95
FEWEST, MOST = 20, 10_000  # canaries
_CURVE = 400  # points of the claimed curve


class Attacker:
    """Plants canaries into a training, as the `start` of a run, and scores them once it has ended.

    Args:
      form: of the run's records.
      count: m, number of canaries.
      seed: of the coins and the canaries.
      start: starts the run.
    Attributes:
      inside: bool `(m,)`, the coins.
    """

    def __init__(self, form: Form, count: int, seed: int, start: Start = make_private):
        self._form, self._count, self._seed, self._start = form, count, seed, start
        self._loss_fn = loss_of(form.task)

    def __call__(self, model: nn.Module, optimizer: torch.optim.Optimizer, records: InMemory, **options: Any) -> Any:
        """Start the run with the canaries among its records."""
        self._canaries = Canaries.for_records(records, self._form, self._count, self._seed)
        self._alone = self._canaries.alone(records)
        self._before = self._losses(model)
        self.private: PrivateTraining = self._start(model, optimizer, self._canaries.among(records), **options)
        return self.private

    @property
    def inside(self) -> np.ndarray:
        return self._canaries.inside.numpy()

    def scores(self) -> np.ndarray:
        """Return how far each canary's loss has fallen, `(m,)`. Privacy: post-processing of the trained parameters."""
        return self._before - self._losses(self.private.model)

    @torch.no_grad()
    def _losses(self, model: nn.Module) -> np.ndarray:
        """Return every canary's loss, float64 `(m,)`; one that is not finite is as large as a number can be."""
        device, found = next(model.parameters()).device, []
        with evaluating(model):
            for ids in torch.arange(len(self._alone)).split(EVALUATION_BATCH):
                found.append(self._loss_fn(model, to_device(self._alone.batch(ids), device)).double().cpu())
        return np.nan_to_num(torch.cat(found).numpy(), nan=math.inf)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OneRunFound:
    """What one training shows.

    Attributes:
      canaries: m.
      accuracy_test: of the copy; None of a regression.
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
    accuracy_test: float | None
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


def check_in_memory(settings: TrainSettings) -> None:
    """Check that a run holds its records in memory, where canaries can join them.

    Raises:
      SettingError: it does not.
    """
    if settings.data.startswith(PACKED_PREFIX):
        raise SettingError(
            f"Expected a run on records in memory; got data={settings.data}. Canaries would have to be packed with "
            "them. Audit a run on a part of their source, or give --mode tap or --mode game, which try the plan's "
            "numbers on the real code."
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
    return judged(found, attacker.private.events(), settings.delta, record.accuracy_test, alpha)


def judged(
    found: list[Guesses], events: Sequence[Event], delta: float, accuracy_test: float | None, alpha: float
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
