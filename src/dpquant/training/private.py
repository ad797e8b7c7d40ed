# SPDX-License-Identifier: Apache-2.0
"""A private training run in progress. `start.make_private` starts one:

    private = make_private(model, optimizer, train_set, loss_fn=..., plan=plan, policy=DPQuantPolicy(fraction=0.9))
    for epoch in private.epochs():
        for batch in epoch:
            private.step(batch)
    print(private.statement())

A step charges the ledger, then reads the records that the plan's sampler drew, sums their clipped gradients, adds noise
and calls the optimizer. Sampling, sensitivity, noise and accounting come from one plan; settings that affect speed
cannot change them. The run's `Mechanism` samples, adds noise and charges. Its `Group` connects it to the other
processes.

All random numbers that touch records are derived from one secret key, fresh from the operating system: which records
are drawn, the noise, rounding, and the draws of model and data set (dropout, augmentation). The public `seed` decides
the layer schedule alone. The global random generators belong to the user and are left unchanged.
"""

import dataclasses
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dpquant.backends.choose import Choices
from dpquant.engine.batches import Microbatch
from dpquant.engine.clip import ClippedSum, step_key
from dpquant.engine.layers import set_policy, set_precisions
from dpquant.errors import BudgetError, ModelError, SettingError
from dpquant.privacy import accounting
from dpquant.privacy.analysis_plan import AnalysisPlan
from dpquant.privacy.events import Event, Kind
from dpquant.privacy.mechanism import Mechanism
from dpquant.privacy.plan import PrivacyPlan
from dpquant.rounding import derive_key
from dpquant.training.agreement import first_reason, together
from dpquant.training.ahead import drawing
from dpquant.training.checkpoint import Checkpoint
from dpquant.training.continuing import Parts, Stateful, charge_once, continued
from dpquant.training.distributed import Group
from dpquant.training.epoch import Batch, Epoch, not_drawn, skipped
from dpquant.training.exchange import noisy_means, own_parts
from dpquant.training.execution import Execution
from dpquant.training.impact import ImpactSum, analysis_keys
from dpquant.training.policies import ema
from dpquant.training.records import Records
from dpquant.training.same import EVERY, check_parameters
from dpquant.training.setup import Setup
from dpquant.training.state import RunState
from dpquant.training.sums import (
    analysis_noise,
    analysis_sum,
    check_sensitivity,
    draws_of_noise,
    noising,
    noising_analysis,
    step_sum,
)
from dpquant.training.waiting import in_time
from dpquant.training.watch import Watch, broken, without_details


