# SPDX-License-Identifier: Apache-2.0
"""`dpquant assess`: predicts and measures, before training, how much faster quantized layers make a run here.

Each layer is timed twice: while all layers run in full precision, and while all run quantized. Whole steps in full
precision give the time that no layer accounts for (the overhead). From these figures `training/cost.py` predicts the
step of any policy. A few policies are also run, in rotation with the other measurements, and their measured steps are
reported next to the predicted ones. Examples are synthetic, and no record is opened: of the data set only what
is public is used. Texts have the largest length, which real ones seldom have.
"""

import dataclasses
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, cast

import torch
from torch import nn

from dpquant.app.step_times import step_times
from dpquant.app.synthetic import Synthetic, records_like
from dpquant.engine.batches import Microbatch, to_device
from dpquant.engine.passes import Objective, PerExampleLoss
from dpquant.errors import SettingError, did_you_mean
from dpquant.formats import AUTO, format_tried
from dpquant.machine import Hardware, check_threads, now
from dpquant.privacy.analysis_plan import AnalysisPlan
from dpquant.privacy.plan import NoiseLaw, PrivacyPlan
from dpquant.runs.devices import device_of
from dpquant.runs.evaluation import loss_of
from dpquant.runs.names import RECORD
from dpquant.runs.objects import model_of, optimizer_of
from dpquant.runs.record import RunRecord
from dpquant.runs.settings import TrainSettings, plan_of, policy_of
from dpquant.runs.size import check_data_fits
from dpquant.runs.sources import form_of
from dpquant.runs.step_times import keep
from dpquant.training.auto_format import LEAST_GAIN
from dpquant.training.cost import (
    FP4_OVER_FP16,
    PAPER_SHARE,
    PAPER_SPEEDUPS,
    CostModel,
    LayerCost,
    LayerTimes,
    Savings,
    overhead_behind,
    paper_speedup,
    savings,
    warnings,
)
from dpquant.training.execution import layers_to_exclude
from dpquant.training.impact import analysis_keys, impact_sum
from dpquant.training.policies import Policy, Turn, largest_layers, noise_left
from dpquant.training.private import PrivateTraining
from dpquant.training.start import make_private
from dpquant.training.tuning import layer_times_once, median_times

