# SPDX-License-Identifier: Apache-2.0
"""The privacy plan: sampling, sensitivity, noise and accounting of a run, joined before any data is read.

    plan = PrivacyPlan.for_epochs(records=60_000, batch_size=1024, epochs=20, epsilon=8.0, delta=1e-5)
    plan.noise_multiplier    # calibrated: training and analyses together cost epsilon = 8.0

Every setting is public. Sample rates and batch sizes are literals, never computed from the private data set, because
the size of the data set would then scale the released gradients. A plan holds no speed setting and does not change
during a run, so the calibrated budget is the budget that is spent. A plan draws no noise and reads no data; it only
says how large the noise must be.

This file loads no torch, so that a budget can be planned on any machine.

Symbols: q sample_rate, sigma noise_multiplier, C max_grad_norm (training) and max_norm (analysis), T steps.
"""

import dataclasses
import json
import math
import warnings
from collections.abc import Sequence
from typing import Literal, Self

from dpquant.errors import SettingError
from dpquant.privacy import accounting
from dpquant.privacy.analysis_plan import AnalysisPlan
from dpquant.privacy.events import Budget, Event
from dpquant.privacy.grid_noise import grid_of
from dpquant.privacy.meaning import Meaning, epsilon_of_person, meaning_of
from dpquant.privacy.ranges import checked, checked_choice, checked_rate
from dpquant.privacy.statement import rounded_up, statement_of

NoiseLaw = Literal["gaussian", "discrete"]

_NOISE_ADVICE = "It is the noise's law. Use gaussian, or discrete, which costs time and may be released bit by bit."
LARGE_DELTA = 1e-2  # a larger delta is a weak guarantee for a data set of any size


