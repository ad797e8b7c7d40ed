# SPDX-License-Identifier: Apache-2.0
"""Policies: which layers run quantized in an epoch.

Everything here is post-processing: a policy sees layer names, multiply-accumulates (MACs) and private scores, never
data or a model. Policies that draw layers use a random generator that is a function of (key, epoch) and is not secret.
It is independent of sampling and noise.

The `dpquant` policy draws layers one after the other, without replacement, with probabilities

    pi_l proportional to exp(-beta * z_l),    z = (score - mean) / standard deviation

until the epoch's budget of quantized layers is met. Scores are divided by their standard deviation so that one beta
suits every model. The draw is Gumbel top-k: sorting the layers by -beta * z_l + Gumbel_l gives the order of the draws.
With beta = 0 the draw is uniform, which is pure rotation.

Symbols: L layers, k of them quantized, fraction = k / L, beta inverse temperature. Source: DPQuant, arXiv 2509.03472;
Gumbel top-k: Kool, van Hoof and Welling, arXiv 1903.06059.
"""

import abc
import dataclasses
import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import ClassVar

import numpy as np

from dpquant.errors import SettingError, expect

_ROUNDING = 1e-9  # tolerance for float round-off: 0.6 of 5 layers is 3 layers, not 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Turn:
    """Input of a policy at the beginning of an epoch: released numbers only.

    Attributes: the arguments of `Policy.choose`.
    """

    macs: Mapping[str, float]
    scores: Mapping[str, float] | None
    epoch: int
    key: int
    excluded: Collection[str]


