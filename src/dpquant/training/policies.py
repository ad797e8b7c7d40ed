# SPDX-License-Identifier: Apache-2.0
"""Which layers run quantized in an epoch: arithmetic on released scores, and a coin of its own.

Everything here is post-processing: it sees layer names, their multiply-accumulates (MACs) and private scores, never
data or a model. The coin is a function of (key, epoch) and is not secret; sampling and noise draw elsewhere.

The `dpquant` policy draws layers one after the other, without replacement, with probabilities

    pi_l proportional to exp(-beta * z_l),    z = (score - mean) / standard deviation

until the epoch's budget is met. Scores are divided by their spread so that one beta serves every model. The draw is
Gumbel top-k: the order of -beta * z_l + Gumbel_l is the order of such draws. beta = 0 leaves pure rotation.

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

from dpquant.errors import SettingError

_ROUNDING = 1e-9  # of sums and products of floats: 0.6 of 5 layers are 3, not 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Turn:
    """What a policy may look at when an epoch begins: released numbers only.

    Attributes: as the arguments of `Policy.choose`.
    """

    macs: Mapping[str, float]
    scores: Mapping[str, float] | None
    epoch: int
    key: int
    excluded: Collection[str]


class Policy(abc.ABC):
    """Chooses an epoch's layers. A policy of your own defines `pick`.

    Attributes:
      needs_scores: the choice gets better with measured impacts: the run should make analyses.
      quantizes: some layer may run quantized.
      ema: weight of the newest analysis in the scores, in (0, 1].
    """

    needs_scores: ClassVar[bool] = False
    ema: float = 1.0

    @property
    def quantizes(self) -> bool:
        """False if the model always runs in full precision."""
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
        """The layers that run quantized in an epoch.

        Args:
          macs: each quantizable layer's multiply-accumulates for one example, in forward order.
          scores: each layer's impact, but for the excluded, higher is worse; None before the first analysis, which
            makes all layers equal.
          epoch: from 0.
          key: of the schedule's coin, 0 <= key < 2^64.
          excluded: layers that stay in full precision, unless they were named; shares count them all the same.
        Returns: names in forward order; the same for the same arguments.
        Raises:
          SettingError: a named layer does not exist, or scores are not one finite number for each layer.
        Privacy: post-processing.
        """
        return self.pick(Turn(macs=macs, scores=scores, epoch=epoch, key=key, excluded=excluded))

    @abc.abstractmethod
    def pick(self, turn: Turn) -> tuple[str, ...]:
        """What `choose` returns, for its arguments."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NonePolicy(Policy):
    """Full precision throughout."""

    @property
    def quantizes(self) -> bool:
        """Never."""
        return False

    def pick(self, turn: Turn) -> tuple[str, ...]:
        """No layer."""
        return ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class AllPolicy(Policy):
    """Every layer, all the time."""

    def pick(self, turn: Turn) -> tuple[str, ...]:
        """All layers."""
        return tuple(name for name in turn.macs if name not in turn.excluded)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _BudgetPolicy(Policy):
    """A policy with a budget: exactly one of two.

    Attributes:
      fraction: of the layers, in (0, 1]; the smallest number of layers that reaches it.
      macs: share of the model's multiply-accumulates, in (0, 1]; layers are taken in turn until they reach it.
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
        """The first layers of an order that meet the budget, in forward order; all where they cannot."""
        if self.fraction is not None:
            count = math.ceil(self.fraction * len(macs) - _ROUNDING)
        else:
            assert self.macs is not None
            work = macs if any(macs.values()) else dict.fromkeys(macs, 1.0)
            target = sum(work.values()) * (self.macs - _ROUNDING)
            covered = itertools.accumulate((work[name] for name in order), initial=0.0)
            count = sum(before < target for before in covered)  # a layer is taken while what came before is too little
        chosen = set(order[:count])
        return tuple(name for name in macs if name in chosen)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StaticPolicy(_BudgetPolicy):
    """The same layers in every epoch: named ones, or a random set. The paper's baseline.

    Attributes:
      names: the layers; instead of a budget.
      seed: of the random set, >= 0.
    """

    _budgets: ClassVar[tuple[str, ...]] = ("names", "fraction", "macs")
    names: Collection[str] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seed < 0:
            raise SettingError(f"Expected seed >= 0; got seed={self.seed}. numpy takes no other. Choose another seed.")
        if isinstance(self.names, str):
            raise SettingError(
                f"Expected names to be a collection of layer names; got names={self.names!r}. A string is a collection "
                "of letters. Put it into a tuple."
            )
        if self.names is not None:
            object.__setattr__(self, "names", tuple(self.names))

    @property
    def quantizes(self) -> bool:
        """Unless an empty collection was named."""
        return self.names is None or len(self.names) > 0

    def pick(self, turn: Turn) -> tuple[str, ...]:
        """The named layers, or those that `seed` draws."""
        if self.names is None:
            return self._spend(_drawn(_free(turn), _coin(self.seed, 0)), turn.macs)
        if unknown := [name for name in self.names if name not in turn.macs]:
            raise SettingError(
                f"Expected names of quantizable layers; got names with {unknown[0]!r}. Known: {', '.join(turn.macs)}. "
                "Name layers as dpquant.quantizable_layers(model) does."
            )
        return tuple(name for name in turn.macs if name in self.names)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RotatePolicy(_BudgetPolicy):
    """Other layers in every epoch, drawn uniformly: the paper's probabilistic layer sampling."""

    def pick(self, turn: Turn) -> tuple[str, ...]:
        """Layers drawn uniformly, anew in every epoch."""
        return self._spend(_drawn(_free(turn), _coin(turn.key, turn.epoch)), turn.macs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _ScoredPolicy(_BudgetPolicy):
    """A policy that looks at scores.

    Attributes:
      ema: weight of the newest analysis, in (0, 1]; 1 forgets the earlier ones.
    """

    needs_scores: ClassVar[bool] = True
    ema: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_share("ema", self.ema)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrioritisePolicy(_ScoredPolicy):
    """The layers with the lowest scores, without a coin; in case of a tie, earlier ones."""

    def pick(self, turn: Turn) -> tuple[str, ...]:
        """The layers with the lowest scores."""
        known = _checked_scores(turn)
        return self._spend(sorted(known, key=known.__getitem__), turn.macs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPQuantPolicy(_ScoredPolicy):
    """Other layers in every epoch, harmless ones more often.

    Attributes:
      beta: how much the scores count, >= 0; 0 is rotation, large is prioritising. The default still rotates on networks
        of few layers, where 3, the command line's, hardly does.
    """

    beta: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_beta(self.beta)

    def pick(self, turn: Turn) -> tuple[str, ...]:
        """Layers drawn by exp(-beta * normalised score), anew in every epoch."""
        logits = _logits(_checked_scores(turn), self.beta)
        return self._spend(_drawn(logits, _coin(turn.key, turn.epoch)), turn.macs)


def probabilities(scores: Mapping[str, float], beta: float) -> dict[str, float]:
    """Each layer's probability to be the first one drawn; they sum to one.

    Args:
      scores: each layer's impact, finite.
      beta: >= 0.
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
    """Exponential moving average: `(1 - weight) * previous + weight * new`; with no previous scores, the new ones.

    Args:
      previous: scores so far, empty before the first analysis.
      new: what the newest analysis measured.
      weight: of the new, in (0, 1].
    Privacy: post-processing.
    """
    return {name: (1 - weight) * previous[name] + weight * score if previous else score for name, score in new.items()}


def largest_layers(macs: Mapping[str, float], share: float) -> tuple[str, ...]:
    """The fewest layers, largest first, that cover a share of the multiply-accumulates; in forward order.

    Args:
      macs: each layer's.
      share: 1 is all layers, 0 is none.
    """
    chosen: set[str] = set()
    for name in sorted(macs, key=lambda name: macs[name], reverse=True):
        if share < 1 and sum(macs[other] for other in chosen) >= share * sum(macs.values()):
            break
        chosen.add(name)
    return tuple(name for name in macs if name in chosen)


def noise_left(count: int, weight: float) -> float:
    """Standard deviation of the noise on scores smoothed over `count` analyses, in units of one analysis' noise."""
    newer = sum((weight * (1 - weight) ** k) ** 2 for k in range(count - 1))
    return math.sqrt(newer + (1 - weight) ** (2 * max(count - 1, 0)))


def _free(turn: Turn) -> dict[str, float]:
    """Zeros for the layers that may be chosen."""
    return {name: 0.0 for name in turn.macs if name not in turn.excluded}


def _logits(scores: Mapping[str, float], beta: float) -> dict[str, float]:
    """-beta * z: scores in units of their own spread. Equal scores have none, and are all zero."""
    if len(set(scores.values())) < 2:
        return dict.fromkeys(scores, 0.0)
    values = np.array(list(scores.values()))
    values = values / np.abs(values).max()  # so that squares neither overflow nor vanish
    z = (values - values.mean()) / values.std()
    return dict(zip(scores, (-beta * z).tolist(), strict=True))


def _drawn(logits: Mapping[str, float], coin: np.random.Generator) -> list[str]:
    """All names, in the order in which drawing without replacement would take them."""
    keys = np.array(list(logits.values())) + coin.gumbel(size=len(logits))
    names = list(logits)
    return [names[i] for i in np.argsort(-keys, kind="stable")]


def _coin(key: int, epoch: int) -> np.random.Generator:
    return np.random.default_rng([key, epoch])


def _checked_scores(turn: Turn) -> dict[str, float]:
    """One score for each layer that may be chosen, in forward order."""
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
    if value is not None and not 0 < value <= 1:
        raise SettingError(
            f"Expected {name} in (0, 1]; got {name}={value}. It is a share of a whole. Use 1 for all of it."
        )


def _check_beta(beta: float) -> None:
    if not 0 <= beta < math.inf:
        raise SettingError(
            f"Expected beta >= 0 and finite; got beta={beta}. A negative one would favour the layers that suffer most. "
            "Use 0 for pure rotation."
        )