HARDWARE = ("here", "fp4")
# Shares of the multiply-accumulates that the measured policies quantize, largest layers first
SHARES = (0.5, 0.9, 1.0)
_MOST_ROUNDS = 4096
_ANALYSED = 64  # examples on which an analysis is timed


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyTimes:
    """Predicted and measured time of a step under one policy.

    Attributes:
      layers: names of the layers that run quantized.
      share_of_macs: their share of the multiply-accumulates, in 0..1.
      predicted: seconds of a step by the cost model.
      measured: median seconds of whole steps on this machine; None for the `fp4` profile, which cannot be measured.
    """

    layers: tuple[str, ...]
    share_of_macs: float
    predicted: float
    measured: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Usage:
    """Use of a machine for one kind of run.

    Attributes:
      runs_per_month: number of runs in a month, >= 0; with 0 no savings are computed.
      cost_per_hour: of the machine, >= 0, in any currency.
    Raises:
      SettingError: a value is negative or not finite.
    """

    runs_per_month: float = 0.0
    cost_per_hour: float = 0.0

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if not 0 <= value < float("inf"):
                raise SettingError(f"Expected {name} >= 0 and finite; got {name}={value}. It multiplies what is saved.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Assessment:
    """Result of `assess`.

    Attributes:
      model: as in the settings.
      format: number format of the quantized layers.
      batch_size: expected size of a batch, in examples.
      hardware: this machine.
      profile: `here`: quantized layers take the time measured on this machine. `fp4`: they take a quarter of their
        time in full precision.
      layers: {layer: its cost under that profile}.
      impacts: {layer: last private impact} of the earlier run; empty without an earlier run.
      full_step: seconds of a step in full precision, measured on this machine.
      overhead: share of `full_step` that no layer accounts for, in 0..1.
      analysis: seconds of one analysis, estimated from a few examples; 0 if the policy needs no analyses.
      policies: predicted and measured steps at several shares of the multiply-accumulates.
      speedup: time of a run in full precision over the predicted time of a run of the settings, analyses included.
      paper: {speed-up: overhead that gives it} by the paper's model with 90 % of the work quantized.
      paper_here: speed-up by that model with the measured overhead.
      saved: hours and money saved in a month; None if no runs per month were given.
      warnings: reasons why quantizing may not pay off under these settings.
    """

    model: str
    format: str
    batch_size: float
    hardware: Hardware
    profile: str
    layers: Mapping[str, LayerCost]
    impacts: Mapping[str, float]
    full_step: float
    overhead: float
    analysis: float
    policies: Sequence[PolicyTimes]
    speedup: float
    paper: Mapping[float, float]
    paper_here: float
    saved: Savings | None
    warnings: Sequence[str]

    def to_json(self) -> str:
        """Return the assessment as JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"


def assess(
    settings: TrainSettings,
    *,
    hardware: str = "here",
    run: Path | None = None,
    usage: Usage | None = None,
    rounds: int = 8,
    watch: Callable[[str], None] = lambda what: None,
) -> Assessment:
    """Measure the layers and whole steps of a run of these settings, and predict its speed-up.

    Args:
      settings: as for `train`.
      hardware: profile of the predictions: `here` or `fp4` (see `Assessment.profile`).
      run: directory of an earlier run of the same model, which gives the layers' impacts.
      usage: how often the run is repeated and what the machine costs, which gives the savings.
      rounds: number of timings of each layer and of steps of each policy, >= 1.
      watch: called with a few words about each stage when it begins.
    Returns: the assessment.
    Raises:
      DPQuantError: the settings cannot be run, or an argument is out of range.
    Privacy: uses what is public of the data set (`runs.sources.form_of`), and opens no record; charges nothing.
    """
    if hardware not in HARDWARE:
        raise SettingError(
            f"Expected hardware to be one of {', '.join(HARDWARE)}; got hardware={hardware}. "
            f"{did_you_mean(hardware, HARDWARE)}Times are those of this machine or of the paper's assumption."
        )
    if settings.rest != "full":
        raise SettingError(
            f"Expected rest=full for assess; got rest={settings.rest}. Layers are timed in full precision and in "
            "format alone. Leave rest out."
        )
    if not 1 <= rounds <= _MOST_ROUNDS:
        raise SettingError(
            f"Expected rounds in 1 .. {_MOST_ROUNDS}; got rounds={rounds}. One more is run, which is not counted."
        )
    record = None if run is None else RunRecord.read(run / RECORD)
    plan = plan_of(settings)
    if settings.threads is not None:
        check_threads(settings.threads)
        torch.set_num_threads(settings.threads)
    device = device_of(settings.device)
    check_data_fits(settings)
    form = form_of(settings)
    model = model_of(settings, form).to(device)
    watch("looking at the model")
    synthetic, loss_fn = records_like(form, max(round(settings.batch_size), 1)), loss_of(form.task)
    private = _private(settings, model, synthetic, loss_fn, rounds)
    turns = [(), *(largest_layers(private.macs, share) for share in SHARES)]
    costs, steps = _times(private, synthetic, loss_fn, turns, watch)
    full_step = steps[()]
    cost = CostModel(layers=costs, batch_size=settings.batch_size, full_step=full_step)
    if hardware == "fp4":
        cost = cost.with_gain(FP4_OVER_FP16)
    policies = [
        PolicyTimes(
            layers=names,
            share_of_macs=cost.share_of_macs(names),
            predicted=cost.step(names),
            measured=steps[names] if hardware == "here" else None,
        )
        for names in turns
    ]
    watch("timing an analysis")
    analysis = 0.0 if plan.analysis is None else _analysis_seconds(private, synthetic, loss_fn, plan.analysis)
    analyses = len(plan.analysis_epochs())
    step = _mean_step(settings, plan, private, cost)
    if hardware == "here":
        watch("timing a step of fewer examples")
        keep(settings, step_times(settings, private, synthetic, loss_fn, step))
    full_run, quantized_run = plan.steps * full_step, plan.steps * step + analyses * analysis
    impacts = {} if record is None else {r.name: r.last_score for r in record.layers if r.last_score is not None}
    return Assessment(
        model=settings.model,
        format=format_tried(settings.format),
        batch_size=settings.batch_size,
        hardware=Hardware.here(),
        profile=hardware,
        layers=cost.layers,
        impacts=impacts,
        full_step=full_step,
        overhead=cost.overhead,
        analysis=analysis,
        policies=policies,
        speedup=full_run / quantized_run,
        paper={speedup: overhead_behind(speedup, PAPER_SHARE) for speedup in PAPER_SPEEDUPS},
        paper_here=paper_speedup(PAPER_SHARE, overhead=cost.overhead),
        saved=(
            savings(full_run, quantized_run, runs_per_month=usage.runs_per_month, cost_per_hour=usage.cost_per_hour)
            if usage is not None and usage.runs_per_month
            else None
        ),
        warnings=warnings(
            speedup=full_run / quantized_run,
            analysis_share=plan.analysis_share(),
            scores=list(impacts.values()),
            score_noise=_score_noise(settings, plan, analyses),
        ),
    )


class _InTurn(Policy):
    """Policy that takes a given list of layer sets in rotation, so that a temporary slowdown affects all of them."""

    needs_scores: ClassVar[bool] = False

    def __init__(self) -> None:
        self.turns: list[tuple[str, ...]] = []

    def pick(self, turn: Turn) -> tuple[str, ...]:
        """Return the layer set of the epoch; all layers while `turns` is empty."""
        return self.turns[turn.epoch % len(self.turns)] if self.turns else tuple(turn.macs)


def _private(
    settings: TrainSettings, model: nn.Module, synthetic: Synthetic, loss_fn: PerExampleLoss, rounds: int
) -> PrivateTraining:
    """Return a run of the settings' model on synthetic records.

    The sampling rate is 1: every step takes all records, and an epoch is one step.
    """
    plan = PrivacyPlan(
        noise_multiplier=1.0,
        delta=settings.delta,
        max_grad_norm=settings.max_grad_norm,
        sample_rate=1.0,
        expected_batch_size=len(synthetic),
        steps=(len(SHARES) + 1) * (rounds + 1),
        noise=cast("NoiseLaw", settings.noise),
    )
    return make_private(
        model,
        optimizer_of(settings, model),
        synthetic,
        loss_fn=loss_fn,
        plan=plan,
        policy=_InTurn(),
        format=format_tried(settings.format),
        backend=settings.backend,
        microbatch_size=settings.microbatch_size,
        memory=settings.memory,
    )


def _times(
    private: PrivateTraining,
    synthetic: Synthetic,
    loss_fn: PerExampleLoss,
    turns: list[tuple[str, ...]],
    watch: Callable[[str], None],
) -> tuple[dict[str, LayerCost], dict[tuple[str, ...], float]]:
    """Return {layer: its costs} and {quantized layers: seconds of a step}, medians over all rounds but the first.

    Every round times all layers and all turns, because the speed of a machine drifts.
    """
    assert isinstance(private.policy, _InTurn)
    private.policy.turns = turns
    rounds = private.plan.steps // len(turns)
    device = next(private.model.parameters()).device
    layers: list[dict[str, LayerTimes]] = []
    steps: dict[tuple[str, ...], list[float]] = {}
    for number, epoch in enumerate(private.epochs()):
        if number % len(turns) == 0:
            watch(f"timing layers and whole steps, round {len(layers) + 1} of {rounds}")
            layers.append(
                layer_times_once(
                    private.model,
                    loss_fn,
                    to_device(synthetic.first(2), device),
                    microbatch_size=private.execution.microbatch_size,
                    expected_batch_size=len(synthetic),
                )
            )
        for batch in epoch:
            began = now()
            private.step(batch)
            steps.setdefault(epoch.policy, []).append(now() - began)
    costs = {
        name: LayerCost(macs=private.macs[name], full=seconds.full, quantized=seconds.quantized)
        for name, seconds in median_times(layers).items()
    }
    return costs, {names: statistics.median(seconds[1:]) for names, seconds in steps.items()}


def _analysis_seconds(
    private: PrivateTraining, synthetic: Synthetic, loss_fn: PerExampleLoss, analysis: AnalysisPlan
) -> float:
    """Return the seconds of one analysis, extrapolated from a few examples."""
    device = next(private.model.parameters()).device
    began = now()
    impact_sum(
        Objective(private.model, loss_fn),
        [Microbatch(to_device(synthetic.first(_ANALYSED), device), torch.arange(_ANALYSED), _ANALYSED)],
        names=list(private.macs),
        max_norm=1.0,
        keys=analysis_keys(0, 0),
        score=analysis.score,
    )
    return (now() - began) / _ANALYSED * analysis.expected_batch_size


def _mean_step(settings: TrainSettings, plan: PrivacyPlan, private: PrivateTraining, model: CostModel) -> float:
    """Return the predicted seconds of a step, averaged over the epochs with the layers that the policy chooses."""
    policy, macs = policy_of(settings), private.macs
    gains = {name: layer.gain for name, layer in model.layers.items()}
    excluded = layers_to_exclude(policy, macs, gains)
    if settings.format == AUTO:
        excluded = tuple(name for name in macs if gains.get(name, 0.0) < LEAST_GAIN)
    epochs = range(plan.epochs)
    return statistics.mean(
        model.step(policy.choose(macs, None, epoch=epoch, key=settings.seed, excluded=excluded)) for epoch in epochs
    )


def _score_noise(settings: TrainSettings, plan: PrivacyPlan, analyses: int) -> float | None:
    """Return the standard deviation of the noise on a run's last smoothed impacts; None without analyses."""
    if plan.analysis is None:
        return None
    one = plan.analysis_noise_std(plan.analysis.max_norm) / plan.analysis.expected_batch_size
    return one * noise_left(analyses, settings.ema)
