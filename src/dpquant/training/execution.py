# SPDX-License-Identifier: Apache-2.0
"""How a run is executed on this machine: precisions, microbatch, and which layers are not worth quantizing.

Decided once, before any record is read, from synthetic examples and times. None of it enters the accounting.
"""

import dataclasses
import hashlib
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from dpquant.backends.choose import decided
from dpquant.backends.interface import Backend
from dpquant.backends.registry import reason_for
from dpquant.engine.batches import leaves
from dpquant.engine.layers import quantizable_layers, set_policy, set_precisions
from dpquant.engine.passes import Objective, PerExampleLoss
from dpquant.errors import SettingError
from dpquant.formats import FULL_PRECISION, Precision
from dpquant.privacy.plan import PrivacyPlan
from dpquant.training.policies import Policy
from dpquant.training.tuning import ANALYSIS_MICROBATCH, fastest_microbatch_size, largest_analysis_size, layer_times


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExecutionRequest:
    """What the user asks of a run's execution.

    Attributes:
      chosen: precision of the layers that the policy chooses.
      rest: precision of the others.
      backend: `auto`, the name of one, or a backend; only `auto` spares layers.
      microbatch_size: examples a backward pass; None to measure which is the fastest.
      memory: GiB that the process may use at its peak; None: no limit.
    Raises:
      SettingError: a microbatch without examples, or both microbatch_size and memory.
    """

    chosen: Precision
    rest: Precision = FULL_PRECISION
    backend: str | Backend = "auto"
    microbatch_size: int | None = None
    memory: float | None = None

    def __post_init__(self) -> None:
        if self.microbatch_size is not None and self.microbatch_size < 1:
            raise SettingError(f"Expected microbatch_size >= 1; got microbatch_size={self.microbatch_size}.")
        if self.memory is not None and self.microbatch_size is not None:
            raise SettingError(
                f"Expected one of microbatch_size and memory; got microbatch_size={self.microbatch_size} and "
                f"memory={self.memory:g}. The size decides how much memory is needed. Leave one out."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Execution:
    """What runs how, and why.

    Attributes:
      chosen, rest: the precisions of layers that the policy has chosen, and of the others.
      microbatch_size: examples a backward pass.
      analysis_microbatch_size: the same in analyses, which keep two sets of operands.
      gains: {layer: time in full precision over time quantized, measured here}; empty where it does not matter.
      excluded_layers: layers that the policy may not choose, because they gain nothing.
      backend: `simulate` or `int8`.
      reason: why that one; empty where nothing runs quantized.
    """

    chosen: Precision
    rest: Precision
    microbatch_size: int
    analysis_microbatch_size: int
    gains: Mapping[str, float]
    excluded_layers: tuple[str, ...]
    backend: str
    reason: str

    def precisions(self, names: Collection[str], layers: Collection[str]) -> dict[str, Precision]:
        """Each layer's precision where some of them are chosen."""
        return {name: self.chosen if name in layers else self.rest for name in names}

    def __str__(self) -> str:
        words = [f"{self.microbatch_size} examples a backward pass"]
        if self.reason:
            words.insert(0, f"backend {self.backend}: {self.reason}")
        if slower := [name for name, gain in self.gains.items() if gain < 1]:
            listed = ", ".join(f"{name} ({1 / self.gains[name]:.1f} times)" for name in slower)
            never = "never quantized, as that takes longer"
            words.append(
                f"{never if self.excluded_layers else 'quantized when chosen, though that takes longer'}: {listed}"
            )
        return "; ".join(words)


def choose_execution(
    objective: Objective,
    synthetic: Any,
    *,
    policy: Policy,
    macs: dict[str, float],
    plan: PrivacyPlan,
    request: ExecutionRequest,
) -> Execution:
    """Measure what is not given.

    Args:
      objective: a prepared model and its loss.
      synthetic: a batch of synthetic examples.
      policy: which layers run quantized.
      macs: each layer's multiply-accumulates.
      plan: for the expected batch size of a step, and for what an analysis measures.
      request: what is given, and what is left to measurements.
    Raises:
      SettingError: the policy names layers that do not exist, or the memory does not suffice.
      FormatError: the model's backend cannot run a precision.
    """
    model, loss_fn = objective.model, objective.loss_fn
    chosen, rest, memory = request.chosen, request.rest, request.memory
    asked = _question(model, synthetic, chosen, rest, plan)
    first = policy.choose(macs, None, epoch=0, key=0)
    precisions = {name: chosen if name in first else rest for name in macs}
    set_precisions(model, precisions)  # refuses what the backend cannot run
    set_policy(model, ())
    size = request.microbatch_size
    if size is None:
        size = decided(
            ("examples a backward pass", asked, _digest(*first), memory),
            lambda: fastest_microbatch_size(
                model, loss_fn, synthetic, precisions, expected_batch_size=plan.expected_batch_size, memory=memory
            ),
            valid=_is_size,
            lasting=memory is None,  # what a process has in use differs
        )
    analysis_microbatch_size = ANALYSIS_MICROBATCH
    if memory is not None and policy.needs_scores and plan.analysis is not None:
        names, score = list(macs)[:1], plan.analysis.score
        analysis_microbatch_size = decided(
            ("examples a pass of an analysis", asked, score, memory),
            lambda: largest_analysis_size(model, loss_fn, synthetic, names, score=score, memory=memory),
            valid=_is_size,
            lasting=False,
        )
    layer = next(iter(quantizable_layers(model).values()), None)
    runs_on = "simulate" if layer is None else layer.backend.name
    gains: dict[str, float] = {}
    if policy.quantizes and request.backend == "auto" and runs_on == "int8":
        gains = decided(
            ("gains of layers", asked, size),
            partial(_gains, model, loss_fn, synthetic, size, plan.expected_batch_size),
            valid=lambda gains: isinstance(gains, dict) and gains.keys() <= macs.keys(),
        )
    reason = ""
    if layer is not None and (policy.quantizes or rest.quantized):
        used = [one for one in (chosen, rest) if one.quantized]
        reason = "asked for" if request.backend != "auto" else reason_for(layer.backend, used, layer.weight.device)
    return Execution(
        chosen=chosen,
        rest=rest,
        microbatch_size=size,
        analysis_microbatch_size=analysis_microbatch_size,
        gains=gains,
        excluded_layers=() if rest.quantized else layers_to_exclude(policy, macs, gains),
        backend=runs_on,
        reason=reason,
    )


def _gains(
    model: nn.Module, loss_fn: PerExampleLoss, synthetic: Any, microbatch_size: int, expected_batch_size: float
) -> dict[str, float]:
    """{layer: time in full precision over time quantized}."""
    times = layer_times(
        model, loss_fn, synthetic, microbatch_size=microbatch_size, expected_batch_size=expected_batch_size
    )
    return {name: seconds.gain for name, seconds in times.items()}


def _question(model: nn.Module, synthetic: Any, chosen: Precision, rest: Precision, plan: PrivacyPlan) -> str:
    """What times depend on, as far as it can be seen: modules, shapes, formats, batch, device, threads."""
    layers = quantizable_layers(model).values()
    return _digest(
        *(f"{name}: {type(module).__name__}" for name, module in model.named_modules()),
        *(f"{name}: {tuple(p.shape)} {p.requires_grad}" for name, p in model.named_parameters()),
        *(f"{layer.geometry} {layer.backend.name} {layer.weight.device}" for layer in layers),
        *(f"{leaf.dtype} {tuple(leaf.shape[1:])}" for _, leaf in leaves(synthetic)),
        *(chosen.name, rest.name, plan.expected_batch_size, torch.get_num_threads()),
    )


def _is_size(answer: Any) -> bool:
    return isinstance(answer, int) and answer > 0


def _digest(*facts: object) -> str:
    return hashlib.sha256("\n".join(map(str, facts)).encode()).hexdigest()[:16]


def layers_to_exclude(policy: Policy, macs: dict[str, float], gains: Mapping[str, float]) -> tuple[str, ...]:
    """The layers that quantizing makes slower, if the others are more than the policy needs: it shall have a choice."""
    slower = [name for name in macs if gains.get(name, 1.0) < 1]
    chosen = set(policy.choose(macs, None, epoch=0, key=0, excluded=slower))
    return tuple(slower) if chosen < macs.keys() - set(slower) else ()
