# SPDX-License-Identifier: Apache-2.0
"""Distinguishing games: can an attacker who knows all but one record tell from a release whether that one was there?

A release with Gaussian noise of sigma times its sensitivity allows a test of mu = 1 / sigma at most, if the record
always takes part (q = 1; that sampling is Poisson is tested elsewhere). The attacker projects a release on the
direction in which the record moves it and compares the result with a threshold, both fixed before the plays that count.
Many plays of either world bound the mu that the release truly has from below (`bounds.mu_lower_bound`); a bound above
1 / sigma refutes it.

Two ways to play. A step with taps (`taps.py`) at q = 1 is a play for each canary: thousands in a second. And runs of a
small network, one without and one with the record, whose parameters stay as they are: every epoch is one play of the
analysis and one of a step, through the whole of `PrivateTraining`, with other noise, rounding and microbatches. The
network is quantized, and the record is far out, so that what mixes records would show.

No private record is read: all records are random.

Symbols: K plays in each world, mu as in Dong et al., arXiv 1905.02383. Source of the test: Nasr et al., arXiv
2302.07956.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import ndtr
from torch import Tensor, nn

from dpquant.audits.bounds import mu_lower_bound, smallest_alpha
from dpquant.audits.taps import Collating, Start, Sums
from dpquant.engine.batches import microbatches
from dpquant.engine.clip import clipped_sum
from dpquant.engine.layers import quantizable_layers, set_policy
from dpquant.engine.passes import Objective
from dpquant.privacy.analysis_plan import AnalysisPlan, Score
from dpquant.privacy.plan import PrivacyPlan
from dpquant.training.impact import analysis_keys, impact_sum
from dpquant.training.policies import DPQuantPolicy
from dpquant.training.start import make_private

CONFIDENCE = 0.95

_INPUTS, _CLASSES, _RECORDS = 16, 4, 2
_WARM_UP = 5  # one play in so many, the first ones, fixes the threshold and is not counted
_FAR_OUT = 30.0  # factor on the inputs of the record that the game is about
_NORMALISER = 16.0  # not the number of records, by which nothing may be divided
_CLIP, _ANALYSIS_CLIP = 1e-3, 1e-6  # so small that every record's contribution is as large as it may be
_KEYS = 16  # roundings from which the attacker learns the direction
_TRIALS = 400


@dataclasses.dataclass(frozen=True, kw_only=True)
class GameFound:
    """Result of a game.

    Attributes:
      release: what was played for.
      plays: K, in each world.
      false_alarms, misses: errors of the attacker.
      mu_claimed: 1 / sigma, as charged.
      mu_bound: lower bound on the true mu, at 95 % confidence.
      p_value: of the claim.
      power: chance that this attacker finds a fault at the level: {"noise halved": ...}.
    """

    release: str
    plays: int
    false_alarms: int
    misses: int
    mu_claimed: float
    mu_bound: float
    p_value: float
    power: dict[str, float]

    def p_values(self) -> list[float]:
        """Return the p-values of all tests."""
        return [self.p_value]


def judged(
    release: str, outside: np.ndarray, inside: np.ndarray, *, mu: float, alpha: float, true_mu: float | None = None
) -> GameFound:
    """Return what a game shows, whose outputs are projected and shifted so that the attacker's threshold is 0.

    Args:
      release: its name.
      outside: `(K,)` outputs without the record; above 0 the attacker says that it was there.
      inside: `(K,)` outputs with it.
      mu: as claimed.
      alpha: level of the test, for its power.
      true_mu: of the outputs if the noise were half of what is claimed; None: twice the claim. Less where rounding
        turns contributions away from the direction and adds noise of its own.
    """
    plays = min(len(outside), len(inside))
    false_alarms, misses = int((outside[:plays] > 0).sum()), int((inside[:plays] <= 0).sum())

    def bound(alpha: float) -> float:
        return float(mu_lower_bound(false_alarms, misses, plays, alpha))

    return GameFound(
        release=release,
        plays=plays,
        false_alarms=false_alarms,
        misses=misses,
        mu_claimed=mu,
        mu_bound=bound(1 - CONFIDENCE),
        p_value=smallest_alpha(lambda level: bound(level) > mu),
        power={"noise halved": power(2 * mu if true_mu is None else true_mu, mu, plays, alpha)},
    )


def power(mu: float, claimed: float, plays: int, alpha: float) -> float:
    """Return the chance, by simulation, that a game refutes the claimed mu of a release that truly has another."""
    false_alarms, misses = np.random.default_rng(0).binomial(plays, ndtr(-mu / 2), (2, _TRIALS))
    return float((mu_lower_bound(false_alarms, misses, plays, alpha) > claimed).mean())


def tap_game(sums: Sums, *, alpha: float) -> GameFound:
    """Play with the taps of a run at q = 1: each canary in each step is a play.

    Args:
      sums: of the run.
      alpha: level of the test, for its power.
    """
    assert sums.event.sample_rate == 1, "a canary that is not drawn is none in this game"
    outside, inside = sums.values[:, ~sums.inside].ravel() - 0.5, sums.values[:, sums.inside].ravel() - 0.5
    return judged("step, taps", outside, inside, mu=1 / sums.event.noise_multiplier, alpha=alpha)


@dataclasses.dataclass(frozen=True)
class Worlds:
    """A game about one record.

    Attributes:
      plays: K, in each world.
      noise_multiplier: sigma of steps and analyses. With 1/2 a few plays tell most about a fault of a given factor.
      score: of the analyses.
      format: of the network's layers.
      seed: of the network and its records.
      backend: of the quantized layers. `auto` would leave layers as small as these in full precision.
    """

    plays: int
    noise_multiplier: float = 0.5
    score: Score = "gradient"
    format: str = "luq-fp4"
    seed: int = 0
    backend: str = "simulate"


def _network(seed: int) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(_INPUTS, 8), nn.ReLU(), nn.Linear(8, _CLASSES))


def _loss(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def world_game(worlds: Worlds, *, alpha: float, start: Start = make_private) -> list[GameFound]:
    """Play for one record in the steps and in the analyses of runs.

    Args:
      worlds: the game.
      alpha: level of a single test, for its power.
      start: starts a run.
    Returns: the results for the step and for the analysis.
    Raises:
      DPQuantError: as `make_private`.
    Privacy: reads no private record. The events are charged in memory.
    """
    random = torch.Generator().manual_seed(worlds.seed)
    inputs = torch.randn(_RECORDS + 1, _INPUTS, generator=random)
    inputs[-1] *= _FAR_OUT
    with torch.no_grad():
        labels = _network(worlds.seed)(inputs).argmin(1)  # a large gradient, whose direction rounding changes little
    runs = [_played(worlds, inputs[:count], labels[:count], start) for count in (_RECORDS, _RECORDS + 1)]
    found = []
    for release in ("step", "analysis"):
        known = np.stack([run[release][1] for run in runs])  # what the attacker knows: sums without noise, by rounding
        shift = known[1].mean(0) - known[0].mean(0)
        distance = float(np.linalg.norm(shift))
        direction = shift / distance
        outputs = np.stack([run[release][0] @ direction for run in runs])
        threshold = outputs[:, : worlds.plays // _WARM_UP].mean()
        outside, inside = outputs[:, worlds.plays // _WARM_UP :] - threshold
        sigma, clip = worlds.noise_multiplier, {"step": _CLIP, "analysis": _ANALYSIS_CLIP}[release]
        spread = float((known @ direction).var(1, ddof=1).mean())
        found.append(
            judged(
                f"{release}, one record",
                outside,
                inside,
                mu=1 / sigma,
                alpha=alpha,
                true_mu=distance / math.hypot(sigma * clip / 2, math.sqrt(spread)),
            )
        )
    return found


def _played(worlds: Worlds, inputs: Tensor, labels: Tensor, start: Start) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Run all plays of one world; return {release: (outputs `(K, d)`, sums without noise `(R, d)`)}."""
    plan = PrivacyPlan(
        noise_multiplier=worlds.noise_multiplier,
        delta=1e-5,
        max_grad_norm=_CLIP,
        sample_rate=1.0,
        expected_batch_size=_NORMALISER,
        steps=worlds.plays,
        analysis=AnalysisPlan(
            count=worlds.plays,
            sample_rate=1.0,
            expected_batch_size=_NORMALISER,
            noise_multiplier=worlds.noise_multiplier,
            max_norm=_ANALYSIS_CLIP,
            score=worlds.score,
        ),
    )
    model = _network(worlds.seed)
    private = start(
        model,
        torch.optim.SGD(model.parameters(), lr=0.0),  # every play is one of the same mechanism
        Collating(inputs, labels),
        loss_fn=_loss,
        plan=plan,
        policy=DPQuantPolicy(fraction=1.0, ema=1.0),
        format=worlds.format,
        backend=worlds.backend,
        microbatch_size=8,
    )
    steps, analyses = [], []
    for epoch in private.epochs():
        analyses.append(list(private.scores.values()))
        for batch in epoch:
            private.step(batch)
            steps.append(_flat(p.grad for p in model.parameters() if p.grad is not None))
    known = _without_noise(worlds, private.model, plan, (inputs, labels))
    return {
        "step": (_NORMALISER * np.stack(steps), known["step"]),
        "analysis": (_NORMALISER * np.array(analyses), known["analysis"]),
    }


def _without_noise(worlds: Worlds, model: nn.Module, plan: PrivacyPlan, data: Any) -> dict[str, np.ndarray]:
    """Return a world's clipped sums, under several roundings, `(R, d)`."""
    assert plan.analysis is not None, "the plan of a game has one"
    ids, names = torch.arange(len(data[1])), list(quantizable_layers(model))
    impacts = [
        impact_sum(
            Objective(model, _loss),
            microbatches(data, ids, 8),
            names=names,
            max_norm=plan.analysis.max_norm,
            keys=analysis_keys(worlds.seed, number, plan.analysis.repeats),
            score=plan.analysis.score,
        ).impacts.numpy()
        for number in range(_KEYS)
    ]
    set_policy(model, names)
    clipped = [
        clipped_sum(
            model, _loss, data, max_grad_norm=plan.max_grad_norm, record_ids=ids, step=number, seed=worlds.seed,
            microbatch_size=8,
        ).grads.values()
        for number in range(_KEYS)
    ]  # fmt: skip
    set_policy(model, ())
    return {"step": np.stack([_flat(grads) for grads in clipped]), "analysis": np.stack(impacts)}


def _flat(tensors: Any) -> np.ndarray:
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors]).numpy()
