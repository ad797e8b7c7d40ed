# SPDX-License-Identifier: Apache-2.0
"""The library's face: a model, an optimizer, a data set and a plan become a private training run.

    private = make_private(model, optimizer, train_set, loss_fn=..., plan=plan, policy=DPQuantPolicy(fraction=0.9))
    for epoch in private.epochs():
        for batch in epoch:
            private.step(batch)
    print(private.statement())

A step charges the ledger, then reads the records that the plan's sampler drew, sums their clipped gradients, adds noise
and lets the optimizer move. Sampling, sensitivity, noise and accounting come from one plan; speed settings cannot
change them. Everything that can fail is tried on synthetic records before the first charge.

All randomness that the records meet follows from one secret key, fresh from the operating system: which records are
drawn, the noise, rounding, and what model and data set draw by themselves (dropout, augmentation). The public `seed`
is of the schedule alone. The global random streams belong to the user and stay as they are.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset, default_collate

from dpquant.backends.choose import Choices
from dpquant.backends.kernels import resolve_backend
from dpquant.backends.malloc import working_memory
from dpquant.checks.isolation import (
    Findings,
    buffers_of,
    changed_buffer,
    check_at_size,
    check_isolation,
    keeps_apart,
    restore_buffers,
)
from dpquant.checks.refusals import check_trainable
from dpquant.checks.synthetic import candidates, from_examples
from dpquant.engine.batches import take_rows
from dpquant.engine.clip import clipped_sum_of, step_key
from dpquant.engine.layers import prepare, set_policy, set_precisions
from dpquant.engine.passes import PerExampleLoss
from dpquant.errors import BudgetError, DataError, DPQuantError, ModelError, SettingError
from dpquant.formats import Precision, Recipe, precision
from dpquant.privacy import accounting
from dpquant.privacy.events import Event
from dpquant.privacy.ledger import Ledger
from dpquant.privacy.noise import NoiseSource
from dpquant.privacy.plan import PrivacyPlan
from dpquant.privacy.sampling import PoissonSampler
from dpquant.privacy.secret import SecretKey
from dpquant.rounding import derive_key
from dpquant.training.execution import Execution, decide
from dpquant.training.impact import impact_sum_of
from dpquant.training.policies import Policy, ema
from dpquant.training.records import MapDataset, Records
from dpquant.training.rehearsal import rehearse

_PROBED = 8  # records of an epoch that are compared in two companies


class Batch:
    """One logical Poisson batch: the ids of the records that were drawn, and their collated data once it is asked for.

    Attributes:
      record_ids: int64 `(B,)`. B varies, may be 0, and is private.
      step: the logical step that the batch was drawn for.
    """

    def __init__(self, record_ids: Tensor, step: int, attempt: int, load: Callable[[Tensor], Any]):
        self.record_ids, self.step, self.attempt = record_ids, step, attempt
        self._load = load

    @property
    def data(self) -> Any:
        """The sound records, collated; reads private data. `()` if there is none."""
        return self._load(self.record_ids)


class Epoch:
    """One epoch's batches, with the layers that run quantized in it.

    Attributes:
      index: from 0.
      policy: names of the quantized layers.
    """

    def __init__(self, index: int, policy: tuple[str, ...], num_steps: int, batches: Callable[[], Iterator[Batch]]):
        self.index, self.policy, self._num_steps, self._batches = index, policy, num_steps, batches
        self._begun = False

    def __len__(self) -> int:
        return self._num_steps

    def __iter__(self) -> Iterator[Batch]:
        """Draw the epoch's batches, each to be stepped with before the next.

        Raises:
          SettingError: the epoch was iterated before: its steps would be taken again under the same policy.
        """
        if self._begun:
            raise SettingError(
                f"Expected epoch {self.index} to be iterated once; got a second time. Its steps are planned once. Take "
                "the next epoch from private.epochs()."
            )
        self._begun = True
        return self._batches()


class PrivateTraining:
    """A private training run in progress. Make it with `make_private`.

    Attributes:
      model: the prepared model; in full precision between epochs, so that evaluation sees what will be deployed.
      optimizer, plan, policy: as given.
      backend: `simulate` or `int8`.
      execution: precisions, microbatch, which layers are spared, and why.
      choices: what was decided by measuring on this machine, so far; given to another run, it decides alike.
      macs: {layer: multiply-accumulates of its forward product, for one example}.
      scores: {layer: smoothed private impact}, empty before the first analysis.
      steps_taken, analyses_made: what has been charged.
      seconds_train, seconds_analysis: wall time so far.
      secure: False if the mechanism's randomness came from a given seed: then nothing is private.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        records: Records,
        *,
        loss_fn: PerExampleLoss,
        plan: PrivacyPlan,
        policy: Policy,
        found: Findings,
        execution: Execution,
        choices: Choices,
        ledger: Ledger,
        seed: int,
        secret: SecretKey,
    ):
        self.model, self.optimizer, self.plan, self.policy, self.macs = model, optimizer, plan, policy, found.macs
        self.execution, self.choices = execution, choices
        self.scores: dict[str, float] = {}
        self.steps_taken = self.analyses_made = 0
        self.seconds_train = self.seconds_analysis = 0.0
        self.secure = secret.secure
        self._records, self._loss_fn, self._ledger, self._drawing = records, loss_fn, ledger, found.drawing
        self._seed, self._record_key = seed, secret.integer("records")
        self._noise, self._sampler = NoiseSource(secret), PoissonSampler(secret)
        self._policies: list[tuple[str, ...]] = []
        self._drawn: Batch | None = None
        self._draws = 0
        self._probed = False
        self._buffers = buffers_of(model)
        self._broken = ""

    @property
    def backend(self) -> str:
        return self.execution.backend

    def epochs(self) -> Iterator[Epoch]:
        """Epochs until the plan's steps are spent. Beginning one may run the analysis and chooses its layers.

        Raises:
          BudgetError: an epoch was left without a single step, so that the plan would never end.
          SettingError: a batch was drawn and not stepped with.
        Privacy: an analysis charges one event; the choice of layers is post-processing.
        """
        while self.steps_taken < self.plan.steps:
            self._refuse_what_was_skipped()
            index, taken = len(self._policies), self.steps_taken
            if self.policy.needs_scores and index in self.plan.analysis_epochs():
                self._analyse()
            layers = self.policy.choose(
                self.macs,
                self.scores or None,
                epoch=index,
                key=derive_key(self._seed, "schedule"),
                excluded=self.execution.spared,
            )
            self._policies.append(layers)
            num_steps = min(self.plan.epoch_steps, self.plan.steps - self.steps_taken)
            yield Epoch(
                index, layers, num_steps, lambda layers=layers, num_steps=num_steps: self._run(layers, num_steps)
            )
            if self.steps_taken == taken:
                raise BudgetError(
                    f"Expected every epoch to take a step; got none in epoch {index}. Call private.step(batch)."
                )

    def step(self, batch: Batch) -> None:
        """Charge, clip, sum, add noise, and let the optimizer move (algorithm: Abadi et al., arXiv 1607.00133).

        Args:
          batch: the one that the epoch has just drawn; each can be used once.
        Raises:
          BudgetError: the planned steps are spent.
          SettingError: not the batch that the sampler drew last.
          ModelError, DataError: the model does not keep examples apart after all, or the step failed. What was charged
            stays charged.
        Privacy: charges one training event, before any record is read.
        """
        if self._broken:
            raise ModelError(self._broken)
        if self.steps_taken >= self.plan.steps:
            raise BudgetError(
                f"Expected at most {self.plan.steps} steps; got one more. The planned budget is spent. "
                "Plan more steps before the run begins."
            )
        if batch is not self._drawn:
            raise SettingError(
                "Expected the batch that the epoch has just drawn, once; got another. The accounting holds for batches "
                "of the plan's own sampler. Loop over private.epochs() and over each epoch."
            )
        began = time.perf_counter()
        self._drawn = None
        self._ledger.charge(
            kind="train", sample_rate=self.plan.sample_rate, noise_multiplier=self.plan.noise_multiplier
        )
        self.steps_taken += 1
        self._without_details(lambda: self._descend(batch))
        self.seconds_train += time.perf_counter() - began

    def _descend(self, batch: Batch) -> None:
        """Let the optimizer move along the noisy mean of the clipped gradients."""
        key, size = step_key(self._record_key, batch.step), self.execution.microbatch_size
        self._probe(batch, key)
        clipped = clipped_sum_of(
            self.model,
            self._loss_fn,
            self._records.microbatches(batch.record_ids, size, key),
            max_grad_norm=self.plan.max_grad_norm,
            key=key,
            drawing=self._drawing,
            leaves_out=True,
            complete=False,
        )
        std = self.plan.train_noise_std(clipped.sensitivity)
        for name, parameter in self.model.named_parameters():
            if name in clipped.grads:
                noise = self._noise.gaussian(
                    parameter.shape, std, stream="train", step=batch.step, attempt=batch.attempt, name=name
                )
                parameter.grad = (
                    noise.to(parameter.device).add_(clipped.grads[name]).div_(self.plan.expected_batch_size)
                )
        self.optimizer.step()

    def _probe(self, batch: Batch, key: int) -> None:
        """Once an epoch, compare a record with itself in other company.

        For a model that keeps examples apart the outcome is always the same, so that nothing is released.
        """
        if self._probed or len(batch.record_ids) == 0:
            return
        companies = self._records.company(batch.record_ids, _PROBED, key)
        if companies is None:
            return
        self._probed = True
        try:
            apart = keeps_apart(self.model, self._loss_fn, *companies, key=key, drawing=self._drawing)
        except DPQuantError:
            raise
        except Exception:  # a record that the model does not run on, which contributes nothing
            return
        if not apart:
            self._give_up("one record's gradient depends on the other records of its batch")
            raise ModelError(self._broken)

    def _check_buffers(self) -> None:
        """Put buffers back that have changed since the run began, and give up: they kept something of records."""
        if changed := changed_buffer(self.model, self._buffers):
            restore_buffers(self.model, self._buffers)
            self._give_up(f"its buffer {changed} has begun to change, and what it kept of records was not noised")

    def _give_up(self, reason: str) -> None:
        """What the run assumes of the model is not so: no step is taken any more, and the statement says so."""
        self._broken = self._broken or (
            f"Expected a model that keeps examples apart; {reason}. The check on made-up records could not see it, and "
            "the epsilon of this run DOES NOT HOLD: release nothing of it. Make the model, the loss and collate_fn "
            "treat each record by itself, or give example= records that show what these do."
        )

    def _without_details(self, work: Callable[[], None]) -> None:
        """Do what reads private records. An exception of foreign code is replaced by one that holds no data."""
        failed = None
        try:
            with working_memory(), self.choices.active(), torch.inference_mode(False), torch.enable_grad():
                work()
        except DPQuantError:
            raise
        except Exception as error:
            failed = type(error).__name__
        if failed is not None:  # raised out here, so that the other one is not attached to it
            raise ModelError(
                f"Expected a step to run as it did on made-up records; got a {failed}. Its message is withheld, "
                "because it may hold data. What was charged stays charged. Look for what differs from a made-up step: "
                "memory, the optimizer's state, hooks."
            )

    def epsilon_spent(self) -> float:
        """Epsilon at the plan's delta of everything in the ledger. Privacy: post-processing."""
        return accounting.epsilon(self.events(), self.plan.delta)

    def events(self) -> list[Event]:
        """Return what was charged so far, as an accountant composes it."""
        return self._ledger.events()

    def policies(self) -> list[tuple[str, ...]]:
        """For each epoch begun, the names of the layers that ran quantized."""
        return list(self._policies)

    def statement(self) -> str:
        """What is guaranteed, and what is not, in words."""
        statement = self.plan.statement(events=self.events(), secure=self.secure)
        return f"DOES NOT HOLD: {self._broken}\n{statement}" if self._broken else statement

    def _run(self, layers: tuple[str, ...], num_steps: int) -> Iterator[Batch]:
        """Draw batches one by one, with the epoch's layers quantized; afterwards the model is in full precision."""
        self._probed = False
        set_precisions(self.model, self.execution.precisions(self.macs, layers))
        try:
            for _ in range(num_steps):
                self._refuse_what_was_skipped()
                self._drawn = self._draw("train", self.steps_taken)
                yield self._drawn
        finally:
            set_policy(self.model, ())
            self._check_buffers()
        if self._broken:
            raise ModelError(self._broken)

    def _refuse_what_was_skipped(self) -> None:
        """A batch that is drawn is stepped with, however few records are in it: the accounting counts every draw."""
        if self._broken:
            raise ModelError(self._broken)
        if self._drawn is not None:
            raise SettingError(
                "Expected every batch that an epoch draws to be stepped with; got one that was skipped. To skip some, "
                "such as empty ones, changes the distribution of the others, which epsilon counts on. Call "
                "private.step(batch) for every batch: an empty one is a step of noise."
            )

    def _draw(self, stream: str, step: int) -> Batch:
        """A fresh Poisson batch. A step that is drawn for again draws anew: records are never chosen twice alike."""
        self._draws += 1
        rate = self.plan.sample_rate if stream == "train" else self._analysis.sample_rate
        ids = self._sampler.draw(len(self._records), rate, stream=stream, step=step, attempt=self._draws)
        return Batch(ids, step, self._draws, lambda ids: self._all_of(ids, step))

    def _all_of(self, record_ids: Tensor, step: int) -> Any:
        """What the user sees of a batch: all of its sound records at once."""
        if len(record_ids) == 0:
            return ()
        found = self._records.microbatch(record_ids, len(record_ids), step_key(self._record_key, step))
        return () if found is None else take_rows(found.data, slice(0, found.num_examples))

    @property
    def _analysis(self):
        assert self.plan.analysis is not None, "make_private refuses a policy that needs scores without an analysis"
        return self.plan.analysis

    def _analyse(self) -> None:
        """Measure every layer's impact privately: one draw, one vector, one event."""
        began, analysis, number = time.perf_counter(), self._analysis, self.analyses_made
        self._ledger.charge(
            kind="analysis", sample_rate=analysis.sample_rate, noise_multiplier=analysis.noise_multiplier
        )
        self.analyses_made += 1
        batch, names = self._draw("analysis", number), [name for name in self.macs if name not in self.execution.spared]
        self._without_details(lambda: self._score(batch, names))
        self.seconds_analysis += time.perf_counter() - began

    def _score(self, batch: Batch, names: list[str]) -> None:
        """Take the noisy mean of the batch's clipped impacts into the scores."""
        analysis, number = self._analysis, batch.step
        key = derive_key(self._record_key, "analysis", number)
        measured = impact_sum_of(
            self.model,
            self._loss_fn,
            self._records.microbatches(batch.record_ids, self.execution.analysis_microbatch_size, key),
            names=names,
            max_norm=analysis.max_norm,
            step=number,
            seed=self._record_key,
            repeats=analysis.repeats,
            score=analysis.score,
        )
        std = self.plan.analysis_noise_std(measured.sensitivity)
        noise = self._noise.gaussian(
            measured.impacts.shape, std, stream="analysis", step=number, attempt=batch.attempt, name="impacts"
        )
        noisy_means = (measured.impacts + noise) / analysis.expected_batch_size
        self.scores = ema(self.scores, dict(zip(names, noisy_means.tolist(), strict=True)), self.policy.ema)


