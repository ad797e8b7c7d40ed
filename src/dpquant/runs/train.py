# SPDX-License-Identifier: Apache-2.0
"""The training run behind `dpquant train`: settings in; a trained model, a ledger and a record out.

A run directory holds config.toml (all that is needed to run it again), ledger.jsonl (what was charged, ahead of each
use of data), metrics.jsonl (one line an epoch), model.safetensors (the user's own parameters and buffers, written after
every epoch, for `safetensors.torch.load_model`), record.json, choices.json (what was measured on this machine; given to
another run by `--choices`, that run decides alike), and timings.json, which is the operator's. It is made only after
every check has passed; then saving and testing are tried once, before anything is charged. Nothing computed from
private data is written except through a charged mechanism. There are two exceptions: `unsafe_metrics`, which marks what
it touches, and the times, which no other file holds.
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dpquant.backends.choose import Choices
from dpquant.data import dataset as data
from dpquant.errors import DivergedError, SettingError
from dpquant.privacy.plan import PrivacyPlan, rounded_up
from dpquant.runs.directory import (
    CONFIG,
    LEDGER,
    METRICS,
    MODEL,
    RECORD,
    TIMINGS,
    append_line,
    check_out,
    check_saving,
    save_parameters,
    take_back,
    write_choices,
)
from dpquant.runs.evaluation import EVALUATION_BATCH, accuracy, check_evaluation, per_example_loss
from dpquant.runs.objects import check_lr_factor, lr_factor, model_of, optimizer_of
from dpquant.runs.record import LayerRecord, RunRecord, Timings
from dpquant.runs.settings import TrainSettings, plan_of, policy_of
from dpquant.training.private import Epoch, PrivateTraining
from dpquant.training.start import make_private


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where a run is: told after every step. All but the speed are numbers that the run releases.

    Attributes:
      epoch: from 0; step: steps taken; epsilon: spent when the epoch began, which costs an accountant's call.
      layers_quantized: of `num_layers`, in this epoch.
      examples_per_second: for the operator's screen, not for release: the batch size is the expected one, but the time
        follows the realised sizes, which are private.
      accuracy_test: after the last finished epoch, None before.
    """

    epoch: int
    epochs: int
    step: int
    steps: int
    epsilon: float
    layers_quantized: int
    num_layers: int
    examples_per_second: float
    accuracy_test: float | None


