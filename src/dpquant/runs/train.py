# SPDX-License-Identifier: Apache-2.0
"""The training run behind `dpquant train` and `dpquant resume`: from settings to a trained model, ledger and record.

A run directory holds config.toml (all settings, to repeat the run), ledger.jsonl (the events charged, each written
before its data is used), metrics.jsonl (one line per epoch), model.safetensors (the model's parameters and buffers,
written after every epoch, for `safetensors.torch.load_model`), record.json, choices.json (decisions by timing on this
machine, which `--choices` hands to another run), and checkpoints, from the newest of which a run continues. For the
operator only: timings.json and records.json (a fingerprint of the training records).

The directory is made first, with the settings in it, so that a run can be continued however early it was killed; if a
check fails, it is removed again. Saving, testing and a checkpoint of the model are tried once before anything is
charged. Nothing computed from private data is written except through a charged mechanism, with two exceptions:
`unsafe_metrics`, which marks the files that it changes, and the operator's files.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from dpquant.backends.choose import Choices
from dpquant.data import dataset as data
from dpquant.errors import BudgetError, DivergedError, SettingError, StoppedError
from dpquant.privacy.plan import PrivacyPlan, rounded_up
from dpquant.runs.devices import described, device_of
from dpquant.runs.directory import Charged, RunDirectory
from dpquant.runs.evaluation import EVALUATION_BATCH, Tested, accuracy, check_evaluation, per_example_loss
from dpquant.runs.names import LEDGER, METRICS
from dpquant.runs.objects import model_of, move_schedule, optimizer_of, schedule_of
from dpquant.runs.record import EpochRecord, RunRecord, Timings
from dpquant.runs.settings import TrainSettings, checkpoint_steps, plan_of, policy_of
from dpquant.runs.sinks import MetricsFile, Progress, Sink, Sinks
from dpquant.runs.stopping import Stopping
from dpquant.training.continuing import Stateful
from dpquant.training.epoch import Epoch
from dpquant.training.private import PrivateTraining
from dpquant.training.start import make_private


def train(
    settings: TrainSettings,
    out: Path,
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
      out: the run directory; it must be missing or empty, unless `resume` is given.
      plan: the privacy plan of these settings; None: it is computed.
      command: the command line of the run, for the record.
      sinks: notified of the run's progress, in this order and after the metrics file.
      directory: makes from `out` the writer of the run's files.
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
    began = time.perf_counter()
    files = directory(out)
    continues = resume and files.holds_a_run()
    if continues:
        files.check_continues(settings)
    else:
        files.check_place()
        files.make(settings)
    try:
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        plan = plan or plan_of(settings)
        device = device_of(settings.device)
        choices = files.choices() if continues else None
        if choices is None and settings.choices is not None:
            choices = Choices.read(Path(settings.choices))
        data_dir = Path(settings.data_dir) if settings.data_dir is not None else None
        dataset = data.load(settings.data, data_dir, image_size=settings.image_size)
        model = model_of(settings, dataset).to(device)
        optimizer = optimizer_of(settings, model)
        schedule = schedule_of(settings, optimizer, plan.steps)
        files.know_records(dataset.train)
        private = start(
            model,
            optimizer,
            dataset.train,
            loss_fn=per_example_loss,
            plan=plan,
            policy=policy_of(settings),
            format=settings.format,
            rest=settings.rest,
            backend=settings.backend,
            seed=settings.seed,
            ledger=out / LEDGER,
            microbatch_size=settings.microbatch_size,
            memory=settings.memory,
            choices=choices,
            resume=continues,
        )
        tested, history = Tested(private.model, settings.average), History()
        parts: dict[str, Stateful] = {"history": history, **tested.parts}
        found = files.newest_checkpoint() if continues else None
        if found is not None:
            private.load(found, **parts)
        move_schedule(schedule, private.steps_taken)
        history.continues(private)
        tell = Sinks([MetricsFile(out / METRICS), *sinks], private.epsilon_spent)
        check_evaluation(tested.model, dataset.test)
        with _writing(out, private):
            files.begin(tested.model, private.choices, history.epochs)
            written = time.perf_counter()
            files.checkpoint(private, parts)  # whether it can be written, and how long that takes
            every = checkpoint_steps(settings, plan, private.step_seconds, time.perf_counter() - written)
        tell.started(plan, settings)
    except BaseException:
        if not continues:
            files.take_back()
        raise
    if continues:
        began = files.shift_clocks(private, began)
    evaluate = functools.partial(accuracy, batch_size=_evaluation_batch(settings, private))

    def end_epoch(index: int, layers: Sequence[str]) -> None:
        _check_finite(private)
        history.end(
            index=index,
            epsilon=private.epsilon_spent(),
            accuracy_test=evaluate(tested.model, dataset.test),
            layers_quantized=list(layers),
            nonprivate_accuracy_train=evaluate(tested.model, dataset.train) if settings.unsafe_metrics else None,
        )
        with _writing(out, private):
            files.keep(tested.model, private.choices, Timings.of(private, began, history.ends))
        tell.epoch_ended(history.epochs[-1])

    def save() -> None:
        _check_finite(private)
        with _writing(out, private):
            files.checkpoint(private, parts)
        history.saved = private.steps_taken

    history.saved = private.steps_taken
    with contextlib.closing(private), Stopping() as stopping:
        for epoch in private.epochs():
            epsilon = history.begin(private, epoch)
            for number, batch in enumerate(epoch, 1):
                private.step(batch)
                schedule.step()
                tested.update(private.model)
                tell.stepped(Progress.of(private, epoch, epsilon, history.epochs))
                if number < len(epoch) and (stopping.asked or private.steps_taken >= history.saved + every):
                    save()
                    _stop_if_asked(stopping, private, out)
            end_epoch(epoch.index, epoch.policy)
            if stopping.asked or private.steps_taken >= history.saved + every:
                save()
            _stop_if_asked(stopping, private, out)
        if not history.epochs or history.epochs[-1].index < private.state.epoch:  # the last steps were lost
            _refuse_if_all_was_lost(private)
            end_epoch(private.state.epoch, private.policies()[-1])
        save()
    record = RunRecord.of(
        settings,
        private,
        history.epochs,
        command=command,
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        device=described(device),
    )
    with _writing(out, private):
        files.end(record, Timings.of(private, began, history.ends))
    tell.finished(record)
    return record


class History:
    """The epochs of a run so far, as part of its checkpoints.

    Attributes:
      epochs: the records of the epochs that have ended.
      ends: `time.perf_counter` at their ends, for the operator; not in checkpoints.
      saved: number of steps at the last checkpoint.
    Privacy: post-processing, but for `ends`.
    """

    def __init__(self):
        self.epochs: list[EpochRecord] = []
        self.ends: list[float] = []
        self.saved = 0
        self._scores: dict[str, float] | None = None
        self._index, self._analyses = -1, 0

    def continues(self, private: PrivateTraining) -> None:
        """Begin where the run is: an analysis that was lost belongs to no epoch."""
        self._analyses = private.analyses_made

    def begin(self, private: PrivateTraining, epoch: Epoch) -> float:
        """Begin an epoch, unless it continues, and return the epsilon spent."""
        if epoch.index != self._index:
            self._scores = dict(private.scores) if private.analyses_made > self._analyses else None
            self._index, self._analyses = epoch.index, private.analyses_made
        return private.epsilon_spent()

    def end(self, **facts: Any) -> None:
        """End an epoch with these facts."""
        self.epochs.append(EpochRecord(**facts, scores=self._scores))
        self.ends.append(time.perf_counter())

    def state_dict(self) -> dict[str, Any]:
        return {
            "epochs": [dataclasses.asdict(one) for one in self.epochs],
            "scores": self._scores,
            "index": self._index,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.epochs = [EpochRecord(**one) for one in state_dict["epochs"]]
        self._scores, self._index = state_dict["scores"], state_dict["index"]


def _stop_if_asked(stopping: Stopping, private: PrivateTraining, out: Path) -> None:
    """Raise StoppedError if a signal has asked for an end and steps are left."""
    if stopping.asked is None or private.steps_taken == private.plan.steps:
        return
    spent = Charged(steps=private.steps_taken, epsilon=private.epsilon_spent(), research=not private.secure)
    raise StoppedError(f"{spent.told(private.plan)}. Continue by: dpquant resume {out}", 128 + stopping.asked)


def _refuse_if_all_was_lost(private: PrivateTraining) -> None:
    if private.state.epoch < 0:
        raise BudgetError(
            f"Expected steps to be left for a run that continues; got none: all {private.plan.steps} are charged, and "
            "no checkpoint holds what came of them. There is no model to release. Begin a new run; epsilon adds up."
        )


def _evaluation_batch(settings: TrainSettings, private: PrivateTraining) -> int:
    """Return the batch size of evaluation: under a memory limit, at most the microbatch size."""
    return EVALUATION_BATCH if settings.memory is None else min(EVALUATION_BATCH, private.execution.microbatch_size)


@contextlib.contextmanager
def _writing(out: Path, private: PrivateTraining) -> Iterator[None]:
    """Context: turns a failure to write to the run directory into one SettingError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise SettingError(
            f"Expected out to be a place that can be written to; got out={out}: "
            f"{getattr(error, 'strerror', None) or error}. The run ends here. What was charged stays charged: epsilon "
            f"= {rounded_up(private.epsilon_spent())}. Make room, or name another place."
        ) from error


def _check_finite(private: PrivateTraining) -> None:
    """Raise DivergedError if a parameter is not finite. Privacy: post-processing, as parameters are released."""
    for name, parameter in private.model.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise DivergedError(
                f"Expected parameters to stay finite; got {name} that is not, after {private.steps_taken} steps. What "
                f"was charged stays charged: epsilon = {rounded_up(private.epsilon_spent())}. Train again with a lower "
                "lr."
            )
