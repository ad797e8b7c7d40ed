# SPDX-License-Identifier: Apache-2.0
"""The plan: the one place where sampling, sensitivity, noise and accounting are joined, before any data is touched.

    plan = PrivacyPlan(epsilon=8.0, delta=1e-5, max_grad_norm=1.0, sample_rate=1024 / 60_000, expected_batch_size=1024,
                       steps=1172, analysis=AnalysisPlan(count=10, sample_rate=256 / 60_000, expected_batch_size=256,
                                                         noise_multiplier=2.0, max_norm=1.0))
    plan.noise_multiplier    # so that training and analyses together cost 8.0

Every setting is public: rates and batch sizes are literals, never computed from the private data set, whose size would
otherwise scale the released gradients. A plan holds no speed setting and nothing in it changes during a run, so what
was calibrated is what is spent. It draws no noise and reads no data; it says how much noise there has to be.

This file loads no torch, so that a budget can be planned on any machine.

Symbols: q sample_rate, sigma noise_multiplier, C max_grad_norm (training) and max_norm (analysis), T steps.
"""

import dataclasses
import json
import math
import warnings
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

from dpquant.errors import SettingError
from dpquant.privacy import accounting
from dpquant.privacy.events import Event

Score = Literal["loss", "gradient"]  # what a layer's impact is measured by

LARGE_DELTA = 1e-2  # from here on the guarantee says little, however small the data set


class _Rule(NamedTuple):
    """Between which values a setting makes sense, and what to know and do otherwise."""

    low: float
    high: float
    advice: str
    number: type[int] | type[float] = float


