# SPDX-License-Identifier: Apache-2.0
"""The library's face: a model, an optimizer, a data set and a plan become a private training run (`private.py`).

`make_private` is what users call. `begin` does the work, for whoever brings a mechanism, a group of processes or a kind
of run of their own. Everything that can fail is tried here, on synthetic records, before the first charge; the ledger's
file is made last.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import IterableDataset, default_collate

from dpquant.backends.choose import Choices
from dpquant.backends.interface import Backend
from dpquant.backends.registry import resolve
from dpquant.checks.isolation import check_at_size, check_isolation
from dpquant.checks.refusals import check_trainable
from dpquant.checks.synthetic import candidates, from_examples
from dpquant.engine.layers import prepare, set_policy, set_precisions
from dpquant.engine.passes import Objective, PerExampleLoss
from dpquant.errors import DataError, SettingError
from dpquant.formats import Precision, Recipe, precision
from dpquant.privacy.mechanism import Mechanism
from dpquant.privacy.plan import PrivacyPlan
from dpquant.training.distributed import Alone, Group
from dpquant.training.execution import Execution, ExecutionRequest, choose_execution
from dpquant.training.policies import Policy
from dpquant.training.private import PrivateTraining
from dpquant.training.records import MapDataset, Records
from dpquant.training.rehearsal import rehearse
from dpquant.training.setup import Setup
from dpquant.training.state import RunState

_REHEARSED = 3  # records of the step that is tried


def make_private(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    train_set: MapDataset,
    *,
    loss_fn: PerExampleLoss,
    plan: PrivacyPlan,
    policy: Policy,
    format: str | Recipe | Precision = "luq-fp4",
    rest: str | Recipe | Precision = "full",
    backend: str | Backend = "auto",
    seed: int = 0,
    ledger: Path | None = None,
    collate_fn: Callable[[list], Any] = default_collate,
    microbatch_size: int | None = None,
    memory: float | None = None,
    mechanism_seed: int | None = None,
    example: Any = None,
    choices: Choices | None = None,
) -> PrivateTraining:
    """Check everything, prepare the model, and return a run that `plan` accounts for.

    Args:
      model: the user's own; its Conv2d and Linear layers are replaced in place by quantizable twins.
      optimizer: any torch optimizer over the model's trainable parameters. It is fed the noised gradient.
      train_set: map-style. If it has a `dpquant_batch(record_ids)`, that gives the collated data; else its items, read
        by `__getitems__` where there is one, are collated. Records that cannot be read, or that have another structure,
        type or shape than the data set's, contribute nothing, and nobody is told.
      loss_fn: `(model, batch) -> Tensor (B,)`, one loss per example.
      plan: the privacy settings.
      policy: which layers run quantized.
      format: what the chosen layers run in, as for `dpquant.prepare`.
      rest: what all other layers run in; `full/luq-fp4/luq-fp4` quantizes their backward products alone.
      backend: `auto`, `simulate` or `int8`, as for `dpquant.prepare`. Where `auto` takes int8, layers that gain nothing
        from it on this machine stay in full precision, as long as the policy has a choice among the others.
      seed: of the schedule; never of sampling, noise, rounding, dropout or augmentation, which are secret.
      ledger: file to write charges to, ahead of each use of data; its folder is made. None keeps them in memory.
      collate_fn: list of items -> batch, a row for each item. Rows are padded to a length that the item alone decides.
      microbatch_size: examples a backward pass; None measures which is the fastest.
      memory: that the process may use at its peak, GiB, by which the microbatches of steps and analyses are chosen; it
        does not bound records that are longer than the synthetic ones. None: no limit.
      mechanism_seed: makes everything that is secret repeatable for research. The run is then NOT PRIVATE and says so.
      example: a list or data set of a few public or synthetic records, at least two, that differ in every value. The
        model is tried on them instead of on generated ones, whose values may be outside of the data's domain.
      choices: of an earlier run, from its choices.json: what was measured there is not measured again. With the same
        settings and the same mechanism_seed the run computes the same bits. None takes what this machine remembers.
    Raises:
      ModelError, SettingError, DataError, FormatError, LedgerError: before any record's values are used. A step on
        synthetic records has then been tried, the optimizer's part in it included.
    """
    request = Request(
        model=model,
        optimizer=optimizer,
        train_set=train_set,
        loss_fn=loss_fn,
        plan=plan,
        policy=policy,
        execution=ExecutionRequest(
            chosen=precision(format),
            rest=precision(rest),
            backend=backend,
            microbatch_size=microbatch_size,
            memory=memory,
        ),
        seed=seed,
        collate_fn=collate_fn,
        example=example,
        choices=choices,
    )
    if mechanism_seed is None:
        return begin(request, lambda: Mechanism.secret(ledger))
    return begin(request, lambda: Mechanism.repeatable(mechanism_seed, ledger))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """What a run is to be: the arguments of `make_private`, less those of its mechanism."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    train_set: MapDataset
    loss_fn: PerExampleLoss
    plan: PrivacyPlan
    policy: Policy
    execution: ExecutionRequest
    seed: int = 0
    collate_fn: Callable[[list], Any] = default_collate
    example: Any = None
    choices: Choices | None = None


MakeRun = Callable[[Setup, Records, RunState, Choices, Mechanism, Group], PrivateTraining]


