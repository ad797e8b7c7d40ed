# SPDX-License-Identifier: Apache-2.0
"""A private training run in progress; `start.make_private` begins one.

    private = make_private(model, optimizer, train_set, loss_fn=..., plan=plan, policy=DPQuantPolicy(fraction=0.9))
    for epoch in private.epochs():
        for batch in epoch:
            private.step(batch)
    print(private.statement())

A step charges the ledger, then reads the records that the plan's sampler drew, sums their clipped gradients, adds noise
and lets the optimizer move. Sampling, sensitivity, noise and accounting come from one plan; speed settings cannot
change them. What samples, hides and charges is the run's `Mechanism`; its other processes are met in its `Group`.

All randomness that the records meet follows from one secret key, fresh from the operating system: which records are
drawn, the noise, rounding, and what model and data set draw by themselves (dropout, augmentation). The public `seed`
is of the schedule alone. The global random streams belong to the user and stay as they are.
"""

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dpquant.backends.choose import Choices
from dpquant.backends.malloc import working_memory
from dpquant.checks.isolation import (
    buffers_of,
    changed_buffer,
    keeps_apart,
    restore_buffers,
)
from dpquant.engine.batches import Microbatch, take_rows
from dpquant.engine.clip import ClippedSum, clipped_sum_of, step_key
from dpquant.engine.layers import set_policy, set_precisions
from dpquant.errors import BudgetError, DPQuantError, ModelError, SettingError
from dpquant.privacy import accounting
from dpquant.privacy.events import Event, Kind
from dpquant.privacy.mechanism import Mechanism
from dpquant.privacy.plan import AnalysisPlan, PrivacyPlan
from dpquant.rounding import derive_key
from dpquant.training.distributed import Group
from dpquant.training.epoch import Batch, Epoch
from dpquant.training.execution import Execution
from dpquant.training.impact import ImpactSum, analysis_keys, impact_sum
from dpquant.training.policies import ema
from dpquant.training.records import Records
from dpquant.training.setup import Setup
from dpquant.training.state import RunState

