# SPDX-License-Identifier: Apache-2.0
"""The training run behind `dpquant train` and `dpquant resume`: from settings to a trained model, ledger and record.

A run directory holds config.toml (all settings, to repeat the run), ledger.jsonl (the events charged, each written
before its data is used), metrics.jsonl (one line per epoch), model.safetensors (the model's parameters and buffers,
written after every epoch), model.json (what is needed to use it), record.json, choices.json (decisions by timing, which
`--choices` hands to another run), and checkpoints, from the newest of which a run continues. For the operator only:
timings.json, progress.json (how far the run is) and records.json (a fingerprint of the training records).

The directory is made first (`place.py`), with the settings in it, so that a run can be continued however early it was
killed; if a check fails, it is removed again. Saving, testing and a checkpoint of the model are tried once before
anything is charged. Nothing computed from private data is written except through a charged mechanism, but for
`unsafe_metrics`, which marks the files that it changes, and for what is the operator's.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError

from dpquant.backends.choose import Choices
from dpquant.data import dataset as data
from dpquant.data.held import Held
from dpquant.errors import BudgetError, DivergedError, SettingError, StoppedError
from dpquant.privacy.ledger import Ledger
from dpquant.privacy.plan import PrivacyPlan, rounded_up
from dpquant.runs.augmentation import augmented
from dpquant.runs.describing import description_of
from dpquant.runs.devices import described, device_of, use_threads
from dpquant.runs.directory import Charged, RunDirectory
from dpquant.runs.evaluation import Tested, check_evaluation, evaluation_batch, loss_of, metrics, warn_of_guessing
from dpquant.runs.heartbeat import Heartbeat
from dpquant.runs.history import History
from dpquant.runs.names import LEDGER, METRICS, MODEL, PROGRESS
from dpquant.runs.objects import model_of, move_schedule, optimizer_of, schedule_of
from dpquant.runs.parts import check_parts
from dpquant.runs.place import Place
from dpquant.runs.provenance import GroupRecord, LedgerRecord, Provenance, utc_now
from dpquant.runs.record import RunRecord
from dpquant.runs.settings import TrainSettings, checkpoint_steps, plan_of, policy_of
from dpquant.runs.shared import first_says, group_record, shared
from dpquant.runs.sinks import MetricsFile, Progress, Sink, Sinks
from dpquant.runs.size import check_data_fits
from dpquant.runs.sources import dataset_of
from dpquant.runs.stopping import Stopping
from dpquant.runs.timings import Timings
from dpquant.runs.trackers.tracking import Tracking
from dpquant.training.agreement import together
from dpquant.training.continuing import Stateful
from dpquant.training.distributed import Group, group_here
from dpquant.training.epoch import Batch, Epoch
from dpquant.training.partition import RANGE
from dpquant.training.private import PrivateTraining
from dpquant.training.roll_call import departing
from dpquant.training.start import make_private

_ECHO = 5.0  # seconds in which torchrun passes on a signal that a process may have got already
_LARGEST_PARAMETER = 1e12  # a few layers of such weights overflow float32


def train(
    settings: TrainSettings,
    out: Path | Place,
    *,
    plan: PrivacyPlan | None = None,
    command: str = "",
    sinks: Sequence[Sink] = (),
    directory: Callable[[Path], RunDirectory] = RunDirectory,
    start: Callable[..., PrivateTraining] = make_private,
    resume: bool = False,
) -> RunRecord:
    """Train privately and write a run directory.

    Args:
      settings: of the run.
      out: the run directory; it must be missing or empty, unless `resume` is given. A `Place` may be taken already.
      plan: the privacy plan of these settings; None: it is computed.
      command: the command line of the run, for the record.
      sinks: notified of the run's progress, in this order, after the metrics file and before trackers.
      directory: makes from the path the writer of the run's files.
      start: starts the run, with the arguments of `make_private`.
      resume: continue the run in the directory, if there is one. Its settings must be these.
    Returns: the record, as written.
    Raises:
      DPQuantError: before anything is charged: bad settings, model or data, or a model that cannot be tested or saved.
        Later: the directory cannot be written to, or a sink raises; either ends the run.
      DivergedError: a parameter is not finite. out/model.safetensors holds the model of the last finite epoch.
      StoppedError: SIGTERM or SIGINT asked for an end; there is a checkpoint of the last step.
    Privacy: charges the plan's events to out/ledger.jsonl, each before its data is used. A run that continues charges
      no more than what is left of the plan.
    """
    group = group_here()
    place, files = shared(out, directory, group)
    heartbeat, tracking = Heartbeat(place.path / PROGRESS), Tracking(settings, place.path)
    told = [MetricsFile(place.path / METRICS), heartbeat, *sinks, tracking] if group.rank == 0 else []
    with (
        departing(),
        place.taken(settings, resume=resume) as continues,
        contextlib.closing(heartbeat),
        contextlib.closing(tracking),
    ):
        begin = functools.partial(start, resume=continues)
        run = _Run.begun(settings, files, plan, told, begin, group)
        with contextlib.closing(run.private), Stopping(_ECHO if group.size > 1 else 0.0) as stopping:
            for epoch in run.private.epochs():
                epsilon = run.history.begin(run.private, epoch)
                for number, batch in enumerate(epoch, 1):
                    run.step(batch, epoch, epsilon)
                    if number < len(epoch):
                        run.save_if_due(stopping)
                run.end_epoch(epoch.index, epoch.policy)
                run.save_if_due(stopping)
            run.end_what_was_lost()
            run.save()
        return run.end(command)


@dataclasses.dataclass
class _Run:
    """A training run with its files.

    Attributes:
      settings: of the run.
      device: where the model is.
      files: of the run directory.
      private: the training itself.
      dataset: of the run.
      schedule: of the learning rate.
      tested: the model that is tested and saved.
      history: the epochs so far.
      tell: notifies the sinks.
      began: `time.perf_counter` when the run would have begun in one process.
      every: number of steps between checkpoints.
      saved: number of steps at the last checkpoint.
    """

    settings: TrainSettings
    device: torch.device
    files: RunDirectory
    private: PrivateTraining
    dataset: data.Dataset
    schedule: torch.optim.lr_scheduler.LambdaLR
    tested: Tested
    history: "History"
    tell: Sinks
    began: float
    every: int = 0
    saved: int = 0

    @classmethod
    def begun(
        cls,
        settings: TrainSettings,
        files: RunDirectory,
        plan: PrivacyPlan | None,
        sinks: Sequence[Sink],
        start: Callable[..., PrivateTraining],
        group: Group,
    ) -> Self:
        """Return the run before its next step: everything that can fail is tried, and nothing is charged."""
        began, started = time.perf_counter(), utc_now()
        tell = Sinks(sinks, lambda: 0.0)
        if settings.track is not None:
            tell.preparing("starting the trackers")
        plan = plan or plan_of(settings)

        def made() -> tuple[torch.device, data.Dataset, torch.nn.Module]:
            use_threads(settings.threads)
            device = device_of(settings.device)
            tell.preparing("loading the data")
            check_data_fits(settings)
            dataset = dataset_of(settings)
            return device, dataset, model_of(settings, dataset).to(device)

        device, dataset, model = together(group, made)
        choices = files.choices()
        if choices is None and settings.choices is not None:
            choices = Choices.read(Path(settings.choices))
        optimizer = optimizer_of(settings, model)
        schedule = schedule_of(settings, optimizer, plan.steps)
        check_parts(group, settings, dataset)
        files.know_records(dataset.train, apart=settings.partition == RANGE)
        private = start(
            model,
            optimizer,
            dataset.train,
            loss_fn=augmented(loss_of(dataset.task), settings, dataset),
            example=dataset.synthetic,
            plan=plan,
            policy=policy_of(settings),
            format=settings.format,
            rest=settings.rest,
            backend=settings.backend,
            seed=settings.seed,
            ledger=files.path / LEDGER,
            microbatch_size=settings.microbatch_size,
            memory=settings.memory,
            workers=settings.workers or 1,
            choices=choices,
            exact_sums=settings.exact_sums,
            shard_optimizer=settings.shard_optimizer,
            partition=settings.partition,
            watch=tell.preparing,
        )
        run = cls(
            settings=settings,
            device=device,
            files=files,
            private=private,
            dataset=dataset,
            schedule=schedule,
            tested=Tested(private.model, settings.average),
            history=History(started),
            tell=dataclasses.replace(tell, epsilon_spent=private.epsilon_spent),
            began=began,
        )
        tell.preparing("trying everything once")
        run._continue()
        together(group, lambda: check_evaluation(run.tested.model, dataset.test, dataset.task))
        run._try_writing()
        run.tell.started(plan, settings)
        return run

    @property
    def _parts(self) -> dict[str, Stateful]:
        """Parts of a checkpoint, beside those of the training itself."""
        return {"history": self.history, **self.tested.parts}

    def _continue(self) -> None:
        """Take up the newest checkpoint and the clocks, if there are any."""
        private, history = self.private, self.history
        found = self.files.newest_checkpoint()
        if found is not None:
            together(private.group, lambda: private.load(found, **self._parts))
        move_schedule(self.schedule, private.steps_taken)
        history.continues(private)
        past = self.files.past_timings(len(history.epochs))
        if past is not None:
            private.seconds_train += past.seconds_train
            private.seconds_analysis += past.seconds_analysis
            self.began -= past.seconds_total
            history.ends = [self.began + seconds for seconds in past.seconds_at_epoch_ends]

    def _try_writing(self) -> None:
        """Write everything once: whether it can be written, and how long a checkpoint takes."""
        description = description_of(self.settings, self.dataset, self.private.model)
        with self._writing():
            self.files.describe(description)
            if self.dataset.tokenizer is not None:
                self.files.keep_tokenizer(self.dataset.tokenizer)
            self.files.begin(self.tested.model, self.private.choices, self.history.epochs)
            written = time.perf_counter()
            self.files.checkpoint(self.private, self._parts)
        seconds = first_says(self.private.group, lambda: time.perf_counter() - written)
        self.every = checkpoint_steps(self.settings, self.private.plan, self.private.step_seconds, seconds)
        self.saved = self.private.steps_taken

    def step(self, batch: Batch, epoch: Epoch, epsilon: float) -> None:
        """Take one step and tell of it."""
        self.private.step(batch)
        self.schedule.step()
        self.tested.update(self.private.model)
        self.tell.stepped(Progress.of(self.private, epoch, epsilon, self.history.epochs))

    def end_epoch(self, index: int, layers: Sequence[str]) -> None:
        """Test and save the model, and tell of the epoch."""
        private = self.private
        self._check_finite()
        unsafe = self.settings.unsafe_metrics
        found = self._metrics(self.dataset.test)
        self.history.end(
            index=index,
            epsilon=private.epsilon_spent(),
            accuracy_test=found.get("accuracy"),
            metrics_test=found,
            layers_quantized=list(layers),
            nonprivate_accuracy_train=self._metrics(self.dataset.train).get("accuracy") if unsafe else None,
        )
        with self._writing():
            self.files.keep(self.tested.model, private.choices, self._timings())
        self.tell.epoch_ended(self.history.epochs[-1])

    def save_if_due(self, stopping: Stopping) -> None:
        """Write a checkpoint if it is time or if the run has to stop; then stop, if steps are left.

        Raises:
          StoppedError: a signal has asked for an end.
        """
        private, asked = self.private, stopping.asked_anywhere(self.private.group)
        if asked or private.steps_taken >= self.saved + self.every:
            self.save()
        if not asked or private.steps_taken == private.plan.steps:
            return
        spent = Charged(steps=private.steps_taken, epsilon=private.epsilon_spent(), research=not private.secure)
        raise StoppedError(f"{spent.told(private.plan)}. Continue by: dpquant resume {self.files.path}", 128 + asked)

    def save(self) -> None:
        """Write a checkpoint."""
        self._check_finite()
        with self._writing():
            self.files.checkpoint(self.private, self._parts)
        self.saved = self.private.steps_taken

    def end_what_was_lost(self) -> None:
        """End the last epoch where a run that continues has lost its last steps.

        Raises:
          BudgetError: all steps were lost, so that there is no model.
        """
        private, epochs = self.private, self.history.epochs
        if epochs and epochs[-1].index >= private.state.epoch:
            return
        if private.state.epoch < 0:
            raise BudgetError(
                f"Expected steps to be left for a run that continues; got none: all {private.plan.steps} are charged, "
                "and no checkpoint holds what came of them. There is no model to release. Begin a new run; epsilon "
                "adds up."
            )
        self.end_epoch(private.state.epoch, private.policies()[-1])

    def end(self, command: str) -> RunRecord:
        """Write and return the record, which is that of process 0."""
        with self._writing():
            model_sha256 = self.files.model_sha256()
        group = group_record(self.private.group, self.device)
        text = first_says(self.private.group, lambda: self._record(command, model_sha256, group).to_json())
        record = RunRecord.from_json(text)
        with self._writing():
            self.files.end(record, self._timings())
        self.tell.finished(record)
        if self.dataset.task.kind == "classification":  # where positives are rare, always no is right nearly always
            warn_of_guessing(record.accuracy_test, self.dataset.test)
        return record

    def _record(self, command: str, model_sha256: str, group: GroupRecord) -> RunRecord:
        contents = Ledger.verify(self.files.path / LEDGER)
        return RunRecord.of(
            self.settings,
            self.private,
            self.history.epochs,
            command=command,
            torch=torch.__version__,
            threads=torch.get_num_threads(),
            device=described(self.device),
            source={**self.dataset.facts, **({"partition": RANGE} if self.settings.partition == RANGE else {})},
            provenance=Provenance.here(contents.run, self.history.started),
            ledger=LedgerRecord.of(contents),
            model_sha256=model_sha256,
            group=group,
        )

    def _metrics(self, split: Held) -> dict[str, float]:
        size = evaluation_batch(self.settings.memory, self.private.execution.microbatch_size)
        model, task = self.tested.model, self.dataset.task
        return first_says(self.private.group, lambda: metrics(model, split, task, batch_size=size))

    def _timings(self) -> Timings:
        return Timings.of(self.private, self.began, self.history.ends)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Context: turns a failure to write to the run directory into one SettingError."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise SettingError(
                f"Expected out to be a place that can be written to; got out={self.files.path}: "
                f"{getattr(error, 'strerror', None) or error}. The run ends here. What was charged stays charged: "
                f"epsilon = {rounded_up(self.private.epsilon_spent())}. Make room, or name another place."
            ) from error

    def _check_finite(self) -> None:
        """Raise DivergedError if a parameter is not finite, or so large that no output is; note why in the directory.

        Privacy: post-processing, as parameters are released.
        """
        private, epochs = self.private, self.history.epochs
        for name, parameter in private.model.named_parameters():
            if bool((parameter.abs() <= _LARGEST_PARAMETER).all()):
                continue
            kept = "No epoch had ended"
            if epochs:
                kept = f"{self.files.path / MODEL} is the model of epoch {epochs[-1].index + 1}, which is finite"
            reason = (
                f"Expected parameters to stay finite and at most {_LARGEST_PARAMETER:g}; got {name} that did not, "
                f"after {private.steps_taken} steps. What was charged stays charged: epsilon = "
                f"{rounded_up(private.epsilon_spent())}. {kept}. Train again with a lower lr, in another directory; "
                "epsilon adds up."
            )
            with self._writing():
                self.files.note_divergence(reason)
            raise DivergedError(reason)