def train(
    settings: TrainSettings,
    out: Path,
    *,
    plan: PrivacyPlan | None = None,
    command: str = "",
    watch: Callable[[Progress], None] = lambda progress: None,
) -> RunRecord:
    """Train privately and leave everything in a run directory.

    Args:
      settings: what to do.
      out: the run directory; missing or empty.
      plan: of these settings, if it was made already.
      command: what the user typed, for the record.
      watch: told the progress after every step.
    Returns: the record, as written.
    Raises:
      DPQuantError: bad settings, model or data, or a model that cannot be tested or saved, before anything is charged;
        or a directory that can no longer be written to, which ends the run.
      DivergedError: parameters that did not stay finite. The last finite epoch's model is in out/model.safetensors.
    Privacy: charges the plan's events to out/ledger.jsonl, each before data is used for it.
    """
    began = time.perf_counter()
    check_out(out)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    plan = plan or plan_of(settings)
    choices = None if settings.choices is None else Choices.read(Path(settings.choices))
    data_dir = Path(settings.data_dir) if settings.data_dir is not None else None
    dataset = data.load(settings.data, data_dir, image_size=settings.image_size)
    model = model_of(settings, dataset)
    optimizer = optimizer_of(settings, model)
    factor = lr_factor(settings.lr_schedule, plan.steps)
    check_lr_factor(factor, plan.steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    is_new = not out.exists()
    private = make_private(
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
    tested = _Tested(private.model, settings.average)
    evaluate = functools.partial(accuracy, batch_size=_evaluation_batch(settings, private))
    try:
        check_evaluation(tested.model, dataset.test)
        with _writing(out, private):
            check_saving(tested.model, out)
            (out / CONFIG).write_text(settings.to_toml())
            write_choices(private.choices, out)
    except BaseException:
        take_back(out, is_new)
        raise
    accuracies: list[float] = []
    ends: list[float] = []
    for epoch in private.epochs():
        epsilon = private.epsilon_spent()
        for batch in epoch:
            private.step(batch)
            schedule.step()
            tested.update(private.model)
            watch(_progress(private, epoch, epsilon, accuracies))
        _check_finite(private)
        accuracies.append(evaluate(tested.model, dataset.test))
        line = {
            "epoch": epoch.index,
            "epsilon": private.epsilon_spent(),
            "accuracy_test": accuracies[-1],
            "layers_quantized": list(epoch.policy),
        }
        if settings.unsafe_metrics:
            line["nonprivate_accuracy_train"] = evaluate(tested.model, dataset.train)
        ends.append(time.perf_counter() - began)
        with _writing(out, private):
            save_parameters(tested.model, out / MODEL)
            append_line(out / METRICS, json.dumps(line))
            _timings(private, began, ends).write(out / TIMINGS)
            write_choices(private.choices, out)
    record = _record(settings, private, accuracies, command)
    with _writing(out, private):
        _timings(private, began, ends).write(out / TIMINGS)
        record.write(out / RECORD)
    return record


class _Tested:
    """The model that is tested and saved: the one in training, or its average over steps, which is post-processing.

    The average forgets exponentially (De et al. 2022, arXiv:2204.13650): it sees less of the noise than the last step.
    """

    def __init__(self, model: nn.Module, past: float):
        self._average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(past)) if past else None
        self.model = model if self._average is None else self._average.module

    def update(self, model: nn.Module) -> None:
        """Take in the parameters after a step."""
        if self._average is not None:
            self._average.update_parameters(model)


def _evaluation_batch(settings: TrainSettings, private: PrivateTraining) -> int:
    """Records that evaluation takes at once: where memory is limited, no more than a backward pass does."""
    return EVALUATION_BATCH if settings.memory is None else min(EVALUATION_BATCH, private.execution.microbatch_size)


@contextlib.contextmanager
def _writing(out: Path, private: PrivateTraining) -> Iterator[None]:
    """Report a run directory that cannot be written to in one error."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise SettingError(
            f"Expected out to be a place that can be written to; got out={out}: "
            f"{getattr(error, 'strerror', None) or error}. The run ends here. What was charged stays charged: epsilon "
            f"= {rounded_up(private.epsilon_spent())}. Make room, or name another place."
        ) from error


def _progress(private: PrivateTraining, epoch: Epoch, epsilon: float, accuracies: list[float]) -> Progress:
    return Progress(
        epoch=epoch.index,
        epochs=private.plan.epochs,
        step=private.steps_taken,
        steps=private.plan.steps,
        epsilon=epsilon,
        layers_quantized=len(epoch.policy),
        num_layers=len(private.macs),
        examples_per_second=_examples_per_second(private),
        accuracy_test=accuracies[-1] if accuracies else None,
    )


def _examples_per_second(private: PrivateTraining) -> float:
    """Expected, not realised: how many records a step drew is private."""
    seconds = private.seconds_train + private.seconds_analysis
    return private.plan.expected_batch_size * private.steps_taken / seconds


def _check_finite(private: PrivateTraining) -> None:
    """Post-processing: parameters are released anyway."""
    for name, parameter in private.model.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise DivergedError(
                f"Expected parameters to stay finite; got {name} that is not, after {private.steps_taken} steps. What "
                f"was charged stays charged: epsilon = {rounded_up(private.epsilon_spent())}. Train again with a lower "
                "lr."
            )


def _timings(private: PrivateTraining, began: float, ends: list[float]) -> Timings:
    return Timings(
        seconds_total=time.perf_counter() - began,
        seconds_train=private.seconds_train,
        seconds_analysis=private.seconds_analysis,
        seconds_at_epoch_ends=ends,
        examples_per_second=_examples_per_second(private),
    )


def _record(settings: TrainSettings, private: PrivateTraining, accuracies: list[float], command: str) -> RunRecord:
    plan, policies, macs = private.plan, private.policies(), private.macs
    statement = private.statement()
    if settings.unsafe_metrics:
        statement = "NOT COVERED: training accuracy was measured on private data and written down.\n" + statement
    return RunRecord(
        dpquant=importlib.metadata.version("dpquant"),
        torch=torch.__version__,
        command=command,
        model=settings.model,
        dataset=settings.data,
        policy=settings.policy,
        format=settings.format,
        rest=settings.rest,
        backend=private.backend,
        execution=str(private.execution),
        optimizer=settings.optimizer,
        lr=settings.lr,
        average=settings.average,
        seed=settings.seed,
        threads=torch.get_num_threads(),
        epochs=len(policies),
        steps=private.steps_taken,
        accuracy_test=accuracies[-1],
        accuracy_per_epoch=accuracies,
        epsilon=private.epsilon_spent(),
        delta=plan.delta,
        epsilon_analysis_share=plan.analysis_share(),
        noise_multiplier=plan.noise_multiplier,
        sample_rate=plan.sample_rate,
        expected_batch_size=plan.expected_batch_size,
        max_grad_norm=plan.max_grad_norm,
        quantized_fraction_layers=_mean([len(names) / max(len(macs), 1) for names in policies]),
        quantized_fraction_macs=_share_of_macs(private, most_bits=8),
        four_bit_fraction_macs=_share_of_macs(private, most_bits=4),
        layers=[
            LayerRecord(
                name=name,
                macs=macs[name],
                times_quantized=sum(name in names for names in policies),
                last_score=private.scores.get(name),
                gain=private.execution.gains.get(name),
            )
            for name in macs
        ],
        statement=statement,
        unsafe_metrics=settings.unsafe_metrics,
    )


def _share_of_macs(private: PrivateTraining, most_bits: int) -> float:
    """The part of all products' multiply-accumulates with operands of at most so many bits: the mean over epochs."""
    chosen, rest = private.execution.chosen.share(most_bits), private.execution.rest.share(most_bits)
    total = sum(private.macs.values()) or 1.0
    shares = [sum(private.macs[name] for name in names) / total for names in private.policies()]
    return _mean([share * chosen + (1 - share) * rest for share in shares])


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