@dataclasses.dataclass(frozen=True, init=False)
class PrivacyPlan:
    """The privacy budget of a run. Given epsilon, the noise is calibrated; given the noise, epsilon is computed.

    Attributes:
      epsilon: the target; if the noise was given, the cost of the planned run.
      noise_multiplier: standard deviation of the training noise over the sensitivity; at least 0.1.
      delta: of the (epsilon, delta) guarantee; should be far below 1 / records.
      max_grad_norm: L2 norm to which each example's gradient is clipped.
      sample_rate: probability with which each record takes part in a step.
      expected_batch_size: public number by which the noised sum of gradients is divided.
      steps: number of training steps.
      analysis: settings of the analyses; None if there are none.
      noise: `gaussian`, in floating point, or `discrete`: integers on a grid, to be released bit by bit.
      records_per_person: public number of records that a person has at most, for the statement; None: not known.
    """

    epsilon: float
    noise_multiplier: float
    delta: float
    max_grad_norm: float
    sample_rate: float
    expected_batch_size: float
    steps: int
    analysis: AnalysisPlan | None
    noise: NoiseLaw
    records_per_person: int | None

    def __init__(
        self,
        *,
        epsilon: float | None = None,
        noise_multiplier: float | None = None,
        delta: float,
        max_grad_norm: float,
        sample_rate: float,
        expected_batch_size: float,
        steps: int,
        analysis: AnalysisPlan | None = None,
        noise: NoiseLaw = "gaussian",
        records_per_person: int | None = None,
    ):
        """Check every setting and calibrate the noise.

        Args:
          epsilon: target for training and analyses together, in [1e-3, 500].
          noise_multiplier: in [0.1, 1e9]; given instead of epsilon.
          delta: in [1e-12, 0.5]; a value above 1e-2 gives a warning.
          max_grad_norm: in [1e-15, 1e15].
          sample_rate: in [1e-12, 1].
          expected_batch_size: in [1e-9, 1e15].
          steps: in [1, 1e6].
          analysis: None for policies that need no scores.
          noise: law of the noise of training and analyses.
          records_per_person: in [1, 64]; epsilon and delta are those of one record all the same.
        Raises:
          SettingError: a value out of range, both or neither of epsilon and noise_multiplier, more analyses than
            epochs, or an epsilon that cannot be met.
        """
        if (epsilon is None) == (noise_multiplier is None):
            raise SettingError(
                f"Expected exactly one of epsilon and noise_multiplier; got epsilon={epsilon}, "
                f"noise_multiplier={noise_multiplier}. Either one follows from the other. Give one."
            )
        given = {"noise_multiplier": noise_multiplier} if epsilon is None else {"epsilon": epsilon}
        given |= {"delta": delta, "max_grad_norm": max_grad_norm, "sample_rate": sample_rate}
        given |= {"expected_batch_size": expected_batch_size, "steps": steps}
        for name, value in given.items():
            object.__setattr__(self, name, checked(name, value))
        object.__setattr__(self, "analysis", analysis)
        object.__setattr__(self, "noise", checked_choice("noise", noise, NoiseLaw, _NOISE_ADVICE))
        most = None if records_per_person is None else checked("records_per_person", records_per_person)
        object.__setattr__(self, "records_per_person", most)
        self._check_analysis()
        if epsilon is None:
            object.__setattr__(self, "epsilon", self.epsilon_spent())
        else:
            sigma = accounting.calibrate(
                self.epsilon,
                self.delta,
                sample_rate=self.sample_rate,
                steps=self.steps,
                fixed=self._events(0, len(self.analysis_epochs())),
            )
            object.__setattr__(self, "noise_multiplier", sigma)
        if self.delta > LARGE_DELTA:
            warnings.warn(
                f"delta={self.delta:g} is large. It is delta of the (epsilon, delta) guarantee: choose it far below "
                "1 / records.",
                stacklevel=2,
            )

    @classmethod
    def for_epochs(
        cls,
        *,
        records: int,
        batch_size: float,
        epochs: int,
        epsilon: float,
        delta: float,
        max_grad_norm: float = 1.0,
        analysis: bool = True,
    ) -> Self:
        """Return the plan of a run over a data set of about this size.

        Args:
          records: public, if need be approximate, number of training records. Do not count a private data set.
          batch_size: expected size of a Poisson batch, at most `records`.
          epochs: of round(records / batch_size) steps each.
          epsilon: target for training and analyses together.
          delta: far below 1 / records.
          max_grad_norm: as for `PrivacyPlan`.
          analysis: one an epoch, which `DPQuantPolicy` and `PrioritisePolicy` need, and which others would waste.
        Raises:
          SettingError: a value out of range.
        """
        rate = checked_rate(records, batch_size)
        return cls(
            epsilon=epsilon,
            delta=delta,
            max_grad_norm=max_grad_norm,
            sample_rate=rate,
            expected_batch_size=batch_size,
            steps=int(checked("epochs", epochs)) * max(1, round(1 / rate)),
            analysis=AnalysisPlan.for_epochs(epochs, rate, batch_size) if analysis else None,
        )

    @property
    def epoch_steps(self) -> int:
        """Number of steps in an epoch: 1 / sample_rate, rounded."""
        return max(1, round(1 / self.sample_rate))

    @property
    def epochs(self) -> int:
        """Number of epochs, of which the last may be shorter."""
        return -(-self.steps // self.epoch_steps)

    def analysis_epochs(self) -> tuple[int, ...]:
        """Return the indices of the epochs that begin with an analysis, counted from 0."""
        count = 0 if self.analysis is None else self.analysis.count
        return tuple(i * self.epochs // count for i in range(count))

    def train_noise_std(self, sensitivity: float) -> float:
        """Return the standard deviation of the noise on a sum of gradients, in units of the sum."""
        return self.noise_multiplier * sensitivity

    def analysis_noise_std(self, sensitivity: float) -> float:
        """Return the standard deviation of the noise on a sum of impacts, in units of the sum.

        Raises:
          SettingError: no analysis is planned.
        """
        if self.analysis is None:
            raise SettingError("Expected an analysis in the plan; got analysis=None. It has no noise. Plan one.")
        return self.analysis.noise_multiplier * sensitivity

    def grid(self, std: float) -> float | None:
        """Return the grid of sums whose noise has a standard deviation, in their units; None with Gaussian noise."""
        return grid_of(std) if self.noise == "discrete" else None

    def events(self) -> list[Event]:
        """Return the events of a complete run."""
        return self._events(self.steps, len(self.analysis_epochs()))

    def budget(self) -> Budget:
        """Return what a run of this plan may release, for its ledger."""
        return Budget(epsilon=self.epsilon, delta=self.delta, events=tuple(self.events()))

    def epsilon_spent(self, *, steps: int | None = None, analyses: int | None = None) -> float:
        """Return epsilon at the plan's delta after the given numbers of steps and analyses.

        Args:
          steps: training steps taken; None for all planned steps.
          analyses: analyses made; None for all planned analyses.
        Raises:
          SettingError: a negative number, or analyses in a plan without any.
        Privacy: post-processing.
        """
        steps = self.steps if steps is None else steps
        analyses = len(self.analysis_epochs()) if analyses is None else analyses
        return accounting.epsilon(self._events(steps, analyses), self.delta)

    def analysis_share(self) -> float:
        """Return the share of the planned epsilon that a run without analyses would save, in [0, 1]."""
        return accounting.analysis_share(self.events(), self.delta)

    def meaning(self) -> Meaning | None:
        """Return what the planned epsilon means in risk; None if there is none. Takes a fraction of a second."""
        return meaning_of(self.events(), self.delta)

    def table(self) -> list[tuple[str, str]]:
        """Return the budget as rows (name, value) of text."""
        rows = [
            ("sample rate", f"{self.sample_rate:.6g}"),
            ("expected batch size", f"{self.expected_batch_size:g}"),
            ("steps", f"{self.steps} ({self.epochs} epochs of {self.epoch_steps})"),
            ("clipping norm", f"{self.max_grad_norm:g}"),
            ("noise multiplier", f"{self.noise_multiplier:.4f}"),
            *([("noise", "discrete")] if self.noise == "discrete" else []),
        ]
        if self.analysis is not None:
            rows += [
                ("analyses", f"{self.analysis.count}"),
                ("analysis sample rate", f"{self.analysis.sample_rate:.6g}"),
                ("analysis expected batch size", f"{self.analysis.expected_batch_size:g}"),
                ("analysis clipping norm", f"{self.analysis.max_norm:g}"),
                ("analysis noise multiplier", f"{self.analysis.noise_multiplier:.4f}"),
                ("analysis share of epsilon", f"{self.analysis_share():.2%}"),
            ]
        return [
            *rows,
            ("delta", f"{self.delta:g}"),
            ("epsilon (PLD)", rounded_up(self.epsilon_spent())),
            ("epsilon (RDP, as a check)", rounded_up(accounting.epsilon(self.events(), self.delta, "rdp"))),
        ]

    def epsilon_per_person(self, events: Sequence[Event] | None = None) -> float | None:
        """Return epsilon for a person with `records_per_person` records; None if that number is not known.

        Args:
          events: the releases, from the ledger; None for those of a complete run.
        """
        if self.records_per_person is None:
            return None
        return epsilon_of_person(self.events() if events is None else events, self.delta, self.records_per_person)

    def meaning_table(self) -> list[tuple[str, str]]:
        """Return what the planned epsilon means as rows (name, value) of text; empty if it is infinite."""
        meaning = self.meaning()
        rows = [] if meaning is None else meaning.rows()
        if (person := self.epsilon_per_person()) is not None:
            rows.append((f"epsilon of a person with up to {self.records_per_person} records", rounded_up(person, 2)))
        return rows

    def to_json(self) -> str:
        """Return the budget as JSON with typed values, for programs.

        `epsilon` is the cost of the whole plan at `delta`. `analysis_share` is the share of it that a run without
        analyses would save. `analysis` is null if none is planned. `epsilon_per_person` is null without
        `records_per_person`. `meaning` is what an attacker gains (`Meaning`). A number that is not finite is null.
        """
        facts = {
            "epsilon": self.epsilon_spent(),
            "delta": self.delta,
            "noise_multiplier": self.noise_multiplier,
            "sample_rate": self.sample_rate,
            "expected_batch_size": self.expected_batch_size,
            "noise": self.noise,
            "steps": self.steps,
            "epochs": self.epochs,
            "max_grad_norm": self.max_grad_norm,
            "analysis": None if self.analysis is None else dataclasses.asdict(self.analysis),
            "analysis_share": self.analysis_share(),
            "records_per_person": self.records_per_person,
            "epsilon_per_person": self.epsilon_per_person(),
            "meaning": None if (meaning := self.meaning()) is None else dataclasses.asdict(meaning),
        }
        known = {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in facts.items()}
        return json.dumps(known, indent=2) + "\n"

    def statement(
        self,
        *,
        events: Sequence[Event] | None = None,
        secure: bool = True,
        num_values: int | None = None,
        processes: int = 1,
        records_apart: bool = False,
    ) -> str:
        """Return the privacy statement: what is guaranteed after these releases and what is not, in words.

        Args:
          events: the releases, from the ledger; None for those of a complete run.
          secure: False if sampling or noise came from a given seed.
          num_values: trainable numbers of the model, if they are known; discrete noise says what it costs for them.
          processes: that the run has had, at most. Of several the statement says what connects them and is trusted.
          records_apart: each process had records of its own, and no other ones.
        Privacy: post-processing.
        """
        events = self.events() if events is None else events
        return statement_of(
            self, events, secure=secure, num_values=num_values, processes=processes, apart=records_apart
        )

    def _events(self, steps: int, analyses: int) -> list[Event]:
        """Return the events of some steps and analyses. Without steps it also works before the noise is calibrated."""
        if analyses and self.analysis is None:
            raise SettingError(f"Expected an analysis in the plan; got analysis=None, analyses={analyses}. Plan one.")
        planned: list[tuple[Literal["train", "analysis"], PrivacyPlan | AnalysisPlan | None, int]] = [
            ("train", self, steps),
            ("analysis", self.analysis, analyses),
        ]
        return [
            Event(kind=kind, sample_rate=plan.sample_rate, noise_multiplier=plan.noise_multiplier, count=count)
            for kind, plan, count in planned
            if plan is not None and count != 0
        ]

    def _check_analysis(self) -> None:
        if self.analysis is not None and not isinstance(self.analysis, AnalysisPlan):
            raise SettingError(
                f"Expected analysis to be an AnalysisPlan or None; got a {type(self.analysis).__name__}. "
                "Make it with dpquant.AnalysisPlan."
            )
        if self.analysis is not None and self.analysis.count > self.epochs:
            raise SettingError(
                f"Expected analysis.count <= {self.epochs}, the number of epochs; got "
                f"analysis.count={self.analysis.count}. Layers are chosen once an epoch, so more analyses would be "
                "wasted. Plan fewer, or more steps."
            )
