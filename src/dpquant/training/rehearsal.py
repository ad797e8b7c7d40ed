# SPDX-License-Identifier: Apache-2.0
"""A trial step on synthetic records before the first charge, so that a run that would fail costs no budget.

The optimizer's step is tried on a copy with its own parameters, so that neither the model nor the optimizer's state
changes. Nothing here reads a private record.
"""

import copy
import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from dpquant.backends.choose import Choices, Machine
from dpquant.checks.isolation import Findings
from dpquant.engine.batches import Microbatch, cut_to
from dpquant.engine.passes import out_of_memory
from dpquant.errors import DPQuantError, ModelError, SettingError
from dpquant.machine import now
from dpquant.privacy.noise import NoiseSource
from dpquant.privacy.plan import PrivacyPlan
from dpquant.training.epoch import Batch
from dpquant.training.impact import analysis_keys
from dpquant.training.setup import Setup
from dpquant.training.sums import analysis_sum, draws_of_noise, noisy_mean, step_sum

_TIMED = 4, 16  # examples of the two passes from which a step's time is estimated


def rehearse(setup: Setup, *, size: int, analysis_size: int, analysed: str | None, exact: bool = False) -> None:
    """Try the clipped sum, the analysis, the noise and the optimizer of a run, on a few synthetic records.

    Args:
      setup: of the run; its model has the precisions of an epoch. Where records differ in length, those of the step and
        of the analysis have the shortest and the longest.
      size: examples a pass of the step.
      analysis_size: examples a pass of the analysis.
      analysed: name of the layer whose impact is measured; one is enough, because all are measured in the same manner.
        None if the run makes no analysis.
      exact: sums are exact.
    Raises:
      ModelError, SettingError: a part of the step fails. What says that memory does not suffice is raised unchanged.
    Privacy: reads no private data and charges nothing. The noise that is drawn is used for nothing else.
    """
    found, plan = setup.found, setup.plan
    try:
        with untimed().active():
            pieces = _pieces(setup, size)  # raises where model or loss do; a step would leave the record out
            clipped = step_sum(found.objective, pieces, plan, 0, leaves_out=False, exact=exact)
            if plan.analysis is not None and analysed is not None:
                pieces = _pieces(setup, analysis_size)
                analysis_sum(found.objective, pieces, plan, [analysed], analysis_keys(0, 0), exact=exact)
    except DPQuantError:
        raise
    except Exception as error:
        if out_of_memory(error):
            raise
        which, way_out = "", ""
        if len(setup.lengths) > 1:
            which = f", {setup.lengths[0]} and {setup.lengths[-1]} long"
            way_out = " Records have either length; a model can pad those that are too short for it."
        raise ModelError(
            f"Expected a step on synthetic records to run with {size} examples a backward pass{which}; got a "
            f"{type(error).__name__}: {error}.{way_out}"
        ) from error
    draws = draws_of_noise(NoiseSource(), plan, Batch(torch.empty(0, dtype=torch.int64), 0, 0, list), clipped.grads)
    gradients = {
        name: noisy_mean(draws[name]().to(grad.device), grad, grid=clipped.grid, expected=1.0).float()
        for name, grad in clipped.grads.items()
    }
    named = dict(found.objective.model.named_parameters())
    with setup.steps.trial({named[name]: gradient for name, gradient in gradients.items()}) as gradient_of:
        _try_optimizer(setup.optimizer, gradient_of)


def step_seconds(found: Findings, plan: PrivacyPlan, size: int) -> float:
    """Return about how many seconds the clipped sum of a step takes, from a few synthetic records.

    The times of two small passes give the time of a pass of `size` examples as if it grew along a straight line. That
    is good enough for what depends on it: how many steps the ledger charges ahead.

    Args:
      found: findings of the isolation check; their model has the precisions of an epoch.
      plan: of the run, for the expected batch size.
      size: examples a backward pass.
    Privacy: reads no private data, so that the result is public. The time of a real step is not.
    """
    few, more = (_pass_seconds(found, plan, number) for number in _TIMED)
    one = max(more - few, 0.0) / (_TIMED[1] - _TIMED[0])
    return (few + one * max(size - _TIMED[0], 0)) * max(plan.expected_batch_size / size, 1.0)


def _pass_seconds(found: Findings, plan: PrivacyPlan, number: int) -> float:
    """Return the seconds of a pass over synthetic records, the better of two."""
    piece, seconds = synthetic_piece(found, number), []
    with untimed().active():
        for _ in range(2):
            began = now()
            step_sum(found.objective, [piece], plan, 0, leaves_out=False)
            seconds.append(now() - began)
    return min(seconds)


def untimed(given: Mapping[str, Any] = MappingProxyType({})) -> Choices:
    """Return choices that autotune nothing: decisions that are not given fall on the first candidate.

    The fastest method for a few records is not the fastest for a run, and no timing is the same on two machines.
    """
    return Choices(given, machine=Machine(None), timed=lambda methods: dict.fromkeys(methods, 0.0))


def synthetic_piece(found: Findings, size: int) -> Microbatch:
    """Return a microbatch of synthetic records."""
    order = [number % 3 for number in range(size)]
    return Microbatch(found.specimens.batch(order), torch.tensor(order), size)


def _pieces(setup: Setup, size: int) -> list[Microbatch]:
    """Return microbatches of synthetic records, of the shortest and the longest length that records may have."""
    longest = synthetic_piece(setup.found, size)
    if len(setup.lengths) < 2:
        return [longest]
    shortest = cut_to(longest.data, setup.lengths[0], longest=setup.lengths[-1])
    return [dataclasses.replace(longest, data=shortest), longest]


def _try_optimizer(optimizer: torch.optim.Optimizer, gradient_of: Mapping[Any, Tensor]) -> None:
    """Take one step with a copy of the optimizer, on copies of what it holds."""
    rule = "Expected optimizer to step on a dense gradient, with step() alone, as private.step calls it"
    originals = [p for group in optimizer.param_groups for p in group["params"]]
    try:
        twin: Any = copy.deepcopy(optimizer)
    except Exception as error:
        raise SettingError(
            f"Expected an optimizer that can be copied, to try its step before anything is charged; got a "
            f"{type(error).__name__} from copying a {type(optimizer).__name__}. Use one whose state is tensors and "
            "numbers."
        ) from error
    for original, copied in zip(originals, [p for group in twin.param_groups for p in group["params"]], strict=True):
        gradient = gradient_of.get(original)
        copied.grad = None if gradient is None else gradient.clone()
    try:
        with torch.enable_grad():
            type(twin).step(twin)  # a scheduler replaces the instance's `step` by one that steps the original optimizer
    except TypeError as error:
        raise SettingError(
            f"{rule}; got a {type(error).__name__} from {type(optimizer).__name__}: {error}. An optimizer that "
            "evaluates the loss again (a closure) would use more gradients than are charged. Use one that needs none."
        ) from error
    except Exception as error:
        raise SettingError(
            f"{rule}; got a {type(error).__name__} from {type(optimizer).__name__}: {error}. Use another optimizer."
        ) from error