class Policy(abc.ABC):
    """Base class of policies, which choose the layers of an epoch. A policy of your own defines `pick`.

    Attributes:
      needs_scores: whether the policy uses measured impacts, so that the run has to make analyses.
      quantizes: whether any layer may run quantized.
      ema: weight of the newest analysis in the scores, in (0, 1].
    """

    needs_scores: ClassVar[bool] = False
    ema: float = 1.0

    @property
    def quantizes(self) -> bool:
        """Whether any layer may run quantized; False if the model always runs in full precision."""
        return True

    def choose(
        self,
        macs: Mapping[str, float],
        scores: Mapping[str, float] | None,
        *,
        epoch: int,
        key: int,
        excluded: Collection[str] = (),
    ) -> tuple[str, ...]:
        """Return the layers that run quantized in an epoch.

        Args:
          macs: {quantizable layer: multiply-accumulates for one example}, in forward order.
          scores: {layer that is not excluded: its impact}, where higher is worse. None before the first analysis; then
            all layers count as equal.
          epoch: number of the epoch, from 0.
          key: seed of the random generator, 0 <= key < 2^64.
          excluded: layers that stay in full precision unless the policy names them. Fractions and shares of
            multiply-accumulates refer to all layers, including these.
        Returns: names in forward order. Equal arguments give equal names.
        Raises:
          SettingError: a named layer does not exist, or scores are not one finite number for each layer that is not
            excluded.
        Privacy: post-processing.
        """
        return self.pick(Turn(macs=macs, scores=scores, epoch=epoch, key=key, excluded=excluded))

    @abc.abstractmethod
    def pick(self, turn: Turn) -> tuple[str, ...]:
        """Return the layers that run quantized in an epoch, in forward order; called by `choose`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NonePolicy(Policy):
    """Never quantizes a layer."""

    @property
    def quantizes(self) -> bool:
        """False."""
        return False

    def pick(self, turn: Turn) -> tuple[str, ...]:
        """Return no layer."""
        return ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class AllPolicy(Policy):
    """Quantizes every layer in every epoch."""

    def pick(self, turn: Turn) -> tuple[str, ...]:
        """Return all layers that are not excluded."""
        return tuple(name for name in turn.macs if name not in turn.excluded)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _BudgetPolicy(Policy):
    """Base class of policies with a budget of quantized layers, given by exactly one of two settings.

    Attributes:
      fraction: fraction of the layers, in (0, 1]; rounded up to a whole number of layers.
      macs: share of the model's multiply-accumulates, in (0, 1]; layers are added in order until they reach it.
    """

    _budgets: ClassVar[tuple[str, ...]] = ("fraction", "macs")
    fraction: float | None = None
    macs: float | None = None

    def __post_init__(self) -> None:
        given = [name for name in self._budgets if getattr(self, name) is not None]
        if len(given) != 1:
            raise SettingError(
                f"Expected exactly one of {', '.join(self._budgets)} for {type(self).__name__}; "
                f"got {', '.join(given) or 'none'}. Two contradict each other, and without any there is no budget. "
                "Give one."
            )
        _check_share("fraction", self.fraction)
        _check_share("macs", self.macs)

    def _spend(self, order: Sequence[str], macs: Mapping[str, float]) -> tuple[str, ...]:
        """Return the first layers of `order` that meet the budget, in forward order; all if they are too few."""
        if self.fraction is not None:
            count = math.ceil(self.fraction * len(macs) - _ROUNDING)
        else:
            assert self.macs is not None
            work = macs if any(macs.values()) else dict.fromkeys(macs, 1.0)
            target = sum(work.values()) * (self.macs - _ROUNDING)
            covered = itertools.accumulate((work[name] for name in order), initial=0.0)
            count = sum(before < target for before in covered)  # a layer is added while those before it fall short
        chosen = set(order[:count])
        return tuple(name for name in macs if name in chosen)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StaticPolicy(_BudgetPolicy):
    """Quantizes one set of layers in all epochs, named or random. The paper's baseline.

    Attributes:
      names: the layers; given instead of a budget.
      seed: seed of the random set, >= 0.
    """

    _budgets: ClassVar[tuple[str, ...]] = ("names", "fraction", "macs")
    names: Collection[str] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seed < 0:
            raise SettingError(
                f"Expected seed >= 0; got seed={self.seed}. numpy accepts no negative seed. Choose another seed."
            )
        if isinstance(self.names, str):
            raise SettingError(
                f"Expected names to be a collection of layer names; got names={self.names!r}. A string is a collection "
                "of letters. Put it into a tuple."
            )
        if self.names is not None:
            object.__setattr__(self, "names", tuple(self.names))

    @property
    def quantizes(self) -> bool:
        """Whether any layer may run quantized; False if `names` is empty."""
        return self.names is None or len(self.names) > 0

    def pick(self, turn: Turn) -> tuple[str, ...]:
        """Return the named layers, or the random set."""
        if self.names is None:
            return self._spend(_drawn(_free(turn), _generator(self.seed, 0)), turn.macs)
        if unknown := [name for name in self.names if name not in turn.macs]:
            raise SettingError(
                f"Expected names of quantizable layers; got names with {unknown[0]!r}. Known: {', '.join(turn.macs)}. "
                "Name layers as dpquant.quantizable_layers(model) does."
            )
        return tuple(name for name in turn.macs if name in self.names)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RotatePolicy(_BudgetPolicy):
    """Draws layers uniformly in every epoch: the paper's probabilistic layer sampling."""

    def pick(self, turn: Turn) -> tuple[str, ...]:
        """Return layers drawn uniformly for this epoch."""
        return self._spend(_drawn(_free(turn), _generator(turn.key, turn.epoch)), turn.macs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _ScoredPolicy(_BudgetPolicy):
    """Base class of policies that use scores.

    Attributes:
      ema: weight of the newest analysis in the scores, in (0, 1]; with 1, earlier analyses have no weight.
    """

    needs_scores: ClassVar[bool] = True
    ema: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_share("ema", self.ema)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrioritisePolicy(_ScoredPolicy):
    """Quantizes the layers with the lowest scores, without randomness; of equal scores, the earlier layer."""

    def pick(self, turn: Turn) -> tuple[str, ...]:
        """Return the layers with the lowest scores."""
        known = _checked_scores(turn)
        return self._spend(sorted(known, key=known.__getitem__), turn.macs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPQuantPolicy(_ScoredPolicy):
    """Draws layers in every epoch, those with low scores with higher probability.

    Attributes:
      beta: influence of the scores, >= 0. With 0 the policy rotates uniformly; with a large value it always takes the
        layers with the lowest scores. On networks of few layers the default still rotates, while 3, the command line's
        default, hardly does.
    """

    beta: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_beta(self.beta)

    def pick(self, turn: Turn) -> tuple[str, ...]:
        """Return layers drawn for this epoch with weights exp(-beta * normalised score)."""
        logits = _logits(_checked_scores(turn), self.beta)
        return self._spend(_drawn(logits, _generator(turn.key, turn.epoch)), turn.macs)


def probabilities(scores: Mapping[str, float], beta: float) -> dict[str, float]:
    """Return {layer: probability that it is drawn first} under `DPQuantPolicy`; probabilities sum to one.

    Args:
      scores: {layer: impact}, finite.
      beta: influence of the scores, >= 0.
    Raises:
      SettingError: beta is negative or not finite.
    Privacy: post-processing.
    """
    _check_beta(beta)
    logits = _logits(scores, beta)
    highest = max(logits.values(), default=0.0)
    weights = {name: math.exp(logit - highest) for name, logit in logits.items()}
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


def ema(previous: Mapping[str, float], new: Mapping[str, float], weight: float) -> dict[str, float]:
    """Return the moving average `(1 - weight) * previous + weight * new`; without previous scores, `new`.

    Args:
      previous: {layer: score so far}; empty before the first analysis.
      new: {layer: noised impact of the newest analysis}.
      weight: weight of the new impacts, in (0, 1].
    Privacy: post-processing.
    """
    return {name: (1 - weight) * previous[name] + weight * score if previous else score for name, score in new.items()}


def largest_layers(macs: Mapping[str, float], share: float) -> tuple[str, ...]:
    """Return the largest layers that together cover a share of the multiply-accumulates, in forward order.

    Args:
      macs: {layer: multiply-accumulates}, in forward order.
      share: 1 gives all layers, 0 gives none.
    """
    chosen: set[str] = set()
    for name in sorted(macs, key=lambda name: macs[name], reverse=True):
        if share < 1 and sum(macs[other] for other in chosen) >= share * sum(macs.values()):
            break
        chosen.add(name)
    return tuple(name for name in macs if name in chosen)


def noise_left(count: int, weight: float) -> float:
    """Return the noise's standard deviation in scores averaged over `count` analyses, in units of one analysis' noise.

    Args:
      count: number of analyses.
      weight: weight of the newest analysis, as `Policy.ema`.
    """
    newer = sum((weight * (1 - weight) ** k) ** 2 for k in range(count - 1))
    return math.sqrt(newer + (1 - weight) ** (2 * max(count - 1, 0)))


def _free(turn: Turn) -> dict[str, float]:
    """Return {layer that may be chosen: 0.0}, in forward order."""
    return {name: 0.0 for name in turn.macs if name not in turn.excluded}


def _logits(scores: Mapping[str, float], beta: float) -> dict[str, float]:
    """Return {layer: -beta * z}, z the score in standard deviations from the mean; zeros if all scores are equal."""
    if len(set(scores.values())) < 2:
        return dict.fromkeys(scores, 0.0)
    values = np.array(list(scores.values()))
    values = values / np.abs(values).max()  # so that squares neither overflow nor underflow
    z = (values - values.mean()) / values.std()
    return dict(zip(scores, (-beta * z).tolist(), strict=True))


def _drawn(logits: Mapping[str, float], generator: np.random.Generator) -> list[str]:
    """Return all names in the order of a weighted draw without replacement."""
    keys = np.array(list(logits.values())) + generator.gumbel(size=len(logits))
    names = list(logits)
    return [names[i] for i in np.argsort(-keys, kind="stable")]


def _generator(key: int, epoch: int) -> np.random.Generator:
    return np.random.default_rng([key, epoch])


def _checked_scores(turn: Turn) -> dict[str, float]:
    """Return {layer that may be chosen: its score}, in forward order; zeros before the first analysis."""
    free, scores = _free(turn), turn.scores
    if scores is None:
        return free
    if set(scores) != set(free) or not all(map(math.isfinite, scores.values())):
        raise SettingError(
            f"Expected scores to be one finite number for each of {', '.join(free)}; got scores for "
            f"{', '.join(scores)}. Layers without a score cannot be ranked. Give the result of one analysis."
        )
    return {name: scores[name] for name in free}


def _check_share(name: str, value: float | None) -> None:
    expect(name, value, (int, float, type(None)), "a number", "It is a share of a whole, as 0.75")
    if value is not None and not 0 < value <= 1:
        raise SettingError(
            f"Expected {name} in (0, 1]; got {name}={value}. It is a share of a whole. Use 1 for all of it."
        )


def _check_beta(beta: float) -> None:
    expect("beta", beta, (int, float), "a number", "Use 0 for pure rotation")
    if not 0 <= beta < math.inf:
        raise SettingError(
            f"Expected beta >= 0 and finite; got beta={beta}. A negative one would favour the layers that suffer most. "
            "Use 0 for pure rotation."
        )