_NORM = _Rule(1e-15, 1e15, "Without a bound there is no sensitivity; float32 has to hold it. Pass a clipping norm.")
_RULES = {
    "epsilon": _Rule(1e-3, 500, "Less cannot be computed well, more promises nothing. Values from 1 to 10 are usual."),
    "noise_multiplier": _Rule(
        accounting.SMALLEST_NOISE,
        1e9,
        "It is noise over sensitivity; too little hides nothing. Values near 1 are usual.",
    ),
    "delta": _Rule(
        accounting.SMALLEST_DELTA,
        0.5,
        "It is delta of the (epsilon, delta) guarantee. Choose it far below 1 / records.",
    ),
    "max_grad_norm": _NORM,
    "max_norm": _NORM,
    "sample_rate": _Rule(
        1e-12, 1, "With this probability a record is drawn. Pass expected_batch_size over a public data set size."
    ),
    "expected_batch_size": _Rule(
        1e-9, 1e15, "Noised sums are divided by it. Pass a public number: sample_rate times a public data set size."
    ),
    "steps": _Rule(1, 1e6, "They fix the privacy budget. Plan at least one.", int),
    "count": _Rule(0, 1e6, "So many analyses are made. Plan one for every few epochs.", int),
    "repeats": _Rule(1, 1e4, "So many roundings are averaged. Use 1, or a few.", int),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnalysisPlan:
    """The private measurements of impact that the schedule lives on.

    Attributes:
      count: how many, spread evenly over the epochs, the first before any step.
      sample_rate: each record's probability to take part in one, in (0, 1].
      expected_batch_size: public number that the noised sum of impacts is divided by.
      noise_multiplier: noise over sensitivity, >= 0.1.
      max_norm: L2 norm that each example's impact vector is clipped to, in units of the score.
      repeats: rounding draws averaged before the clip; costs time, not privacy.
      score: what an impact is measured by: `gradient`, 1 - the cosine of an example's gradient with a layer quantized
        and in full precision; or `loss`, the paper's.
    Raises:
      SettingError: a value out of range.
    """

    count: int
    sample_rate: float
    expected_batch_size: float
    noise_multiplier: float
    max_norm: float
    repeats: int = 1
    score: Score = "gradient"

    def __post_init__(self) -> None:
        if self.score not in get_args(Score):
            raise SettingError(
                f"Expected analysis.score to be one of {', '.join(get_args(Score))}; got score={self.score!r}. It says "
                "what a layer's impact is measured by. Use loss, as the paper does, or gradient."
            )
        for field in dataclasses.fields(self):
            if field.name in _RULES:
                object.__setattr__(self, field.name, _checked(field.name, getattr(self, field.name), "analysis."))


@dataclasses.dataclass(frozen=True, init=False)
class PrivacyPlan:
    """What a run may spend and how. Give epsilon, and the noise is calibrated; or give the noise, and read epsilon.

    Attributes:
      epsilon: the target; or what the planned run costs, if the noise was given.
      noise_multiplier: training noise over sensitivity; calibrated, if epsilon was given, and then at least 0.1.
      delta: of the (epsilon, delta) guarantee; far below 1 / records.
      max_grad_norm: L2 norm that each example's gradient is clipped to.
      sample_rate: each record's probability to take part in a step.
      expected_batch_size: public number that the noised sum of gradients is divided by.
      steps: how many.
      analysis: the measurements that the schedule needs, or None.
    """

    epsilon: float
    noise_multiplier: float
    delta: float
    max_grad_norm: float
    sample_rate: float
    expected_batch_size: float
    steps: int
    analysis: AnalysisPlan | None

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
    ):
        """Check every setting and calibrate.

        Args:
          epsilon: of training and analyses together, in [1e-3, 500].
          noise_multiplier: instead of epsilon, in [0.1, 1e9].
          delta: in [1e-12, 0.5]; above 1e-2 with a warning.
          max_grad_norm: > 0.
          sample_rate: in (0, 1].
          expected_batch_size: > 0.
          steps: >= 1.
          analysis: None for policies that need no scores.
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
            object.__setattr__(self, name, _checked(name, value))
        object.__setattr__(self, "analysis", analysis)
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

    @property
    def epoch_steps(self) -> int:
        """Steps in an epoch: 1 / sample_rate, rounded."""
        return max(1, round(1 / self.sample_rate))

    @property
    def epochs(self) -> int:
        """Epochs, of which the last may be shorter."""
        return -(-self.steps // self.epoch_steps)

    def analysis_epochs(self) -> tuple[int, ...]:
        """The epochs, from 0, that begin with an analysis."""
        count = 0 if self.analysis is None else self.analysis.count
        return tuple(i * self.epochs // count for i in range(count))

    def train_noise_std(self, sensitivity: float) -> float:
        """Standard deviation of the noise on a sum of gradients, in its units."""
        return self.noise_multiplier * sensitivity

    def analysis_noise_std(self, sensitivity: float) -> float:
        """Standard deviation of the noise on a sum of impacts, in its units.

        Raises:
          SettingError: no analysis is planned.
        """
        if self.analysis is None:
            raise SettingError("Expected an analysis in the plan; got analysis=None. It has no noise. Plan one.")
        return self.analysis.noise_multiplier * sensitivity

    def events(self) -> list[Event]:
        """What will be released if the run goes to its end."""
        return self._events(self.steps, len(self.analysis_epochs()))

    def epsilon_spent(self, *, steps: int | None = None, analyses: int | None = None) -> float:
        """Epsilon at the plan's delta after so many steps and analyses.

        Args:
          steps: taken; None for all that are planned.
          analyses: made; None for all that are planned.
        Raises:
          SettingError: a negative number, or analyses that are not planned.
        Privacy: post-processing.
        """
        steps = self.steps if steps is None else steps
        analyses = len(self.analysis_epochs()) if analyses is None else analyses
        return accounting.epsilon(self._events(steps, analyses), self.delta)

    def analysis_share(self) -> float:
        """The part of the planned epsilon that would be saved without analyses, in [0, 1]."""
        total = self.epsilon_spent()
        return (total - self.epsilon_spent(analyses=0)) / total if total > 0 else 0.0

    def table(self) -> list[tuple[str, str]]:
        """The budget as rows (what, how much), for people."""
        rows = [
            ("sample rate", f"{self.sample_rate:.6g}"),
            ("expected batch size", f"{self.expected_batch_size:g}"),
            ("steps", f"{self.steps} ({self.epochs} epochs of {self.epoch_steps})"),
            ("clipping norm", f"{self.max_grad_norm:g}"),
            ("noise multiplier", f"{self.noise_multiplier:.4f}"),
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

    def to_json(self) -> str:
        """The budget as JSON, with numbers as numbers, for programs.

        `epsilon` is what everything that is planned costs at `delta`, and `analysis_share` the part of it that the
        analyses cost. `analysis` is null where none is planned; so is a number that is not finite.
        """
        facts = {
            "epsilon": self.epsilon_spent(),
            "delta": self.delta,
            "noise_multiplier": self.noise_multiplier,
            "sample_rate": self.sample_rate,
            "expected_batch_size": self.expected_batch_size,
            "steps": self.steps,
            "epochs": self.epochs,
            "max_grad_norm": self.max_grad_norm,
            "analysis": None if self.analysis is None else dataclasses.asdict(self.analysis),
            "analysis_share": self.analysis_share(),
        }
        known = {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in facts.items()}
        return json.dumps(known, indent=2) + "\n"

    def statement(self, *, events: Sequence[Event] | None = None, secure: bool = True) -> str:
        """What is guaranteed after these releases, and what is not, in words.

        Args:
          events: what was released, as the ledger has it; None for all that is planned.
          secure: False if sampling or noise came from a seed.
        Privacy: post-processing.
        """
        events = self.events() if events is None else events
        spent, check = (accounting.epsilon(events, self.delta, accountant) for accountant in ("pld", "rdp"))
        released = "; ".join(map(self._described, events)) or "nothing was released"
        lines = [
            f"Differential privacy with epsilon = {rounded_up(spent)} and delta = {self.delta:g}, for the model and "
            "everything else that the run released (layer scores, schedule, this statement).",
            "Neighbouring data sets differ by one record, added or removed; the unit of protection is one record.",
            f"Mechanism: Poisson-subsampled Gaussian: {released}.",
            f"Accountant: {accounting.version()}, privacy loss distributions on a grid of {accounting.GRID:g}, rounded "
            f"to the pessimistic side; Renyi accounting, as a check: epsilon = {rounded_up(check)}.",
            "Taken as public: the settings above; the numbers given as records and expected batch size, which need not "
            "be the true ones; the shapes and types of a record; the list of classes. The true number of records is "
            "not public.",
            "Public randomness (`seed`) only initialises the model and schedules its layers. Sampling, noise, "
            "rounding, dropout and random augmentation follow from a secret key of the run.",
            "Not covered: hyper-parameter tuning and other runs on the same data; pre-processing that was fitted to "
            "the data; several records of one person; floating-point side channels (the proof is about real numbers); "
            "timing and memory.",
        ]
        if not secure:
            lines.insert(
                0,
                "NOT PRIVATE: sampling or noise came from a given seed, for research. Whoever knows the seed can undo "
                "the noise. With secret randomness the following would hold.",
            )
        return "\n".join(lines)

    def _events(self, steps: int, analyses: int) -> list[Event]:
        """Events of so many steps and analyses; without steps none that needs the noise multiplier to be known yet."""
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

    def _described(self, event: Event) -> str:
        """An event in words."""
        if event.kind == "train":
            what = f"{event.count} training steps, gradients clipped to {self.max_grad_norm:g}"
        else:
            norm = "" if self.analysis is None else f", impacts clipped to {self.analysis.max_norm:g}"
            what = f"{event.count} analyses{norm}"
        return f"{what}, noise multiplier {event.noise_multiplier:.4f}, sample rate {event.sample_rate:.6g}"

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


def _checked(name: str, value: Any, prefix: str = "") -> float:
    """The setting as a Python number, or the error that says what it should have been."""
    rule = _RULES[name]
    scalar = value.item() if getattr(value, "ndim", None) == 0 else value  # numpy's and torch's scalars
    if isinstance(scalar, bool) or not isinstance(scalar, int | rule.number) or not rule.low <= scalar <= rule.high:
        kind = "to be a whole number in" if rule.number is int else "in"
        raise SettingError(
            f"Expected {prefix}{name} {kind} [{rule.low:g}, {rule.high:g}]; got {name}={value!r}. {rule.advice}"
        )
    return rule.number(scalar)


def rounded_up(epsilon: float, digits: int = 4) -> str:
    """An epsilon with so many decimals, never less than the number itself: it is an upper bound and stays one."""
    unit = 10**digits
    return f"{math.ceil(epsilon * unit) / unit:.{digits}f}" if math.isfinite(epsilon) else "infinity"
