# SPDX-License-Identifier: Apache-2.0
"""The library's face: a model, an optimizer, a data set and a plan become a private training run.

    private = make_private(model, optimizer, train_set, loss_fn=..., plan=plan, policy=DPQuantPolicy(fraction=0.9))
    for epoch in private.epochs():
        for batch in epoch:
            private.step(batch)
    print(private.statement())

A step charges the ledger, then reads the records that the plan's sampler drew, sums their clipped gradients, adds noise
and lets the optimizer move. Sampling, sensitivity, noise and accounting come from one plan; speed settings cannot
change them.

Three kinds of randomness do not touch: the mechanism's (which records, which noise), secret and fresh from the
operating system; rounding and scheduling, from `seed`, which carry no privacy; and the global stream, which belongs to
the user.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset, default_collate

from dpquant.accounting import Event
from dpquant.clip import PerExampleLoss, clipped_sum, with_leaves
from dpquant.errors import BudgetError, DataError, SettingError
from dpquant.execution import Execution, decide
from dpquant.formats import Precision, Recipe, precision
from dpquant.impact import impact_sum
from dpquant.isolation import check_isolation, check_trainable, made_up_batch
from dpquant.layers import prepare, set_policy, set_precisions
from dpquant.ledger import Ledger
from dpquant.noise import NoiseSource
from dpquant.plan import PrivacyPlan
from dpquant.sampling import PoissonSampler
from dpquant.schedule import Policy, ema
from dpquant.streams import derive_key
from dpquant.working_memory import working_memory


class MapDataset(Protocol):
    """A map-style data set: record i is the same record in every epoch."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@runtime_checkable
class Collated(Protocol):
    """A data set that collates records itself, faster than one by one."""

    def batch(self, record_ids: Tensor, /) -> Any: ...


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
        """The records, collated; reads private data."""
        return self._load(self.record_ids)


class Epoch:
    """One epoch's batches, with the layers that run quantized in it.

    Attributes:
      index: from 0.
      policy: names of the quantized layers.
    """

    def __init__(self, index: int, policy: tuple[str, ...], num_steps: int, batches: Callable[[], Iterator[Batch]]):
        self.index, self.policy, self._num_steps, self._batches = index, policy, num_steps, batches

    def __len__(self) -> int:
        return self._num_steps

    def __iter__(self) -> Iterator[Batch]:
        return self._batches()