@torch.inference_mode(False)
@torch.enable_grad()
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
    backend: str = "auto",
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
      backend: `auto`, `simulate` or `int8`, likewise. Where `auto` takes int8, layers that gain nothing from it on this
        machine stay in full precision, as long as the policy has a choice among the others.
      seed: of the schedule; never of sampling, noise, rounding, dropout or augmentation, which are secret.
      ledger: file to write charges to, ahead of each use of data; its folder is made. None keeps them in memory.
      collate_fn: list of items -> batch, a row for each item. Rows are padded to a length that the item alone decides.
      microbatch_size: examples a backward pass; None measures which is the fastest.
      memory: that the process may use at its peak, GiB, by which the microbatches of steps and analyses are chosen; it
        does not bound records that are longer than the synthetic ones. None: no limit.
      mechanism_seed: makes everything that is secret repeatable for research. The run is then NOT PRIVATE and says so.
      example: a list or data set of a few public or synthetic records, at least two, that differ in every value. The
        model is tried on them instead of on made-up ones, whose values may be outside of the data's domain.
      choices: of an earlier run, from its choices.json: what was measured there is not measured again. With the same
        settings and the same mechanism_seed the run computes the same bits. None takes what this machine remembers.
    Raises:
      ModelError, SettingError, DataError, FormatError, LedgerError: before any record's values are used. A step on
        synthetic records has then been tried, the optimizer's part in it included.
    """
    check_trainable(model)
    _check_optimizer(model, optimizer)
    _check_data_set(train_set)
    if policy.needs_scores and plan.analysis is None:
        raise SettingError(
            f"Expected plan.analysis for {type(policy).__name__}; got analysis=None. The policy favours layers whose "
            "quantization costs little, which has to be measured. Give the plan an AnalysisPlan, or use RotatePolicy."
        )
    if microbatch_size is not None and microbatch_size < 1:
        raise SettingError(f"Expected microbatch_size >= 1; got microbatch_size={microbatch_size}.")
    if memory is not None and microbatch_size is not None:
        raise SettingError(
            f"Expected one of microbatch_size and memory; got microbatch_size={microbatch_size} and memory={memory:g}. "
            "The size decides how much memory is needed. Leave one out."
        )
    chosen, others = precision(format), precision(rest)
    device = next(model.parameters()).device
    model = prepare(model, format=chosen, backend=_common_backend(backend, chosen, others, device))
    if example is None:
        specimens = candidates(_first_records(train_set), collate_fn, device)
    else:
        specimens = iter([from_examples(example, collate_fn, device)])
    quantized = [one for one, used in ((chosen, policy.quantizes), (others, others.quantized)) if used]
    found = check_isolation(model, loss_fn, specimens, quantized=quantized)
    records = Records(train_set, collate_fn, device, found.specimens)
    records.check()
    choices = choices or Choices()
    with choices.active():
        execution = decide(
            model,
            loss_fn,
            found.specimens.batch((0, 1, 2)),
            policy=policy,
            macs=found.macs,
            chosen=chosen,
            rest=others,
            backend=backend,
            plan=plan,
            microbatch_size=microbatch_size,
            memory=memory,
        )
        _try_all(model, loss_fn, optimizer, plan, policy, found, execution)
    secret = SecretKey() if mechanism_seed is None else SecretKey.from_seed(mechanism_seed)
    if ledger is not None:
        ledger.parent.mkdir(parents=True, exist_ok=True)
    return PrivateTraining(
        model,
        optimizer,
        records,
        loss_fn=loss_fn,
        plan=plan,
        policy=policy,
        found=found,
        execution=execution,
        choices=choices,
        ledger=Ledger(ledger, research=not secret.secure),
        seed=seed,
        secret=secret,
    )


def _common_backend(backend: str, chosen: Precision, others: Precision, device: torch.device) -> str:
    """The backend asked for; where it is `auto`, one that runs the other layers' precision too."""
    if backend == "auto" and any(
        resolve_backend(backend, max_code=one.max_code, fits_int8=one.fits_int8, device=device) == "simulate"
        for one in (chosen, others)
        if one.quantized
    ):
        return "simulate"
    return backend


