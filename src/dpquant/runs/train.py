# SPDX-License-Identifier: Apache-2.0
"""The training run behind `dpquant train`: takes settings; writes a trained model, a ledger and a record.

A run directory holds config.toml (all settings, to repeat the run), ledger.jsonl (the events charged, each written
before its data is used), metrics.jsonl (one line per epoch), model.safetensors (the model's parameters and buffers,
written after every epoch, for `safetensors.torch.load_model`), record.json, choices.json (decisions by timing on this
machine, which `--choices` hands to another run) and timings.json (for the operator only).

The directory is created after all checks have passed. Then saving and testing the model are tried once, before anything
is charged. Nothing computed from private data is written except through a charged mechanism, with two exceptions:
`unsafe_metrics`, which marks the files that it changes, and wall-clock times, which are in timings.json only.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError

from dpquant.backends.choose import Choices
from dpquant.data import dataset as data
from dpquant.errors import DivergedError, SettingError
from dpquant.privacy.plan import PrivacyPlan, rounded_up
from dpquant.runs.devices import described, device_of
from dpquant.runs.directory import LEDGER, METRICS, RunDirectory
from dpquant.runs.evaluation import EVALUATION_BATCH, Tested, accuracy, check_evaluation, per_example_loss
from dpquant.runs.objects import model_of, optimizer_of, schedule_of
from dpquant.runs.record import EpochRecord, RunRecord, Timings
from dpquant.runs.settings import TrainSettings, plan_of, policy_of
from dpquant.runs.sinks import MetricsFile, Progress, Sink, Sinks
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
) -> RunRecord:
    """Train privately and write a run directory.

    Args:
      settings: of the run.
      out: the run directory; it must be missing or empty.
      plan: the privacy plan of these settings; None: it is computed.
      command: the command line of the run, for the record.
      sinks: notified of the run's progress, in this order and after the metrics file.
      directory: makes from `out` the writer of the run's files.
      start: starts the run, with the arguments of `make_private`.
    Returns: the record, as written.
    Raises:
      DPQuantError: before anything is charged: bad settings, model or data, or a model that cannot be tested or saved.
        Later: the directory cannot be written to, or a sink raises; either ends the run.
      DivergedError: a parameter is not finite. out/model.safetensors holds the model of the last finite epoch.
    Privacy: charges the plan's events to out/ledger.jsonl, each before its data is used.
    """
    began = time.perf_counter()
    files = directory(out)
    files.check_place()
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    plan = plan or plan_of(settings)
    device = device_of(settings.device)
    choices = None if settings.choices is None else Choices.read(Path(settings.choices))
    data_dir = Path(settings.data_dir) if settings.data_dir is not None else None
    dataset = data.load(settings.data, data_dir, image_size=settings.image_size)
    model = model_of(settings, dataset).to(device)
    optimizer = optimizer_of(settings, model)
    schedule = schedule_of(settings, optimizer, plan.steps)
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
    )
    tested = Tested(private.model, settings.average)
    evaluate = functools.partial(accuracy, batch_size=_evaluation_batch(settings, private))
    tell = Sinks([MetricsFile(out / METRICS), *sinks], private.epsilon_spent)
    try:
        check_evaluation(tested.model, dataset.test)
        with _writing(out, private):
            files.begin(settings, tested.model, private.choices)
        tell.started(plan, settings)
    except BaseException:
        files.take_back()
        raise
    per_epoch: list[EpochRecord] = []
    ends: list[float] = []
    analyses = 0
    for epoch in private.epochs():
        scores = dict(private.scores) if private.analyses_made > analyses else None
        analyses, epsilon = private.analyses_made, private.epsilon_spent()
        for batch in epoch:
            private.step(batch)
            schedule.step()
            tested.update(private.model)
            tell.stepped(Progress.of(private, epoch, epsilon, per_epoch))
        _check_finite(private)
        ended = EpochRecord(
            index=epoch.index,
            epsilon=private.epsilon_spent(),
            accuracy_test=evaluate(tested.model, dataset.test),
            layers_quantized=list(epoch.policy),
            nonprivate_accuracy_train=evaluate(tested.model, dataset.train) if settings.unsafe_metrics else None,
            scores=scores,
        )
        per_epoch.append(ended)
        ends.append(time.perf_counter())
        with _writing(out, private):
            files.keep(tested.model, private.choices, Timings.of(private, began, ends))
        tell.epoch_ended(ended)
    record = RunRecord.of(
        settings,
        private,
        per_epoch,
        command=command,
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        device=described(device),
    )
    with _writing(out, private):
        files.end(record, Timings.of(private, began, ends))
    tell.finished(record)
    return record


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
