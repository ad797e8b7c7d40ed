# SPDX-License-Identifier: Apache-2.0
"""Execution of a run on this machine: precisions, microbatch sizes, and layers that are not worth quantizing.

`choose_execution` decides once, before any record is read, by timing synthetic examples. No decision enters the
accounting.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, Self

import torch
from torch import nn

from dpquant.backends.choose import decided
from dpquant.backends.interface import Backend
from dpquant.backends.reference import Reference
from dpquant.backends.registry import reason_for
from dpquant.engine.batches import leaves
from dpquant.engine.layers import quantizable_layers, set_policy, set_precisions
from dpquant.engine.passes import Objective
from dpquant.engine.quantizable import QuantizableLayer
from dpquant.errors import SettingError
from dpquant.formats import FULL_PRECISION, Precision
from dpquant.privacy.plan import PrivacyPlan
from dpquant.training.auto_format import Units, taken, units_of
from dpquant.training.filling import of_analysis
from dpquant.training.policies import Policy
from dpquant.training.tuning import (
    ANALYSIS_MICROBATCH,
    HERE,
    Instruments,
    fastest_microbatch_size,
    largest_analysis_size,
    largest_tried,
    layer_times,
    step_gain,
    worth_timing,
)

ReasonFor = Callable[[Backend, Sequence[Precision], torch.device], str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExecutionRequest:
    """Execution settings that the user gives.

    Attributes:
      chosen: precision of the layers that the policy chooses.
      rest: precision of all other layers.
      auto: the user has given no format, but `auto`.
      units: with auto, of the device (`on`); in their precision the chosen layers run.
      backend: `auto`, the name of a backend, or a backend. Only `auto` excludes layers, and `format=auto`.
      microbatch_size: examples a backward pass; None measures which size is the fastest. It is 1 with discrete noise.
      memory: largest peak memory of the process, GiB; None sets no limit.
      exact_sums: sums are exact over microbatches, whichever process makes them.
      processes: number of processes of the run.
      groups: of records, within which microbatches are made.
    Raises:
      SettingError: microbatch_size is below 1, or both microbatch_size and memory are given.
    """

    chosen: Precision
    rest: Precision = FULL_PRECISION
    auto: bool = False
    units: Units | None = None
    backend: str | Backend = "auto"
    microbatch_size: int | None = None
    memory: float | None = None
    exact_sums: bool = False
    processes: int = 1
    groups: int = 1

    def __post_init__(self) -> None:
        if self.microbatch_size is not None and self.microbatch_size < 1:
            raise SettingError(f"Expected microbatch_size >= 1; got microbatch_size={self.microbatch_size}.")
        if self.memory is not None and self.microbatch_size is not None:
            raise SettingError(
                f"Expected one of microbatch_size and memory; got microbatch_size={self.microbatch_size} and "
                f"memory={self.memory:g}. The size decides how much memory is needed. Leave one out."
            )

    def on(self, device: torch.device) -> Self:
        """Return the request for a model on a device: with `auto`, in the precision of its units."""
        if not self.auto:
            return self
        units = units_of(device, self.backend)
        return dataclasses.replace(self, chosen=units.precision, units=units)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Execution:
    """Execution decisions for one run, with reasons.

    Attributes:
      chosen: precision of the layers that the policy chooses.
      rest: precision of all other layers.
      microbatch_size: examples a backward pass.
      analysis_microbatch_size: examples a pass of an analysis, which keeps two sets of operands.
      gains: {layer: time in full precision over time quantized, measured on this machine}; empty if no layer can be
        excluded.
      excluded_layers: layers that the policy may not choose, because quantizing them saves no time.
      backend: `simulate` or `int8`.
      reason: why this backend is used; empty where no layer runs quantized.
      auto: what `format=auto` has taken, why, and what it gains, in words; empty where the user has given a format.
      exact_sums: whether the sums of microbatches are added up as integers, so that no process matters to a bit.
    """

    chosen: Precision
    rest: Precision
    microbatch_size: int
    analysis_microbatch_size: int
    gains: Mapping[str, float]
    excluded_layers: tuple[str, ...]
    backend: str
    reason: str
    auto: str = ""
    exact_sums: bool = False

    def precisions(self, names: Collection[str], layers: Collection[str]) -> dict[str, Precision]:
        """Return each layer's precision.

        Args:
          names: all quantizable layers.
          layers: those of them that the policy has chosen.
        """
        return {name: self.chosen if name in layers else self.rest for name in names}

    def __str__(self) -> str:
        return "; ".join(self.facts.values())

    @property
    def facts(self) -> dict[str, str]:
        """Return {what: how it runs, in words}."""
        facts = {"format": self.auto} if self.auto else {}
        if self.reason:
            facts["backend"] = f"backend {self.backend}: {self.reason}"
        facts["microbatch"] = f"{self.microbatch_size} examples a backward pass"
        if self.exact_sums:
            facts["sums"] = "exact over microbatches, the same for any number of processes"
        if self.auto:
            return facts
        if slower := [name for name, gain in self.gains.items() if gain < 1]:
            listed = ", ".join(f"{name} ({1 / self.gains[name]:.1f} times)" for name in slower)
            never = "never quantized, as that takes longer"
            facts["slower"] = (
                f"{never if self.excluded_layers else 'quantized when chosen, though that takes longer'}: {listed}"
            )
        return facts


def choose_execution(
    objective: Objective,
    synthetic: Any,
    *,
    policy: Policy,
    macs: dict[str, float],
    plan: PrivacyPlan,
    request: ExecutionRequest,
    by: Instruments = HERE,
) -> Execution:
    """Choose microbatch sizes and excluded layers, measuring whatever the request leaves open.

    The model's backend is fixed already; this records why it is used. All layers are in full precision afterwards.

    Args:
      objective: a prepared model and its loss.
      synthetic: a batch of synthetic examples.
      policy: which layers run quantized.
      macs: {layer: multiply-accumulates of its forward product, for one example}.
      plan: gives the expected batch size of a step, and the score of an analysis.
      request: the user's settings.
      by: measures time and memory.
    Raises:
      SettingError: the policy names layers that do not exist, or the memory is too little.
      FormatError: the model's backend cannot run a precision.
    Privacy: reads no data.
    """
    model, loss_fn = objective.model, objective.loss_fn
    examples = plan.steps * plan.expected_batch_size
    chosen, rest, memory = request.chosen, request.rest, request.memory
    facts = _facts(model, synthetic, request, plan)
    first = policy.choose(macs, None, epoch=0, key=0)
    precisions = {name: chosen if name in first else rest for name in macs}
    set_precisions(model, precisions)  # refuses what the backend cannot run
    set_policy(model, ())
    alone = plan.noise == "discrete"  # the last bits of a record's gradient depend on its place in a microbatch
    size = 1 if alone else request.microbatch_size
    largest = largest_tried(examples)
    if request.exact_sums:  # enough microbatches that every process has about as many as the others
        largest = max(1, min(largest, int(plan.expected_batch_size / (4 * request.processes))))
    if size is None:
        size = decided(
            ("examples a backward pass", facts, _digest(*first), memory, largest),
            lambda: fastest_microbatch_size(
                objective,
                synthetic,
                precisions,
                expected_batch_size=plan.expected_batch_size,
                memory=memory,
                largest=largest,
                groups=request.groups,
                by=by,
            ),
            valid=_is_size,
            lasting=memory is None,  # with a limit, the answer depends on what this process holds already
        )
    analysis_microbatch_size = 1 if alone else ANALYSIS_MICROBATCH
    if not alone and memory is not None and policy.needs_scores and plan.analysis is not None:
        names, score = list(macs)[:1], plan.analysis.score
        analysis_microbatch_size = decided(
            ("examples a pass of an analysis", facts, score, memory),
            lambda: largest_analysis_size(model, loss_fn, synthetic, names, score=score, memory=memory, by=by),
            valid=_is_size,
            lasting=False,
        )
    if not alone and plan.analysis is not None:
        analysis_microbatch_size = of_analysis(
            analysis_microbatch_size,
            plan.analysis.expected_batch_size,
            groups=request.groups,
            device=next(model.parameters()).device.type,
        )
    layer = next(iter(quantizable_layers(model).values()), None)
    runs_on = Reference.name if layer is None else layer.backend.name
    gains: dict[str, float] | None = None
    by_gain = request.units is not None or (request.backend == "auto" and runs_on != Reference.name)
    if policy.quantizes and chosen.quantized and by_gain and worth_timing(examples, size):
        gains = decided(
            ("gains of layers", facts, size),
            partial(_gains, objective, synthetic, size, plan.expected_batch_size, by),
            valid=lambda gains: isinstance(gains, dict) and gains.keys() <= macs.keys(),
        )
    excluded, auto = () if rest.quantized else layers_to_exclude(policy, macs, gains or {}), ""
    if request.units is not None and policy.quantizes:

        def gain_of_step(layers: Sequence[str]) -> float:
            precisions = dict.fromkeys(layers, chosen)
            return decided(
                ("gain of a step", facts, size, _digest(*layers)),
                lambda: step_gain(objective, synthetic, precisions, size, by=by),
                valid=lambda gain: isinstance(gain, float) and gain > 0,
            )

        found = taken(request.units, macs, gains, gain_of_step)
        excluded, auto = tuple(name for name in macs if name not in found.layers), found.why
    return Execution(
        chosen=FULL_PRECISION if auto and excluded == tuple(macs) else chosen,
        rest=rest,
        microbatch_size=size,
        analysis_microbatch_size=analysis_microbatch_size,
        gains=gains or {},
        excluded_layers=excluded,
        backend=runs_on,
        reason=backend_reason(layer, policy, request) if excluded != tuple(macs) else "",
        auto=auto,
        exact_sums=request.exact_sums,
    )


def backend_reason(
    layer: QuantizableLayer | None, policy: Policy, request: ExecutionRequest, *, reason_for: ReasonFor = reason_for
) -> str:
    """Return why a run uses its backend; empty where no layer runs quantized.

    Args:
      layer: one of the model's quantizable layers, which all have the same backend; None if there is none.
      policy: which layers run quantized.
      request: the user's settings.
      reason_for: says why `auto` comes to a backend, as `backends.registry.reason_for`.
    """
    used = [one for one in (request.chosen, request.rest) if one.quantized]
    if layer is None or not used or not (policy.quantizes or request.rest.quantized):
        return ""
    if request.backend != "auto":
        return "asked for"
    return reason_for(layer.backend, used, layer.weight.device)


def _gains(
    objective: Objective, synthetic: Any, microbatch_size: int, expected_batch_size: float, by: Instruments
) -> dict[str, float]:
    """Return {layer: time in full precision over time quantized}."""
    times = layer_times(
        objective.model,
        objective.loss_fn,
        synthetic,
        microbatch_size=microbatch_size,
        expected_batch_size=expected_batch_size,
        by=by,
    )
    return {name: seconds.gain for name, seconds in times.items()}


def _facts(model: nn.Module, synthetic: Any, request: ExecutionRequest, plan: PrivacyPlan) -> str:
    """Return a digest of the facts on which times depend: modules, shapes, formats, batch, device, threads."""
    layers = quantizable_layers(model).values()
    return _digest(
        *(f"{name}: {type(module).__name__}" for name, module in model.named_modules()),
        *(f"{name}: {tuple(p.shape)} {p.requires_grad}" for name, p in model.named_parameters()),
        *(f"{layer.geometry} {layer.backend.name} {layer.weight.device}" for layer in layers),
        *(f"{leaf.dtype} {tuple(leaf.shape[1:])}" for _, leaf in leaves(synthetic)),
        *(request.chosen.name, request.rest.name, plan.expected_batch_size, request.groups, torch.get_num_threads()),
    )


def _is_size(answer: Any) -> bool:
    return isinstance(answer, int) and answer > 0


def _digest(*facts: object) -> str:
    return hashlib.sha256("\n".join(map(str, facts)).encode()).hexdigest()[:16]


def layers_to_exclude(policy: Policy, macs: dict[str, float], gains: Mapping[str, float]) -> tuple[str, ...]:
    """Return the layers that quantization slows down, if more others remain than the policy needs in an epoch; else ().

    Args:
      policy: which layers run quantized.
      macs: {layer: multiply-accumulates of its forward product, for one example}.
      gains: {layer: time in full precision over time quantized}; a layer that is missing counts as not slower.
    """
    slower = [name for name in macs if gains.get(name, 1.0) < 1]
    chosen = set(policy.choose(macs, None, epoch=0, key=0, excluded=slower))
    return tuple(slower) if chosen < macs.keys() - set(slower) else ()
