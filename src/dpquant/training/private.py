# SPDX-License-Identifier: Apache-2.0
"""A private training run in progress; `start.make_private` begins one.

    private = make_private(model, optimizer, train_set, loss_fn=..., plan=plan, policy=DPQuantPolicy(fraction=0.9))
    for epoch in private.epochs():
        for batch in epoch:
            private.step(batch)
    print(private.statement())

A step charges the ledger, then reads the records that the plan's sampler drew, sums their clipped gradients, adds noise
and lets the optimizer move. Sampling, sensitivity, noise and accounting come from one plan; speed settings cannot
change them.

All randomness that the records meet follows from one secret key, fresh from the operating system: which records are
drawn, the noise, rounding, and what model and data set draw by themselves (dropout, augmentation). The public `seed`
is of the schedule alone. The global random streams belong to the user and stay as they are.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dpquant.backends.choose import Choices
from dpquant.backends.malloc import working_memory
from dpquant.checks.isolation import (
    Findings,
    buffers_of,
    changed_buffer,
    keeps_apart,
    restore_buffers,
)
from dpquant.engine.batches import take_rows
from dpquant.engine.clip import clipped_sum_of, step_key
from dpquant.engine.layers import set_policy, set_precisions
from dpquant.errors import BudgetError, DPQuantError, ModelError, SettingError
from dpquant.privacy import accounting
from dpquant.privacy.events import Event
from dpquant.privacy.ledger import Ledger
from dpquant.privacy.noise import NoiseSource
from dpquant.privacy.plan import PrivacyPlan
from dpquant.privacy.sampling import PoissonSampler
from dpquant.privacy.secret import SecretKey
from dpquant.rounding import derive_key
from dpquant.training.execution import Execution
from dpquant.training.impact import analysis_keys, impact_sum
from dpquant.training.policies import Policy, ema
from dpquant.training.records import Records

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
        self._objective, self._records, self._ledger = found.objective, records, ledger
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
            self._objective,
            self._records.microbatches(batch.record_ids, size, key),
            max_grad_norm=self.plan.max_grad_norm,
            key=key,
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
            apart = keeps_apart(self._objective, *companies, key=key)
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
        measured = impact_sum(
            self._objective,
            self._records.microbatches(batch.record_ids, self.execution.analysis_microbatch_size, key),
            names=names,
            max_norm=analysis.max_norm,
            keys=analysis_keys(self._record_key, number, analysis.repeats),
            score=analysis.score,
        )
        std = self.plan.analysis_noise_std(measured.sensitivity)
        noise = self._noise.gaussian(
            measured.impacts.shape, std, stream="analysis", step=number, attempt=batch.attempt, name="impacts"
        )
        noisy_means = (measured.impacts + noise) / analysis.expected_batch_size
        self.scores = ema(self.scores, dict(zip(names, noisy_means.tolist(), strict=True)), self.policy.ema)
