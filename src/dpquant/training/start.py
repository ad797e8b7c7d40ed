# SPDX-License-Identifier: Apache-2.0
"""Start of a private run: a model, an optimizer, a data set and a plan become a `PrivateTraining` (`private.py`).

Users call `make_private`. It calls `begin`, which also accepts a mechanism, a group of processes or a subclass of
`PrivateTraining`. Everything that can fail is tried here on synthetic records, before the first charge. The ledger's
file is created last.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import default_collate

from dpquant import native
from dpquant.backends.choose import Choices
from dpquant.backends.interface import Backend
from dpquant.backends.registry import resolve
from dpquant.checks.isolation import check_isolation
from dpquant.checks.refusals import check_trainable
from dpquant.checks.synthetic import candidates, from_examples
from dpquant.engine.batches import leaves
from dpquant.engine.layers import prepare
from dpquant.engine.passes import Objective, PerExampleLoss
from dpquant.errors import DataError, SettingError
from dpquant.formats import AUTO, FULL_PRECISION, Precision, Recipe, precision
from dpquant.machine import current, processor
from dpquant.privacy.ledger import Ledger
from dpquant.privacy.mechanism import Mechanism
from dpquant.privacy.plan import PrivacyPlan
from dpquant.privacy.secret import SecretKey
from dpquant.training.agreement import on_first, together
from dpquant.training.arguments import check_arguments, check_data_set, check_optimizer
from dpquant.training.continuing import continued
from dpquant.training.distributed import Alone, Group, group_here
from dpquant.training.execution import Execution, ExecutionRequest
from dpquant.training.partition import EVEN, RANGE, Partition, check_partition
from dpquant.training.policies import Policy
from dpquant.training.private import PrivateTraining
from dpquant.training.records import MapDataset, Records
from dpquant.training.rehearsal import untimed
from dpquant.training.same import check_same, parameters_hash
from dpquant.training.setup import Setup
from dpquant.training.shared_ledger import shared
from dpquant.training.state import RunState
from dpquant.training.steps import steps_of
from dpquant.training.trial import measured, tried


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
    workers: int = 1,
    choices: Choices | None = None,
    resume: bool = False,
    exact_sums: bool = False,
    shard_optimizer: bool = False,
    partition: str = "even",
    watch: Callable[[str], None] = lambda what: None,
) -> PrivateTraining:
    """Check everything, prepare the model, and return a run that `plan` accounts for.

    Args:
      model: the user's model. Its Conv2d and Linear layers are replaced in place by quantizable layers.
      optimizer: a torch optimizer of the model's trainable parameters. It receives the noised gradient.
      train_set: a map-style data set. If it has a `dpquant_batch(record_ids)`, that gives collated batches; else its
        records are read, by `__getitems__` if there is one, and collated. A record that cannot be read, or whose
        structure, types or shapes differ from the data set's, contributes nothing and raises nothing.
      loss_fn: `(model, batch) -> Tensor (B,)`, one loss per example.
      plan: sampling, clipping, noise and number of steps.
      policy: chooses the layers that run quantized in each epoch.
      format: precision of the chosen layers, as for `dpquant.prepare`. `auto`, with `AllPolicy`, takes int8 (or four
        bits, where a device multiplies them) for the layers that gain by it on this machine, and full precision for the
        others; `execution.auto` says which and why.
      rest: precision of all other layers; `full/luq-fp4/luq-fp4` quantizes their backward products only.
      backend: `auto`, `simulate` or `int8`, as for `dpquant.prepare`. If `auto` takes int8, layers that run slower in
        it on this machine stay in full precision, provided that the policy can still choose among the others.
      seed: public seed of the layer schedule. Sampling, noise, rounding, dropout and augmentation do not depend on it.
      ledger: file for charges, written before each use of data; its folder is created. None keeps them in memory.
      collate_fn: list of records -> batch, one row for each. If it pads rows, the length may depend on that row alone.
      microbatch_size: examples a backward pass; None measures which size is the fastest. With discrete noise it is 1.
      memory: largest peak memory of the process, GiB, or of its tensors on the model's GPU; limits the microbatches of
        steps and analyses. It does not account for records that are longer than the synthetic ones. None sets no limit.
      mechanism_seed: seed that replaces the secret key, to repeat runs for research. The run is then NOT PRIVATE, and
        its statement says so.
      example: a list or data set of at least two public or synthetic records that differ in every value. The model is
        checked on them instead of on generated records, whose values may be outside of the data's domain.
      workers: threads that read microbatches ahead by `dpquant_batch`, which several of them call at the same time. The
        run is the same, bit for bit, whatever their number.
      choices: decisions of an earlier run, from its choices.json, which are then not measured again. With the same
        settings and the same mechanism_seed the run computes the same bits. None uses the decisions stored on this
        machine.
      resume: continue the run of the ledger, if the file exists: what is charged there stays charged, and only what is
        left of the plan can be spent. Load its last checkpoint next, with `private.load`.
      exact_sums: add the sums of microbatches up as integers, so that a run of the same choices and mechanism_seed has
        the same bits for any number of processes. Costs twice the bytes, and a pass over the parameters a microbatch.
      shard_optimizer: of several processes, each steps a slice of the parameters and holds the optimizer's state of
        that slice alone. The run is the same, bit for bit. The optimizer is torch's SGD, Adam or AdamW, parameters
        have no gradients to read after a step, and every process calls `gather_state` before process 0 saves.
      partition: of several processes. `even`: all have the same `train_set`, and share each batch. `range`: each has
        records of its own, which no other process reads; a record that two of them have counts twice, and epsilon then
        holds for one of its two copies. One may have none, if `example` is given. The plan counts the records of all.
      watch: called with a few words about each phase of the start, when it begins.
    Returns: a run that has charged nothing yet.
    Raises:
      ModelError: the model cannot be trained privately.
      SettingError: an argument is out of range, or arguments contradict each other.
      DataError: the data set is empty or not map-style, its records cannot be read or collated, or they differ from
        `example` in structure, types or shapes.
      FormatError: a format is unknown, or the backend cannot run it.
      LedgerError: the ledger's file cannot be created.
    Privacy: uses types and shapes of the first records, and no values. Charges nothing.
    """
    check_arguments(locals())
    request = Request(
        model=model,
        optimizer=optimizer,
        train_set=train_set,
        loss_fn=loss_fn,
        plan=plan,
        policy=policy,
        execution=ExecutionRequest(
            chosen=FULL_PRECISION if format == AUTO else precision(format),
            auto=format == AUTO,
            rest=precision(rest),
            backend=backend,
            microbatch_size=microbatch_size,
            memory=memory,
            exact_sums=exact_sums,
        ),
        seed=seed,
        collate_fn=collate_fn,
        example=example,
        workers=workers,
        choices=choices,
        shard_optimizer=shard_optimizer,
        partition=partition,
        watch=watch,
    )

    group = group_here()

    def mechanism(step_seconds: float) -> Mechanism:
        key = SecretKey() if mechanism_seed is None else SecretKey.from_seed(mechanism_seed)
        facts = {"budget": plan.budget(), "research": not key.secure, "step_seconds": step_seconds}

        def opened() -> Ledger:
            if resume and ledger is not None and ledger.exists():
                return Ledger.resumed(ledger, **facts)
            return Ledger(ledger, **facts)

        return Mechanism.keyed(key.of_first(group.from_first), shared(group, opened))

    return begin(request, mechanism, group=group)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """Arguments of `make_private` without those of the mechanism; `execution` holds those on precision and speed."""

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
    workers: int = 1
    choices: Choices | None = None
    shard_optimizer: bool = False
    partition: str = EVEN
    watch: Callable[[str], None] = lambda what: None


MakeRun = Callable[[Setup, Records, RunState, Choices, Mechanism, Group], PrivateTraining]


@torch.inference_mode(False)
@torch.enable_grad()
def begin(
    request: Request,
    make_mechanism: Callable[[float], Mechanism],
    *,
    group: Group | None = None,
    make_run: MakeRun = PrivateTraining,
) -> PrivateTraining:
    """Check everything, prepare the model, and return a run.

    Args:
      request: model, data set and settings of the run.
      make_mechanism: makes sampler, noise, ledger and key. It is called once, after all checks, because it may create
        files, and is given the seconds of a step on synthetic records.
      group: the processes of the run; None for one process.
      make_run: `PrivateTraining`, or a subclass.
    Raises: the errors of `make_private`.
    Privacy: uses types and shapes of the first records, and no values. Charges nothing.
    """
    group, device = group or Alone(), next((p.device for p in request.model.parameters()), torch.device("cpu"))
    with current(device):
        partition = Partition.of(together(group, lambda: _counted(request)), request.partition, group)
        setup, records, wanted = together(group, lambda: _checked(request, group, partition))
        wanted = dataclasses.replace(wanted, processes=group.size)
        check_same(group, _facts(request, setup) if group.size > 1 else {})
        request.watch("measuring this machine")
        choices = request.choices or Choices()

        def measure() -> bytes:
            with choices.active():
                execution, seconds = measured(setup, wanted, device)
            state = RunState(execution=execution, choices=choices.made, processes=group.size).to_json()
            return json.dumps({"state": state, "step_seconds": seconds}).encode()

        answer = json.loads(on_first(group, measure))
        place, step_seconds = RunState.from_json(answer["state"]), answer["step_seconds"]
        if wanted.exact_sums:
            choices = untimed(place.choices)
        elif group.rank > 0:  # what process 0 has measured holds for all
            choices = Choices(place.choices)
        choices.made.update(place.choices)
        together(group, lambda: _followed(setup, place.execution, choices, group, device))
    mechanism = make_mechanism(step_seconds)
    if mechanism.ledger.charged("train") or mechanism.ledger.charged("analysis"):
        place = continued(place, mechanism.ledger, place.execution, repeatable=mechanism.repeats)
    return make_run(dataclasses.replace(setup, step_seconds=step_seconds), records, place, choices, mechanism, group)


def _followed(setup: Setup, execution: Execution, choices: Choices, group: Group, device: torch.device) -> None:
    """Try the execution of process 0 on another process."""
    if group.rank > 0:
        with choices.active():
            tried(setup, execution, device)


def _facts(request: Request, setup: Setup) -> dict[str, str]:
    """Return what has to be the same on every process of a run."""
    wanted, specimen = request.execution, setup.found.specimens.batch((0,))
    return {
        "form of records": repr([(name, *_form(leaf)) for name, leaf in leaves(specimen)]),
        **({"processor": repr((processor()[:2], torch.__version__, native.build()))} if wanted.exact_sums else {}),
        "parameters": parameters_hash(request.model),
        "plan": request.plan.to_json(),
        "policy": repr(request.policy) if dataclasses.is_dataclass(request.policy) else type(request.policy).__name__,
        "format": f"{wanted.chosen.name} {wanted.rest.name} {wanted.auto}",
        "exact_sums": str(wanted.exact_sums),
        "shard_optimizer": str(request.shard_optimizer),
        "seed": str(request.seed),
        "optimizer": type(request.optimizer).__name__,
        **({"number of records": str(len(request.train_set))} if request.partition == EVEN else {}),
    }


def _form(leaf: Any) -> tuple[Any, ...]:
    return (leaf.dtype, tuple(leaf.shape)) if isinstance(leaf, torch.Tensor) else (type(leaf).__name__,)


def _counted(request: Request) -> int:
    """Check the data set as far as no model is needed, and return the number of its records."""
    check_partition(request.partition, exact_sums=request.execution.exact_sums)
    check_data_set(request.train_set, may_be_empty=request.partition == RANGE and request.example is not None)
    return len(request.train_set)


def _checked(request: Request, group: Group, partition: Partition) -> tuple[Setup, Records, ExecutionRequest]:
    """Check the request and prepare the model."""
    model, train_set, plan, policy = request.model, request.train_set, request.plan, request.policy
    request.watch("checking the model")
    check_trainable(model)
    check_optimizer(model, request.optimizer)
    if policy.needs_scores and plan.analysis is None:
        raise SettingError(
            f"Expected plan.analysis for {type(policy).__name__}; got analysis=None. The policy favours layers whose "
            "quantization costs little, which has to be measured. Give the plan an AnalysisPlan, or use RotatePolicy."
        )
    device = next(model.parameters()).device
    wanted = request.execution.on(device)
    if plan.noise == "discrete" and wanted.microbatch_size not in (None, 1):
        raise SettingError(
            f"Expected microbatch_size=1 with noise=discrete; got microbatch_size={wanted.microbatch_size}. The last "
            "bits of a record's gradient depend on its place in a microbatch, and so on other records. Leave it out."
        )
    used = [wanted.chosen, wanted.rest] if wanted.rest.quantized else [wanted.chosen]
    model = prepare(model, format=wanted.chosen, backend=resolve(wanted.backend, used, device))
    if request.example is None:
        specimens = candidates(_first_records(train_set), request.collate_fn, device)
    else:
        specimens = iter([from_examples(request.example, request.collate_fn, device)])
    runs = (policy.quantizes and wanted.chosen.quantized, wanted.chosen), (wanted.rest.quantized, wanted.rest)
    quantized = [one for used, one in runs if used]
    found = check_isolation(Objective(model, request.loss_fn), specimens, quantized=quantized)
    records = Records(train_set, request.collate_fn, device, found.specimens, request.workers, partition)
    records.check()
    setup = Setup(
        optimizer=request.optimizer,
        steps=steps_of(request.optimizer, found.objective.trainable(), group, sharded=request.shard_optimizer),
        plan=plan,
        policy=policy,
        seed=request.seed,
        found=found,
        lengths=records.lengths,
    )
    return setup, records, dataclasses.replace(wanted, groups=max(len(records.lengths), 1))


def _first_records(train_set: MapDataset) -> list[Any]:
    """Return the first records, whose types and shapes define those of all records."""
    try:
        return [train_set[index] for index in range(min(len(train_set), 3))]
    except Exception as error:
        raise DataError(
            f"Expected the first records of train_set to be readable; got a {type(error).__name__}. Their types and "
            "shapes, and nothing else of them, say what records look like. Mend them, or give example= records."
        ) from None  # its text may quote a record