@torch.inference_mode(False)
@torch.enable_grad()
def begin(
    request: Request,
    make_mechanism: Callable[[], Mechanism],
    *,
    group: Group | None = None,
    make_run: MakeRun = PrivateTraining,
) -> PrivateTraining:
    """Check everything, prepare the model, and return a run.

    Args:
      request: what the run is to be.
      make_mechanism: gives what samples, hides and charges. It is called once, after every check: it may make files.
      group: the processes of the run; None: this one alone.
      make_run: joins the parts; `PrivateTraining`, or a subclass.
    Raises: as `make_private`.
    """
    setup, records, choices, execution = _checked(request)
    group = group or Alone()
    state = RunState.from_json(group.from_first(RunState(execution=execution).to_json().encode()).decode())
    return make_run(setup, records, state, choices, make_mechanism(), group)


def _checked(request: Request) -> tuple[Setup, Records, Choices, Execution]:
    """Refuse what cannot be trained privately; prepare the model, decide how it runs, and try all that a run does."""
    model, train_set, plan, policy = request.model, request.train_set, request.plan, request.policy
    check_trainable(model)
    _check_optimizer(model, request.optimizer)
    _check_data_set(train_set)
    if policy.needs_scores and plan.analysis is None:
        raise SettingError(
            f"Expected plan.analysis for {type(policy).__name__}; got analysis=None. The policy favours layers whose "
            "quantization costs little, which has to be measured. Give the plan an AnalysisPlan, or use RotatePolicy."
        )
    device, wanted = next(model.parameters()).device, request.execution
    used = [wanted.chosen, wanted.rest] if wanted.rest.quantized else [wanted.chosen]
    model = prepare(model, format=wanted.chosen, backend=resolve(wanted.backend, used, device))
    if request.example is None:
        specimens = candidates(_first_records(train_set), request.collate_fn, device)
    else:
        specimens = iter([from_examples(request.example, request.collate_fn, device)])
    quantized = [one for one, used in ((wanted.chosen, policy.quantizes), (wanted.rest, wanted.rest.quantized)) if used]
    found = check_isolation(Objective(model, request.loss_fn), specimens, quantized=quantized)
    records = Records(train_set, request.collate_fn, device, found.specimens)
    records.check()
    setup = Setup(
        optimizer=request.optimizer,
        plan=plan,
        policy=policy,
        seed=request.seed,
        found=found,
    )
    choices = request.choices or Choices()
    with choices.active():
        synthetic = found.specimens.batch((0, 1, 2))
        execution = choose_execution(
            found.objective, synthetic, policy=policy, macs=found.macs, plan=plan, request=wanted
        )
        _try_all(setup, execution)
    return setup, records, choices, execution


def _first_records(train_set: MapDataset) -> list[Any]:
    """The records whose types and shapes stand for all."""
    try:
        return [train_set[index] for index in range(min(len(train_set), 3))]
    except Exception as error:
        raise DataError(
            f"Expected the first records of train_set to be readable; got a {type(error).__name__}. Their types and "
            "shapes, and nothing else of them, say what records look like. Mend them, or give example= records."
        ) from error


def _try_all(setup: Setup, execution: Execution) -> None:
    """Run on synthetic records all that steps and analyses will run.

    Losses in a microbatch of the run's own size, where no layer is chosen and round-off moves no code; then a step with
    the first epoch's layers, on a few records: it takes the same paths for any number.
    """
    policy, found, size = setup.policy, setup.found, execution.microbatch_size
    layers = policy.choose(found.macs, None, epoch=0, key=0, excluded=execution.excluded_layers)
    analysed = next(iter(found.macs), None) if policy.needs_scores else None
    model = found.objective.model
    try:
        set_precisions(model, execution.precisions(found.macs, ()))
        check_at_size(found, size)
        set_precisions(model, execution.precisions(found.macs, layers))
        rehearse(setup.optimizer, setup.plan, found, size=min(size, _REHEARSED), analysed=analysed)
    finally:
        set_policy(model, ())


def _check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise SettingError(f"Expected optimizer to be a torch.optim.Optimizer; got a {type(optimizer).__name__}.")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise SettingError("Expected an optimizer that needs one gradient a step; got LBFGS, which evaluates more.")
    held = {p for group in optimizer.param_groups for p in group["params"]}
    names = {p: name for name, p in model.named_parameters()}
    if any(p not in names for p in held):
        raise SettingError(
            "Expected optimizer to hold the model's own parameters; got one that holds others. It would train another "
            "model. Make the optimizer from model.parameters() after dpquant.fix, .to() and the like."
        )
    if missing := [name for p, name in names.items() if p.requires_grad and p not in held]:
        raise SettingError(
            f"Expected optimizer to hold every trainable parameter; it lacks {missing[0]}. It would take part in "
            "clipping and never move. Give it to the optimizer, or freeze it with requires_grad_(False)."
        )


def _check_data_set(train_set: MapDataset) -> None:
    if isinstance(train_set, IterableDataset) or not (
        hasattr(train_set, "__getitem__") and hasattr(train_set, "__len__")
    ):
        raise DataError(
            f"Expected train_set to be map-style (__len__ and __getitem__); got a {type(train_set).__name__}. "
            "Poisson sampling draws records by index. Give a torch.utils.data.Dataset with stable indices."
        )
    if len(train_set) == 0:
        raise DataError("Expected train_set to hold at least one record; got an empty data set.")