_PROBED = 8  # records of an epoch that are compared in two companies


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
      state: where the run stands, as one value.
      seconds_train, seconds_analysis: wall time so far.
      secure: False if the mechanism's randomness came from a given seed: then nothing is private.
    """

    def __init__(
        self,
        setup: Setup,
        records: Records,
        state: RunState,
        choices: Choices,
        mechanism: Mechanism,
        group: Group,
    ):
        """Join the parts of a run; `start.begin` makes and checks them.

        Args:
          setup: what is trained, and by which rules.
          records: the private data set.
          state: where the run stands; of a new run, nothing but its execution.
          choices: what was decided by measuring, so far.
          mechanism: what samples, hides and charges.
          group: the processes of the run.
        """
        self.model, self.optimizer = setup.found.objective.model, setup.optimizer
        self.plan, self.policy = setup.plan, setup.policy
        self.macs, self.choices = setup.found.macs, choices
        self.seconds_train = self.seconds_analysis = 0.0
        self._records, self._mechanism, self._group, self._state = records, mechanism, group, state
        self._objective, self._seed = setup.found.objective, setup.seed
        self._drawn: Batch | None = None
        self._probed = False
        self._buffers = buffers_of(self.model)

    @property
    def state(self) -> RunState:
        """Where the run stands, as a value that stays as it is. Privacy: post-processing."""
        head, made = self._mechanism.ledger.head, dict(self.choices.made)
        return dataclasses.replace(self._state, ledger_head=head, choices=made)

    @property
    def execution(self) -> Execution:
        return self._state.execution

    @property
    def backend(self) -> str:
        return self.execution.backend

    @property
    def secure(self) -> bool:
        return self._mechanism.secure

    @property
    def steps_taken(self) -> int:
        return self._state.steps_taken

    @property
    def analyses_made(self) -> int:
        return self._state.analyses_made

    @property
    def scores(self) -> dict[str, float]:
        return dict(self._state.scores)

    def epochs(self) -> Iterator[Epoch]:
        """Epochs until the plan's steps are spent. Beginning one may run the analysis and chooses its layers.

        Raises:
          BudgetError: an epoch was left without a single step, so that the plan would never end.
          SettingError: a batch was drawn and not stepped with.
        Privacy: an analysis charges one event; the choice of layers is post-processing.
        """
        while self.steps_taken < self.plan.steps:
            self._refuse_what_was_skipped()
            index, taken = len(self._state.policies), self.steps_taken
            if self.policy.needs_scores and index in self.plan.analysis_epochs():
                self._analyse()
            layers = self.policy.choose(
                self.macs,
                self.scores or None,
                epoch=index,
                key=derive_key(self._seed, "schedule"),
                excluded=self.execution.excluded_layers,
            )
            self._advance(policies=(*self._state.policies, layers))
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
        self._refuse_if_broken()
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
        self._charge("train", self.plan)
        self._advance(steps_taken=self.steps_taken + 1)
        self._without_details(lambda: self._descend(batch))
        self.seconds_train += time.perf_counter() - began

    def _descend(self, batch: Batch) -> None:
        """Let the optimizer move along the noisy mean of the clipped gradients."""
        key = self._key_of(batch.step)
        self._probe(batch, key)
        mine = self._group.share(batch.record_ids)
        clipped = self._clipped_sum(self._records.microbatches(mine, self.execution.microbatch_size, key), key)
        self._group.add(clipped.grads)
        std = self.plan.train_noise_std(clipped.sensitivity)
        for name, parameter in self.model.named_parameters():
            if name in clipped.grads:
                noise = self._mechanism.noise.gaussian(
                    parameter.shape, std, stream="train", step=batch.step, attempt=batch.attempt, name=name
                )
                parameter.grad = (
                    noise.to(parameter.device).add_(clipped.grads[name]).div_(self.plan.expected_batch_size)
                )
        self.optimizer.step()

    def _key_of(self, step: int) -> int:
        """The secret key of all draws of a step's records."""
        return step_key(self._mechanism.record_key, step)

    def _clipped_sum(self, pieces: Iterable[Microbatch], key: int) -> ClippedSum:
        """Return the sum of the records' clipped gradients, those left out on which model or loss raise."""
        return clipped_sum_of(
            self._objective,
            pieces,
            max_grad_norm=self.plan.max_grad_norm,
            key=key,
            leaves_out=True,
            complete=False,
        )

    def _probe(self, batch: Batch, key: int) -> None:
        """Once an epoch, compare a record's gradient with its gradient among other batchmates.

        For a model that keeps examples apart the outcome is always the same, so that nothing is released. All
        processes of a group compare the same record, so that they give up together.
        """
        if self._probed or len(batch.record_ids) == 0:
            return
        companies = self._records.batchmates(batch.record_ids, _PROBED, key)
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
            self._refuse_if_broken()

    def _check_buffers(self) -> None:
        """Put buffers back that have changed since the run began, and give up: they kept something of records."""
        if changed := changed_buffer(self.model, self._buffers):
            restore_buffers(self.model, self._buffers)
            self._give_up(f"its buffer {changed} has begun to change, and what it kept of records was not noised")

    def _give_up(self, reason: str) -> None:
        """What the run assumes of the model is not so: no step is taken any more, and the statement says so."""
        broken = (
            f"Expected a model that keeps examples apart; {reason}. The check on synthetic records could not see it, "
            "and the epsilon of this run DOES NOT HOLD: release nothing of it. Make the model, the loss and collate_fn "
            "treat each record by itself, or give example= records that show what these do."
        )
        self._advance(broken=self._state.broken or broken)

    def _refuse_if_broken(self) -> None:
        if self._state.broken:
            raise ModelError(self._state.broken)

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
                f"Expected a step to run as it did on synthetic records; got a {failed}. Its message is withheld, "
                "because it may hold data. What was charged stays charged. Look for what differs from a synthetic "
                "step: memory, the optimizer's state, hooks."
            )

    def epsilon_spent(self) -> float:
        """Epsilon at the plan's delta of everything in the ledger. Privacy: post-processing."""
        return accounting.epsilon(self.events(), self.plan.delta)

    def events(self) -> list[Event]:
        """Return what was charged so far, as an accountant composes it."""
        return self._mechanism.ledger.events()

    def policies(self) -> list[tuple[str, ...]]:
        """For each epoch begun, the names of the layers that ran quantized."""
        return list(self._state.policies)

    def statement(self) -> str:
        """What is guaranteed, and what is not, in words."""
        statement = self.plan.statement(events=self.events(), secure=self.secure)
        return f"DOES NOT HOLD: {self._state.broken}\n{statement}" if self._state.broken else statement

    def _run(self, layers: tuple[str, ...], num_steps: int) -> Iterator[Batch]:
        """Draw batches one by one, with the epoch's layers quantized; afterwards the model is in full precision."""
        self._probed = False
        set_precisions(self.model, self.execution.precisions(self.macs, layers))
        try:
            for _ in range(num_steps):
                self._refuse_what_was_skipped()
                self._drawn = self._draw("train", self.plan, self.steps_taken)
                yield self._drawn
        finally:
            set_policy(self.model, ())
            self._check_buffers()
        self._refuse_if_broken()

    def _refuse_what_was_skipped(self) -> None:
        """A batch that is drawn is stepped with, however few records are in it: the accounting counts every draw."""
        self._refuse_if_broken()
        if self._drawn is not None:
            raise SettingError(
                "Expected every batch that an epoch draws to be stepped with; got one that was skipped. To skip some, "
                "such as empty ones, changes the distribution of the others, which epsilon counts on. Call "
                "private.step(batch) for every batch: an empty one is a step of noise."
            )

    def _charge(self, kind: Kind, planned: PrivacyPlan | AnalysisPlan) -> None:
        """Charge one event. Once this returns it is paid for, on every process."""
        self._mechanism.ledger.charge(
            kind=kind, sample_rate=planned.sample_rate, noise_multiplier=planned.noise_multiplier
        )
        self._group.barrier()

    def _advance(self, **changes: Any) -> None:
        self._state = dataclasses.replace(self._state, **changes)

    def _draw(self, stream: Kind, planned: PrivacyPlan | AnalysisPlan, step: int) -> Batch:
        """Return a Poisson batch. A step that is drawn for again has another attempt, and so other records."""
        self._advance(draws=self._state.draws + 1)
        attempt = self._state.draws
        ids = self._mechanism.sampler.draw(
            len(self._records), planned.sample_rate, stream=stream, step=step, attempt=attempt
        )
        return Batch(ids, step, attempt, lambda ids: self._all_of(ids, step))

    def _all_of(self, record_ids: Tensor, step: int) -> Any:
        """What the user sees of a batch: all of its sound records at once."""
        if len(record_ids) == 0:
            return ()
        found = self._records.microbatch(record_ids, len(record_ids), self._key_of(step))
        return () if found is None else take_rows(found.data, slice(0, found.num_examples))

    @property
    def _analysis(self) -> AnalysisPlan:
        assert self.plan.analysis is not None, "make_private refuses a policy that needs scores without an analysis"
        return self.plan.analysis

    def _analyse(self) -> None:
        """Measure every layer's impact privately: one draw, one vector, one event."""
        began, number = time.perf_counter(), self.analyses_made
        self._charge("analysis", self._analysis)
        self._advance(analyses_made=number + 1)
        batch = self._draw("analysis", self._analysis, number)
        self._without_details(lambda: self._score(batch))
        self.seconds_analysis += time.perf_counter() - began

    def _score(self, batch: Batch) -> None:
        """Take the noisy mean of the batch's clipped impacts into the scores."""
        names = [name for name in self.macs if name not in self.execution.excluded_layers]
        key = derive_key(self._mechanism.record_key, "analysis", batch.step)
        mine, size = self._group.share(batch.record_ids), self.execution.analysis_microbatch_size
        keys = analysis_keys(self._mechanism.record_key, batch.step, self._analysis.repeats)
        measured = self._impact_sum(self._records.microbatches(mine, size, key), names, keys)
        self._group.add({"impacts": measured.impacts})
        std = self.plan.analysis_noise_std(measured.sensitivity)
        noise = self._mechanism.noise.gaussian(
            measured.impacts.shape, std, stream="analysis", step=batch.step, attempt=batch.attempt, name="impacts"
        )
        noisy_means = (measured.impacts + noise) / self._analysis.expected_batch_size
        new = dict(zip(names, noisy_means.tolist(), strict=True))
        self._advance(scores=ema(self._state.scores, new, self.policy.ema))

    def _impact_sum(self, pieces: Iterable[Microbatch], names: Sequence[str], keys: Sequence[int]) -> ImpactSum:
        """Return the sum of the records' clipped impacts; `keys` are of their draws, and secret."""
        return impact_sum(
            self._objective,
            pieces,
            names=names,
            max_norm=self._analysis.max_norm,
            keys=keys,
            score=self._analysis.score,
        )
