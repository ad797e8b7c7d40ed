# SPDX-License-Identifier: Apache-2.0
"""What is known about a run while it goes on, and after it: the state from which alerts, pages and lines are made.

`following.py` reads it from a directory; `RunStatus.of` makes it of a record. This module loads no torch.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Literal, Self

from dpquant.runs.provenance import PlanRecord
from dpquant.runs.record import EpochRecord, RunRecord
from dpquant.runs.score import Score, score_so_far
from dpquant.training.policies import noise_left

Phase = Literal["waiting", "starting", "running", "silent", "stopped", "diverged", "finished"]
OVER: frozenset[Phase] = frozenset({"diverged", "finished"})
"""Phases that no run leaves. A stopped one may be continued."""

DEFAULT_EMA = 0.5
"""Weight of the newest analysis in a run whose settings are not known: that of the settings by default."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pace:
    """How a run moves, for its operator only: times follow the sizes of batches, which are private.

    Attributes:
      silent: seconds since the last sign of life.
      examples_per_second: as in `Progress`; None before the first step.
      seconds_a_step: mean time of a step, analyses included; None before the first step.
      seconds_left: until the last step, at that pace; None where it is not known.
    """

    silent: float
    examples_per_second: float | None = None
    seconds_a_step: float | None = None
    seconds_left: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunStatus:
    """State of a run. Everything but `pace` is released.

    Attributes:
      name: of its directory.
      phase: waiting: nothing is there yet; starting: it measures and checks, before its first step or, where it
        continues, the next one; running; silent: it should have shown a sign of life; stopped: it ended without a
        record; diverged; finished.
      model, dataset, policy, format: of its settings; empty while it waits.
      plan: the numbers of its privacy plan; None where they are not known.
      step: number of steps that were taken.
      charged: number of steps that its ledger has charged; None where it cannot be read.
      epsilon: spent. While it runs, at the end of the last epoch.
      curve: epsilon by plan after each of so many equal parts of the run, from 0; empty where it is not known.
      per_epoch: its epochs so far.
      layers: names of the quantizable layers that are known so far.
      gains: {layer: time in full precision over time quantized}, as measured before the run.
      ema: weight of the newest analysis in the scores.
      classes: number of classes; None where accuracy is not told by chance, or is not known.
      records: public number of training records; None: there is none.
      unsafe_metrics: training accuracy is measured, which epsilon does not cover.
      trouble: why it diverged, or what cannot be read; empty if all is well.
      pace: of a run that is not over.
    """

    name: str
    phase: Phase
    model: str = ""
    dataset: str = ""
    policy: str = ""
    format: str = ""
    plan: PlanRecord | None = None
    step: int = 0
    charged: int | None = None
    epsilon: float = 0.0
    curve: Sequence[float] = ()
    per_epoch: Sequence[EpochRecord] = ()
    layers: Sequence[str] = ()
    gains: Mapping[str, float] = dataclasses.field(default_factory=dict)
    ema: float = DEFAULT_EMA
    classes: int | None = None
    records: int | None = None
    unsafe_metrics: bool = False
    trouble: str = ""
    pace: Pace | None = None

    @classmethod
    def of(cls, record: RunRecord, *, name: str, classes: int | None, ema: float = DEFAULT_EMA) -> Self:
        """Return the state of a run that has ended, from its record.

        Args:
          record: of the run.
          name: of its directory.
          classes: number of its classes; None: not known.
          ema: weight of the newest analysis, which a record does not hold.
        """
        return cls(
            name=name,
            phase="finished",
            model=record.model,
            dataset=record.dataset,
            policy=record.policy,
            format=record.format,
            plan=record.plan,
            step=record.steps,
            charged=None if record.ledger is None else record.ledger.count("train"),
            epsilon=record.epsilon,
            per_epoch=record.per_epoch,
            layers=[layer.name for layer in record.layers],
            gains={layer.name: layer.gain for layer in record.layers if layer.gain is not None},
            ema=ema,
            classes=classes if set(record.metrics_test or {}) <= {"accuracy", "balanced_accuracy"} else None,
            records=record.records,
            unsafe_metrics=record.unsafe_metrics,
        )

    @property
    def steps(self) -> int | None:
        """Planned steps; None where the plan is not known."""
        return None if self.plan is None else self.plan.steps

    @property
    def epochs(self) -> int | None:
        """Planned epochs; None where the plan is not known."""
        return None if self.plan is None else self.plan.epochs

    @property
    def score(self) -> Score | None:
        """How well the model does so far; None before that was measured."""
        return score_so_far(self.per_epoch)

    @property
    def share(self) -> float:
        """Share of the planned steps that were taken, in 0..1."""
        return min(1.0, self.step / self.steps) if self.steps else 0.0

    @property
    def epsilon_share(self) -> float:
        """Share of the planned epsilon that is spent, in 0..1."""
        planned = math.inf if self.plan is None else self.plan.epsilon
        return min(1.0, self.epsilon / planned) if 0 < planned < math.inf else 0.0

    @property
    def scores(self) -> Mapping[str, float]:
        """Impact of each layer after the last analysis; {} without one."""
        return next((one.scores for one in reversed(self.per_epoch) if one.scores), {})

    @property
    def score_noise(self) -> float | None:
        """Standard deviation of the noise on each of the last scores; None where it is not known."""
        analyses = sum(one.scores is not None for one in self.per_epoch)
        if self.plan is None or self.plan.analysis is None or analyses == 0:
            return None
        one = self.plan.analysis
        return one.noise_multiplier * one.max_norm / one.expected_batch_size * noise_left(analyses, self.ema)

    @property
    def ever_quantized(self) -> list[str]:
        """The layers that ran quantized in some epoch, in the order of `layers`."""
        ran = {name for one in self.per_epoch for name in one.layers_quantized or ()}
        return [name for name in self.layers if name in ran]
