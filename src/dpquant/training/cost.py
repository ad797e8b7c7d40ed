# SPDX-License-Identifier: Apache-2.0
"""What a schedule gains: measured seconds in, predicted seconds and money out. Arithmetic alone; no torch, no data.

A step of B examples takes

    T(policy) = T_other + B * sum over layers of [ full_l if the layer stays in full precision, else quantized_l ]

with each layer's seconds measured within a step, and T_other what a step in full precision takes beyond them:
normalisation, activations, noise, the optimizer.

The paper's model has one number for the hardware, r (FP4 over FP16: 4), the share p of the work that is quantized, and
an overhead that nothing speeds up:

    T = T_analysis + (1 - p + p / r) (T_train - T_overhead) + T_overhead

Symbols: B examples a step, p share quantized, r low-precision gain. Source: DPQuant, arXiv 2509.03472, its throughput
model.
"""

import dataclasses
from collections.abc import Collection, Mapping

FP4_OVER_FP16 = 4.0
PAPER_SPEEDUPS = (1.75, 2.21)  # at p = 0.9
PAPER_SHARE = 0.9

_LARGEST_ANALYSIS_SHARE = 0.03  # of epsilon
_SMALLEST_SPEEDUP = 1.05
_SMALLEST_SIGNAL = 1.0  # standard deviations of the noise


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerTimes:
    """What a layer takes on a machine, seconds an example: all three products, norm and sum, weight included."""

    full: float
    quantized: float

    @property
    def gain(self) -> float:
        """Above 1 where quantizing makes the layer faster."""
        return self.full / self.quantized


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerCost(LayerTimes):
    """The same with `macs`, the multiply-accumulates of the layer's forward product for one example."""

    macs: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class CostModel:
    """What a training step takes on a machine.

    Attributes:
      layers: by name, in the model's order.
      batch_size: examples a step.
      full_step: seconds of a measured step in full precision.
    """

    layers: Mapping[str, LayerCost]
    batch_size: float
    full_step: float

    @property
    def other(self) -> float:
        """Seconds a step that no layer accounts for."""
        return self.full_step - self.batch_size * sum(layer.full for layer in self.layers.values())

    @property
    def overhead(self) -> float:
        """Its share of a step in full precision; none where the layers, timed apart from it, seem to take all of it."""
        return max(self.other, 0.0) / self.full_step

    def step(self, quantized: Collection[str]) -> float:
        """Predicted seconds of a step in which these layers run quantized."""
        saved = sum(self.layers[name].full - self.layers[name].quantized for name in quantized)
        return self.full_step - self.batch_size * saved

    def with_gain(self, gain: float) -> "CostModel":
        """The same on hardware where a quantized layer takes 1 / gain of its time in full precision."""
        layers = {name: dataclasses.replace(layer, quantized=layer.full / gain) for name, layer in self.layers.items()}
        return dataclasses.replace(self, layers=layers)

    def share_of_time(self, name: str) -> float:
        """A layer's part of a step in full precision."""
        return self.batch_size * self.layers[name].full / self.full_step

    def share_of_macs(self, quantized: Collection[str]) -> float:
        """These layers' part of all multiply-accumulates."""
        total = sum(layer.macs for layer in self.layers.values()) or 1.0
        return sum(self.layers[name].macs for name in quantized) / total


def paper_speedup(share: float, *, gain: float = FP4_OVER_FP16, overhead: float = 0.0, analysis: float = 0.0) -> float:
    """By how much a run gets faster in the paper's model.

    Args:
      share: p, of the work that is quantized.
      gain: r, of quantized work.
      overhead: part of a full-precision run that nothing speeds up.
      analysis: seconds of the analyses over those of a full-precision run.
    """
    return 1 / (analysis + (1 - share + share / gain) * (1 - overhead) + overhead)


def overhead_behind(speedup: float, share: float, *, gain: float = FP4_OVER_FP16, analysis: float = 0.0) -> float:
    """The overhead with which the paper's model gives a speed-up: the inverse of `paper_speedup`."""
    quantized = 1 - share + share / gain
    return (1 / speedup - analysis - quantized) / (1 - quantized)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Savings:
    """What a faster run saves.

    Attributes:
      hours, money: in a month; money in the currency of the cost an hour.
    """

    hours: float
    money: float


def savings(seconds_full: float, seconds_quantized: float, *, runs_per_month: float, cost_per_hour: float) -> Savings:
    """What a month of runs saves, from the seconds of one."""
    hours = (seconds_full - seconds_quantized) / 3600 * runs_per_month
    return Savings(hours=hours, money=hours * cost_per_hour)


def warnings(
    *, speedup: float, analysis_share: float, scores: Collection[float], score_noise: float | None
) -> list[str]:
    """The signs that a schedule will not pay, in words; none if all is well.

    Args:
      speedup: of the whole run, analyses included.
      analysis_share: the part of epsilon that the analyses take.
      scores: the layers' impacts from a run; empty if there is none.
      score_noise: standard deviation of the noise on each of them; None without analyses.
    """
    signs = []
    if analysis_share > _LARGEST_ANALYSIS_SHARE:
        signs.append(
            f"The analyses take {analysis_share:.1%} of epsilon, more than {_LARGEST_ANALYSIS_SHARE:.0%}: training "
            "gets more noise for it. Raise --analysis-noise-multiplier or --analysis-every."
        )
    if len(scores) > 1 and score_noise is not None:
        mean = sum(scores) / len(scores)
        spread = (sum((score - mean) ** 2 for score in scores) / (len(scores) - 1)) ** 0.5
        # the noise is part of the spread that was seen
        signal = max(spread**2 - score_noise**2, 0.0) ** 0.5 / score_noise
        if signal < _SMALLEST_SIGNAL:
            signs.append(
                f"The ranking is noise: impacts differ by {spread:.2g}, of which noise alone makes {score_noise:.2g}. "
                "Raise --analysis-batch-size, or rotate without a ranking."
            )
    if speedup < _SMALLEST_SPEEDUP:
        signs.append(
            f"There is no speed-up to be had: {speedup:.2f} times. Train in full precision (--policy none), or on a "
            "machine with faster int8 instructions."
        )
    return signs
