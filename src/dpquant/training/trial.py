# SPDX-License-Identifier: Apache-2.0
"""The execution of a run that has memory enough for it: chosen by measuring, then tried on synthetic records."""

import dataclasses
from collections.abc import Callable

import torch

from dpquant.backends.malloc import give_back
from dpquant.checks.isolation import check_at_size
from dpquant.engine.exact_sum import check_exact
from dpquant.engine.layers import set_policy, set_precisions
from dpquant.engine.passes import out_of_memory
from dpquant.errors import SettingError
from dpquant.training.execution import Execution, ExecutionRequest, choose_execution
from dpquant.training.rehearsal import rehearse, step_seconds, synthetic_piece
from dpquant.training.setup import Setup
from dpquant.training.sums import step_sum
from dpquant.training.tuning import instruments_on

_REHEARSED = 2  # records in the trial step


def measured(setup: Setup, request: ExecutionRequest, device: torch.device) -> tuple[Execution, float]:
    """Choose an execution, try it, and return it with the seconds of a step on synthetic records.

    Raises:
      SettingError: memory does not suffice, or the policy names layers that do not exist.
      ModelError, FormatError: a step fails.
    Privacy: reads no data.
    """
    found = setup.found
    execution = choose_execution(
        found.objective,
        found.specimens.batch((0, 1, 2)),
        policy=setup.policy,
        macs=found.macs,
        plan=setup.plan,
        request=request,
        by=instruments_on(device),
    )
    execution, seconds = that_fits(execution, request, lambda one: tried(setup, one, device))
    if execution.exact_sums:
        num_values = sum(p.numel() for p in found.objective.trainable().values())
        check_exact(num_values, setup.plan.expected_batch_size, execution.microbatch_size)
    if execution.exact_sums or request.processes > 1:
        _decide_all(setup, execution)
    return execution, seconds


def _decide_all(setup: Setup, execution: Execution) -> None:
    """Make the decisions by timing that a step needs, before other processes take them over.

    They concern one layer each, by its operands. So two passes are enough, in which all layers that can be chosen are,
    and none is.
    """
    found, exact = setup.found, execution.exact_sums
    pieces = [synthetic_piece(found, execution.microbatch_size)]
    try:
        for layers in (set(found.macs) - set(execution.excluded_layers), ()):
            set_precisions(found.objective.model, execution.precisions(found.macs, layers))
            step_sum(found.objective, pieces, setup.plan, 0, leaves_out=False, exact=exact)
    finally:
        set_policy(found.objective.model, ())


def that_fits(
    execution: Execution, request: ExecutionRequest, trial: Callable[[Execution], float]
) -> tuple[Execution, float]:
    """Return the execution for which the trial has memory enough, the given or one of half its size, and its result.

    Raises:
      SettingError: neither has, or the given one has not and its size is the user's.
    """
    half = max(execution.microbatch_size // 2, 1)
    smaller = dataclasses.replace(
        execution, microbatch_size=half, analysis_microbatch_size=min(execution.analysis_microbatch_size, half)
    )
    for one in (execution,) if request.microbatch_size is not None or smaller == execution else (execution, smaller):
        try:
            return one, trial(one)
        except Exception as error:
            if not out_of_memory(error):
                raise
        give_back()
    raise SettingError(
        f"Expected memory enough for {half if request.microbatch_size is None else execution.microbatch_size} examples "
        "a backward pass; got too little. Nothing was charged. Give a smaller microbatch_size, give memory= (GiB), by "
        "which one is chosen, or take a smaller model."
    )


def tried(setup: Setup, execution: Execution, device: torch.device) -> float:
    """Try on synthetic records everything that steps and analyses will run, and return the seconds of a step.

    First the losses are checked in a microbatch of the run's own size. No layer is chosen for it, because round-off of
    a full-precision layer could change the codes of a quantized one. Then a step is tried with the first epoch's
    layers on a few records, of the shortest and of the longest length where records differ in it; any number of records
    takes the same code paths. On a GPU it is tried on as many as the run
    takes, since only a step tells whether they fit into its memory.
    """
    policy, found, size = setup.policy, setup.found, execution.microbatch_size
    layers = policy.choose(found.macs, None, epoch=0, key=0, excluded=execution.excluded_layers)
    analysed = next(iter(found.macs), None) if policy.needs_scores else None
    model = found.objective.model
    try:
        set_precisions(model, execution.precisions(found.macs, ()))
        check_at_size(found, size)
        set_precisions(model, execution.precisions(found.macs, layers))
        sizes = size, execution.analysis_microbatch_size
        step, analysis = sizes if device.type == "cuda" else (min(one, _REHEARSED) for one in sizes)
        exact = execution.exact_sums
        rehearse(setup, size=step, analysis_size=analysis, analysed=analysed, exact=exact)
        return step_seconds(found, setup.plan, size)
    finally:
        set_policy(model, ())