class PrivateTraining:
    """A private training run in progress. Make it with `make_private`.

    Attributes:
      model: the prepared model; in full precision between epochs, so that evaluation sees what will be deployed.
      optimizer, plan, policy: as given.
      backend: `simulate` or `int8`.
      execution: precisions, microbatch, which layers are spared, and why.
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
        load: Callable[[Tensor], Any],
        num_records: int,
        *,
        loss_fn: PerExampleLoss,
        plan: PrivacyPlan,
        policy: Policy,
        macs: dict[str, float],
        execution: Execution,
        ledger: Ledger,
        seed: int,
        mechanism_seed: int | None,
    ):
        self.model, self.optimizer, self.plan, self.policy, self.macs = model, optimizer, plan, policy, macs
        self.execution = execution
        self.scores: dict[str, float] = {}
        self.steps_taken = self.analyses_made = 0
        self.seconds_train = self.seconds_analysis = 0.0
        self.secure = mechanism_seed is None
        self._load, self._num_records, self._loss_fn, self._ledger = load, num_records, loss_fn, ledger
        self._seed = seed
        self._noise = NoiseSource() if mechanism_seed is None else NoiseSource.from_seed(mechanism_seed)
        self._sampler = PoissonSampler() if mechanism_seed is None else PoissonSampler.from_seed(mechanism_seed)
        self._policies: list[tuple[str, ...]] = []
        self._drawn: Batch | None = None
        self._draws = 0

    @property
    def backend(self) -> str:
        return self.execution.backend

    def epochs(self) -> Iterator[Epoch]:
        """Epochs until the plan's steps are spent. Beginning one may run the analysis and chooses its layers.

        Raises:
          BudgetError: an epoch was left without a single step, so that the plan would never end.
        Privacy: an analysis charges one event; the choice of layers is post-processing.
        """
        while self.steps_taken < self.plan.steps:
            index, taken = len(self._policies), self.steps_taken
            if self.policy.needs_scores and index in self.plan.analysis_epochs():
                self._analyse()
            layers = self.policy.choose(
                self.macs,
                self.scores or None,
                epoch=index,
                key=self._key("schedule"),
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
        Privacy: charges one training event, before any record is read.
        """
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
        with working_memory():
            self._descend(batch)
        self.seconds_train += time.perf_counter() - began

    def _descend(self, batch: Batch) -> None:
        """Let the optimizer move along the noisy mean of the clipped gradients."""
        clipped = clipped_sum(
            self.model,
            self._loss_fn,
            batch.data,
            max_grad_norm=self.plan.max_grad_norm,
            record_ids=batch.record_ids,
            step=batch.step,
            seed=self._seed,
            microbatch_size=self.execution.microbatch_size,
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

    def epsilon_spent(self) -> float:
        """Epsilon at the plan's delta of everything charged so far. Privacy: post-processing."""
        return self.plan.epsilon_spent(steps=self.steps_taken, analyses=self.analyses_made)

    def events(self) -> list[Event]:
        """What was charged so far, as events that an accountant composes."""
        return [
            Event(kind=c.kind, sample_rate=c.sample_rate, noise_multiplier=c.noise_multiplier, count=c.count)
            for c in self._ledger.charges()
        ]

    def policies(self) -> list[tuple[str, ...]]:
        """For each epoch begun, the names of the layers that ran quantized."""
        return list(self._policies)

    def statement(self) -> str:
        """What is guaranteed, and what is not, in words."""
        return self.plan.statement(steps=self.steps_taken, analyses=self.analyses_made, secure=self.secure)

    def _key(self, purpose: str) -> int:
        return derive_key(self._seed, purpose)

    def _run(self, layers: tuple[str, ...], num_steps: int) -> Iterator[Batch]:
        """Draw batches one by one, with the epoch's layers quantized; afterwards the model is in full precision."""
        set_precisions(self.model, self.execution.precisions(self.macs, layers))
        try:
            for _ in range(num_steps):
                self._drawn = self._draw("train", self.steps_taken)
                yield self._drawn
        finally:
            set_policy(self.model, ())

    def _draw(self, stream: str, step: int) -> Batch:
        """A fresh Poisson batch. A step that is drawn for again draws anew: records are never chosen twice alike."""
        self._draws += 1
        rate = self.plan.sample_rate if stream == "train" else self._analysis.sample_rate
        ids = self._sampler.draw(self._num_records, rate, stream=stream, step=step, attempt=self._draws)
        return Batch(ids, step, self._draws, self._load)

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
        with working_memory():
            measured = impact_sum(
                self.model,
                self._loss_fn,
                batch.data,
                names=names,
                max_norm=analysis.max_norm,
                record_ids=batch.record_ids,
                step=number,
                seed=self._seed,
                repeats=analysis.repeats,
                score=analysis.score,
            )
        std = self.plan.analysis_noise_std(measured.sensitivity)
        noise = self._noise.gaussian(
            measured.impacts.shape, std, stream="analysis", step=number, attempt=batch.attempt, name="impacts"
        )
        noisy_means = (measured.impacts + noise) / analysis.expected_batch_size
        self.scores = ema(self.scores, dict(zip(names, noisy_means.tolist(), strict=True)), self.policy.ema)
        self.seconds_analysis += time.perf_counter() - began


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
) -> PrivateTraining:
    """Check everything, prepare the model, and return a run that `plan` accounts for.

    Args:
      model: the user's own; its Conv2d and Linear layers are replaced in place by quantizable twins.
      optimizer: any torch optimizer over the model's trainable parameters. It is fed the noised gradient.
      train_set: map-style. If it has a `batch(record_ids)`, that gives the collated data; else its items are collated.
      loss_fn: `(model, batch) -> Tensor (B,)`, one loss per example.
      plan: the privacy settings.
      policy: which layers run quantized.
      format: what the chosen layers run in, as for `dpquant.prepare`.
      rest: what all other layers run in; `full/luq-fp4/luq-fp4` quantizes their backward products alone.
      backend: `auto`, `simulate` or `int8`, likewise. Where `auto` takes int8, layers that gain nothing from it on this
        machine stay in full precision, as long as the policy has a choice among the others.
      seed: of rounding and of the schedule; never of sampling or noise.
      ledger: file to write charges to, ahead of each use of data; its folder is made. None keeps them in memory.
      collate_fn: list of items -> batch.
      microbatch_size: examples a backward pass; None measures which is the fastest.
      memory: that the process may use at its peak, GiB, by which the microbatch is chosen; None: no limit.
      mechanism_seed: makes sampling and noise repeatable for research. The run is then NOT PRIVATE and says so.
    Raises:
      ModelError, SettingError, DataError, FormatError, LedgerError: before any record's values are read.
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
    chosen = precision(format)
    model = prepare(model, format=chosen, backend=backend)
    device = next(model.parameters()).device

    def load(record_ids: Tensor) -> Any:
        if isinstance(train_set, Collated):
            return _to(train_set.batch(record_ids), device)
        if len(record_ids) == 0:
            return ()
        return _to(collate_fn([train_set[i] for i in record_ids.tolist()]), device)

    made_up = _to(made_up_batch(train_set[0], collate_fn), device)
    macs = check_isolation(model, loss_fn, made_up)
    execution = decide(
        model,
        loss_fn,
        made_up,
        policy=policy,
        macs=macs,
        chosen=chosen,
        rest=precision(rest),
        backend=backend,
        expected_batch_size=plan.expected_batch_size,
        microbatch_size=microbatch_size,
        memory=memory,
    )
    if ledger is not None:
        ledger.parent.mkdir(parents=True, exist_ok=True)
    return PrivateTraining(
        model,
        optimizer,
        load,
        len(train_set),
        loss_fn=loss_fn,
        plan=plan,
        policy=policy,
        macs=macs,
        execution=execution,
        ledger=Ledger(ledger, research=mechanism_seed is not None),
        seed=seed,
        mechanism_seed=mechanism_seed,
    )


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


def _to(batch: Any, device: torch.device) -> Any:
    """The batch on a device, whatever tensors it is made of."""
    return with_leaves(batch, lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf)