class PrivateTraining:
    """A private training run in progress. Make it with `make_private`.

    Attributes:
      model: the prepared model. Between epochs it is in full precision, as it will be deployed, for evaluation.
      optimizer, plan, policy: as given.
      backend: `simulate` or `int8`.
      execution: precisions, microbatch sizes and excluded layers, with reasons.
      choices: decisions measured on this machine so far. Another run that is given them makes the same decisions.
      macs: {layer: multiply-accumulates of its forward product, for one example}.
      scores: {layer: smoothed private impact}; empty before the first analysis.
      steps_taken, analyses_made: numbers of charged steps and analyses.
      state: state of the run, as one value.
      seconds_train, seconds_analysis: wall time so far; depends on the private batch sizes and is not for release.
      secure: False if sampling or noise came from a given seed. Then the run is not private.
      group: the processes of the run.
      step_seconds: time of a step on synthetic records, measured at the start; public.
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
        """Join the parts of a run, which `start.begin` makes and checks. Of a new run's state only execution is set."""
        self.model, self.optimizer = setup.found.objective.model, setup.optimizer
        self.plan, self.policy, self._steps = setup.plan, setup.policy, setup.steps
        self.macs, self.choices, self.step_seconds = setup.found.macs, choices, setup.step_seconds
        self.seconds_train = self.seconds_analysis = 0.0
        self._records, self._mechanism, self.group, self._state = records, mechanism, group, state
        self._objective, self._seed = setup.found.objective, setup.seed
        self._drawn: Batch | None = None
        self._watch, self._began = Watch(setup.found.objective, records), False
        self._device = next(self.model.parameters()).device

    @property
    def state(self) -> RunState:
        """State of the run, as an immutable value. Privacy: post-processing."""
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
        """Yield epochs until the planned steps are taken, each after its analysis, if planned, and choice of layers.

        Raises:
          BudgetError: no step was taken in an epoch, so that the loop would never end.
          SettingError: a batch was drawn, but `step` was not called with it.
        Privacy: an analysis charges one event; the choice of layers is post-processing.
        """
        try:
            while self.steps_taken < self.plan.steps:
                self._refuse_what_was_skipped()
                taken = self.steps_taken
                index = taken // self.plan.epoch_steps
                if index > self._state.epoch:  # else a run continues in the middle of it
                    self._begin(index)
                layers = self._state.policies[-1]
                num_steps = min((index + 1) * self.plan.epoch_steps, self.plan.steps) - taken
                yield Epoch(
                    index, layers, num_steps, lambda layers=layers, num_steps=num_steps: self._run(layers, num_steps)
                )
                if self.steps_taken == taken:
                    raise BudgetError(
                        f"Expected every epoch to take a step; got none in epoch {index}. Call private.step(batch)."
                    )
        finally:
            self._mechanism.ledger.settle()

    def _begin(self, index: int) -> None:
        """Begin an epoch: make the analysis that is due, and choose the layers that run quantized."""
        due = sum(epoch <= index for epoch in self.plan.analysis_epochs())
        if self.policy.needs_scores and self.analyses_made < due:
            self._analyse()
        key, excluded = derive_key(self._seed, "schedule"), self.execution.excluded_layers
        layers = self.policy.choose(self.macs, self.scores or None, epoch=index, key=key, excluded=excluded)
        self._advance(epoch=index, policies=(*self._state.policies, layers))

    def step(self, batch: Batch) -> None:
        """Take one step of DP-SGD: charge, clip, sum, add noise, and call the optimizer.

        Args:
          batch: the batch that the epoch has just drawn; each can be used once.
        Raises:
          BudgetError: all planned steps have been taken.
          SettingError: the batch is not the one that the sampler drew last.
          ModelError, DataError: the model turns out not to keep examples apart, or the step failed. What was charged
            stays charged.
          SettingError: memory did not suffice. What was charged stays charged.
        Privacy: charges one training event, before any record is read.
        Source: Abadi et al., arXiv 1607.00133, Algorithm 1.
        """
        self._refuse_if_broken()
        if self.steps_taken >= self.plan.steps:
            raise BudgetError(
                f"Expected at most {self.plan.steps} steps; got one more. The planned budget is spent. "
                "Plan more steps before the run begins."
            )
        if batch is not self._drawn:
            raise not_drawn()
        began = time.perf_counter()
        self._drawn = None
        self._charge("train", self.plan, self.steps_taken)
        self._advance(steps_taken=self.steps_taken + 1)
        without_details(lambda: self._descend(batch), self.choices, self._device)
        self.seconds_train += time.perf_counter() - began

    @in_time
    def _descend(self, batch: Batch) -> None:
        """Step the optimizer with the noisy mean of the clipped gradients."""
        key = self._key_of(batch.step)
        self._probe(batch, key)
        trainable, size = self._objective.trainable(), self.execution.microbatch_size
        draws = draws_of_noise(self._mechanism.noise, self.plan, batch, trainable, own_parts(trainable, self.group))
        with drawing(draws, self._device) as noise_of:
            clipped = together(self.group, lambda: self._clipped_sum(self._pieces(batch, size, key), key))
            check_sensitivity(clipped, self.plan)
            noised = noising(clipped, noise_of, self.plan)
            self._steps.receive(trainable, clipped.grads, noised)
        self._watch.take_step(self._steps)
        if self.steps_taken % EVERY == 0:
            check_parameters(self.group, self.model)

    def _pieces(self, batch: Batch, size: int, key: int) -> Iterable[Microbatch]:
        """Read this process' share of a batch, `size` records at a time."""
        ids, taken = self._records.partition.cut(batch.record_ids, self.group, whole=self.execution.exact_sums)
        return self._records.microbatches(ids, size, key, taken)

    def _key_of(self, step: int) -> int:
        """Return the secret key of all random numbers that are drawn for records in a step."""
        return step_key(self._mechanism.record_key, step)

    def _clipped_sum(self, pieces: Iterable[Microbatch], key: int) -> ClippedSum:
        """Return the sum of the records' clipped gradients, without records on which model or loss raise."""
        return step_sum(self._objective, pieces, self.plan, key, leaves_out=True, exact=self.execution.exact_sums)

    def _probe(self, batch: Batch, key: int) -> None:
        """Check once an epoch that a record's gradient does not depend on the other records of its batch."""
        mine = self._records.partition.share(batch.record_ids, self.group)
        self._stop_if(first_reason(self.group, lambda: self._watch.coupling(mine, key)))
        self._refuse_if_broken()

    def _stop_if(self, reason: str) -> None:
        """Stop the run, if there is a reason: no more steps, and the statement says why."""
        if reason:
            self._advance(broken=self._state.broken or broken(reason))

    def _refuse_if_broken(self) -> None:
        """Raise a ModelError if the run has been stopped."""
        if self._state.broken:
            raise ModelError(self._state.broken)

    def gather_state(self) -> None:
        """Bring the optimizer's state together for `save`. With `shard_optimizer` every process has to call this.

        Privacy: post-processing. Process 0 holds the whole state until it has saved or taken a step.
        """
        self._steps.gather_state()

    def save(self, path: Path, **others: Stateful) -> None:
        """Write a checkpoint, completely or not at all: model, optimizer, the run's state, and whatever else is named.

        Args:
          path: folder that is made; it must not exist. Of several processes the first calls this, and all load it.
          others: objects with `state_dict` and `load_state_dict`, as a learning-rate scheduler.
        Raises:
          SettingError: a state holds what only pickle could save, the folder cannot be written, or the state of a
            sharded optimizer was not gathered.
          ModelError: the run has been stopped, or the model has kept something of its records in a buffer.
        Privacy: post-processing. It holds no key and no record.
        """
        self._stop_if(self._watch.changed_buffer())
        self._refuse_if_broken()
        self._parts(others).save(path, self.state)

    def load(self, path: Path, **others: Stateful) -> None:
        """Continue from a checkpoint. To be called before the first step, on a run of `make_private(resume=True)`.

        Args:
          path: folder that `save` wrote.
          others: the same names as for `save`.
        Raises:
          DataError: the folder is not as it was written, or is of another model or optimizer.
          SettingError: it is of another plan or other names, or this process has drawn a batch before.
          LedgerError: the ledger holds fewer charges than the checkpoint.
        Privacy: post-processing. Steps that were charged after the checkpoint stay charged and are lost.
        """
        if self._began:
            raise SettingError("Expected load before the run's first batch; got it later. Call it after make_private.")
        saved = self._parts(others).restore(Checkpoint.read(path))
        place = continued(saved, self._mechanism.ledger, self.execution, repeatable=self._mechanism.repeats)
        self._state = dataclasses.replace(place, processes=max(place.processes, self.group.size))
        self._watch.keep_buffers()

    def replace_weights(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        """Go on from other values of the model's tensors, as a server's average. The optimizer keeps its state.

        Args:
          state_dict: of a model like this one, public or released by somebody.
        Raises:
          SettingError, ModelError: a drawn batch is left, or the run has been stopped.
          DataError: a tensor is missing, or of another shape or type.
        Privacy: charges nothing. What is guaranteed of a step holds for any values, even those of an adversary.
        """
        self._refuse_what_was_skipped()
        self._stop_if(self._watch.replace(state_dict))
        self._refuse_if_broken()

    def _parts(self, others: Mapping[str, Stateful]) -> Parts:
        return Parts(model=self.model, optimizer=self._steps, plan=self.plan, others=others)

    def epsilon_spent(self) -> float:
        """Return epsilon, at the plan's delta, of everything in the ledger. Privacy: post-processing."""
        return accounting.epsilon(self.events(), self.plan.delta)

    def events(self) -> list[Event]:
        """Return the events charged so far, equal releases counted together."""
        return self._mechanism.ledger.events()

    def close(self) -> None:
        """End the run early: give back the steps that were charged ahead and not taken, and take no more."""
        self._mechanism.ledger.close()

    def policies(self) -> list[tuple[str, ...]]:
        """Return, for each epoch begun, the names of the layers that run quantized."""
        return list(self._state.policies)

    def statement(self) -> str:
        """Return the privacy statement: what is guaranteed and what is not, in words."""
        num_values = sum(p.numel() for p in self._objective.trainable().values())
        statement = self.plan.statement(
            events=self.events(),
            secure=self.secure,
            num_values=num_values,
            processes=self._state.processes,
            records_apart=self._records.partition.by_range,
        )
        return f"DOES NOT HOLD: {self._state.broken}\n{statement}" if self._state.broken else statement

    def _run(self, layers: tuple[str, ...], num_steps: int) -> Iterator[Batch]:
        """Draw an epoch's batches one by one, with its layers quantized; afterwards return to full precision."""
        self._watch.begin_epoch()
        set_precisions(self.model, self.execution.precisions(self.macs, layers))
        try:
            for _ in range(num_steps):
                self._refuse_what_was_skipped()
                self._drawn = self._draw("train", self.plan, self.steps_taken)
                yield self._drawn
        finally:
            set_policy(self.model, ())
            self._stop_if(changed := self._watch.changed_buffer())
        self._stop_if(first_reason(self.group, lambda: changed))
        check_parameters(self.group, self.model)
        self._refuse_if_broken()

    def _refuse_what_was_skipped(self) -> None:
        """Raise a SettingError if a drawn batch was skipped, even an empty one: the accounting counts every draw."""
        self._refuse_if_broken()
        if self._drawn is not None:
            raise skipped()

    def _charge(self, kind: Kind, planned: PrivacyPlan | AnalysisPlan, number: int) -> None:
        """Charge release `number` of a kind, from 0. Once this returns it is charged, for every process."""
        charge_once(self._mechanism, kind, planned, number)

    def _advance(self, **changes: Any) -> None:
        self._state = dataclasses.replace(self._state, **changes)

    def _draw(self, stream: Kind, planned: PrivacyPlan | AnalysisPlan, step: int) -> Batch:
        """Draw a Poisson batch. A step that is drawn for again has another attempt number, and so other records."""
        self._began = True
        self._advance(draws=self._state.draws + 1)
        attempt = self._state.draws
        drawn, sampler = self._records.partition.drawn, self._mechanism.sampler
        ids = drawn(sampler, planned.sample_rate, stream=stream, step=step, attempt=attempt)
        return Batch(ids, step, attempt, lambda ids: self._records.together(ids, self._key_of(step)))

    @property
    def _analysis(self) -> AnalysisPlan:
        assert self.plan.analysis is not None, "make_private refuses a policy that needs scores without an analysis"
        return self.plan.analysis

    def _analyse(self) -> None:
        """Measure the impact of every layer that is not excluded, privately: one draw, one vector, one event."""
        began, number = time.perf_counter(), self.analyses_made
        self._charge("analysis", self._analysis, number)
        self._advance(analyses_made=number + 1)
        batch = self._draw("analysis", self._analysis, number)
        without_details(lambda: self._score(batch), self.choices, self._device)
        self.seconds_analysis += time.perf_counter() - began

    def _score(self, batch: Batch) -> None:
        """Update the scores with the noisy mean of the batch's clipped impacts."""
        names = [name for name in self.macs if name not in self.execution.excluded_layers]
        key = derive_key(self._mechanism.record_key, "analysis", batch.step)
        keys = analysis_keys(self._mechanism.record_key, batch.step, self._analysis.repeats)
        size = self.execution.analysis_microbatch_size
        measured = together(self.group, lambda: self._impact_sum(self._pieces(batch, size, key), names, keys))
        noise = analysis_noise(self._mechanism.noise, self.plan, batch, measured)
        noised = noising_analysis(measured, noise, self.plan)
        means = dict(noisy_means(self.group, {"impacts": measured.impacts}, noised, torch.float64))["impacts"]
        self._advance(scores=ema(self._state.scores, dict(zip(names, means.tolist(), strict=True)), self.policy.ema))

    def _impact_sum(self, pieces: Iterable[Microbatch], names: Sequence[str], keys: Sequence[int]) -> ImpactSum:
        """Return the sum of the records' clipped impacts; `keys` are the secret keys of their roundings."""
        return analysis_sum(self._objective, pieces, self.plan, names, keys, exact=self.execution.exact_sums)