def _first_records(train_set: MapDataset) -> list[Any]:
    """The records whose types and shapes stand for all."""
    try:
        return [train_set[index] for index in range(min(len(train_set), 3))]
    except Exception as error:
        raise DataError(
            f"Expected the first records of train_set to be readable; got a {type(error).__name__}. Their types and "
            "shapes, and nothing else of them, say what records look like. Mend them, or give example= records."
        ) from error


def _try_all(
    model: nn.Module,
    loss_fn: PerExampleLoss,
    optimizer: torch.optim.Optimizer,
    plan: PrivacyPlan,
    policy: Policy,
    found: Findings,
    execution: Execution,
) -> None:
    """Run on synthetic records all that steps and analyses will run, as the first epoch will run it."""
    layers = policy.choose(found.macs, None, epoch=0, key=0, excluded=execution.spared)
    for names in ((), layers):
        set_precisions(model, execution.precisions(found.macs, names))
        try:
            check_at_size(model, loss_fn, found, execution.microbatch_size)
            if names or not layers:
                rehearse(
                    model,
                    loss_fn,
                    optimizer,
                    plan,
                    found,
                    microbatch_size=execution.microbatch_size,
                    analysed=next(iter(found.macs), None) if policy.needs_scores else None,
                )
        finally:
            set_policy(model, ())
        if not layers:
            return


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
