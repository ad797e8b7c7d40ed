# SPDX-License-Identifier: Apache-2.0
"""Cost model of quantized training: predicts seconds and money from measured seconds. Loads no torch and reads no data.

A step of B examples takes

    T(policy) = T_other + B * sum over layers of [ full_l if the layer stays in full precision, else quantized_l ]

where full_l and quantized_l are a layer's seconds an example, measured within a step, and T_other is the rest of a step
in full precision: normalisation, activations, noise, the optimizer.

The paper's model describes the hardware by one number, r (4 for FP4 over FP16), with the share p of the work that is
quantized and an overhead that quantization does not speed up:

    T = T_analysis + (1 - p + p / r) (T_train - T_overhead) + T_overhead

Symbols: B examples a step, p share quantized, r low-precision gain. Source: DPQuant, arXiv 2509.03472, its throughput
model.
"""

import dataclasses
from collections.abc import Collection, Mapping

FP4_OVER_FP16 = 4.0
PAPER_SPEEDUPS = (1.75, 2.21)  # of the paper, at p = PAPER_SHARE
PAPER_SHARE = 0.9

_LARGEST_ANALYSIS_SHARE = 0.03  # of epsilon
_SMALLEST_SPEEDUP = 1.05
_SMALLEST_SIGNAL = 1.0  # spread of the scores over the standard deviation of their noise


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerTimes:
    """Time of a layer on a machine, in seconds an example: all three products, gradient norm and sum, quantization of
    its weight included.

    Attributes:
      full: in full precision.
      quantized: quantized.
    """

    full: float
    quantized: float

    @property
    def gain(self) -> float:
        """Speed-up of the layer by quantization; above 1 where it gets faster."""
        return self.full / self.quantized


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerCost(LayerTimes):
    """Time and work of a layer.

    Attributes:
      macs: multiply-accumulates of the layer's forward product, for one example.
    """

    macs: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class CostModel:
    """Time of a training step on a machine, by layer.

    Attributes:
      layers: {layer: its cost}, in the model's order.
      batch_size: examples a step.
      full_step: measured seconds of a step in full precision.
    """

    layers: Mapping[str, LayerCost]
    batch_size: float
    full_step: float

    @property
    def other(self) -> float:
        """Seconds of a step in full precision that are not spent in layers: T_other."""
        return self.full_step - self.batch_size * sum(layer.full for layer in self.layers.values())

    @property
    def overhead(self) -> float:
        """Share of `other` in a step in full precision; 0 where the layers' times, measured separately, exceed it."""
        return max(self.other, 0.0) / self.full_step

    def step(self, quantized: Collection[str]) -> float:
        """Return the predicted seconds of a step in which the named layers run quantized."""
        saved = sum(self.layers[name].full - self.layers[name].quantized for name in quantized)
        return self.full_step - self.batch_size * saved

    def with_gain(self, gain: float) -> "CostModel":
        """Return the cost model for hardware on which a quantized layer takes 1 / gain of its full-precision time."""
        layers = {name: dataclasses.replace(layer, quantized=layer.full / gain) for name, layer in self.layers.items()}
        return dataclasses.replace(self, layers=layers)

    def share_of_time(self, name: str) -> float:
        """Return a layer's share of the time of a step in full precision."""
        return self.batch_size * self.layers[name].full / self.full_step

    def share_of_macs(self, quantized: Collection[str]) -> float:
        """Return the named layers' share of all multiply-accumulates."""
        total = sum(layer.macs for layer in self.layers.values()) or 1.0
        return sum(self.layers[name].macs for name in quantized) / total


def paper_speedup(share: float, *, gain: float = FP4_OVER_FP16, overhead: float = 0.0, analysis: float = 0.0) -> float:
    """Return the speed-up of a run in the paper's model.

    Args:
      share: p, the share of the work that is quantized.
      gain: r, the speed-up of quantized work.
      overhead: share of a full-precision run that quantization does not speed up.
      analysis: time of all analyses over the time of a full-precision run.
    """
    return 1 / (analysis + (1 - share + share / gain) * (1 - overhead) + overhead)


def overhead_behind(speedup: float, share: float, *, gain: float = FP4_OVER_FP16, analysis: float = 0.0) -> float:
    """Return the overhead at which the paper's model gives a speed-up: the inverse of `paper_speedup`."""
    quantized = 1 - share + share / gain
    return (1 / speedup - analysis - quantized) / (1 - quantized)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Savings:
    """Savings in a month.

    Attributes:
      hours: machine time.
      money: in the currency of the cost an hour.
    """

    hours: float
    money: float


def savings(seconds_full: float, seconds_quantized: float, *, runs_per_month: float, cost_per_hour: float) -> Savings:
    """Return the savings in a month from the seconds of one run in full precision and of one quantized run."""
    hours = (seconds_full - seconds_quantized) / 3600 * runs_per_month
    return Savings(hours=hours, money=hours * cost_per_hour)


def noisy_ranking(scores: Collection[float], score_noise: float) -> str:
    """Return a warning if the ranking of layers by their scores is noise; "" if it is not, or there is none.

    Args:
      scores: the layers' impacts.
      score_noise: standard deviation of the noise on each of them.
    """
    if len(scores) < 2 or score_noise <= 0:
        return ""
    mean = sum(scores) / len(scores)
    spread = (sum((score - mean) ** 2 for score in scores) / (len(scores) - 1)) ** 0.5
    # the observed spread contains the noise
    signal = max(spread**2 - score_noise**2, 0.0) ** 0.5 / score_noise
    if signal >= _SMALLEST_SIGNAL:
        return ""
    return (
        f"The ranking is noise: impacts differ by {spread:.2g}, of which noise alone makes {score_noise:.2g}. Raise "
        "--analysis-batch-size, or rotate without a ranking."
    )


def warnings(
    *, speedup: float, analysis_share: float, scores: Collection[float], score_noise: float | None
) -> list[str]:
    """Return warnings about settings under which quantization will not pay off; empty if there are none.

    Args:
      speedup: of the whole run, analyses included.
      analysis_share: share of epsilon that the analyses cost.
      scores: the layers' impacts from a run; empty without a run.
      score_noise: standard deviation of the noise on each score; None without analyses.
    """
    found = []
    if analysis_share > _LARGEST_ANALYSIS_SHARE:
        found.append(
            f"The analyses take {analysis_share:.1%} of epsilon, more than {_LARGEST_ANALYSIS_SHARE:.0%}: training "
            "gets more noise for it. Raise --analysis-noise-multiplier or --analysis-every."
        )
    if score_noise is not None and (noise := noisy_ranking(scores, score_noise)):
        found.append(noise)
    if speedup < _SMALLEST_SPEEDUP:
        found.append(
            f"There is no speed-up to be had: {speedup:.2f} times. Train in full precision (--policy none), or on a "
            "machine with faster int8 instructions."
        )
    return found
