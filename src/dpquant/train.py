# SPDX-License-Identifier: Apache-2.0
"""The training run behind `dpquant train`: settings in; a trained model, a ledger and a record out.

A run directory holds config.toml (all that is needed to run it again), ledger.jsonl (what was charged, ahead of each
use of data), metrics.jsonl (one line an epoch), model.safetensors (the user's own state_dict) and record.json. It is
made only after every check has passed. Nothing computed from private data is written except through a charged
mechanism; `unsafe_metrics` is the exception, and marks what it touches.
"""

import dataclasses
import importlib.metadata
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dpquant import data, models
from dpquant.errors import ModelError, SettingError
from dpquant.impact import Score
from dpquant.isolation import check_trainable
from dpquant.layers import fix
from dpquant.ledger import Ledger
from dpquant.plan import AnalysisPlan, PrivacyPlan
from dpquant.private import Epoch, PrivateTraining, make_private
from dpquant.record import LayerRecord, RunRecord
from dpquant.schedule import (
    AllPolicy,
    DPQuantPolicy,
    NonePolicy,
    Policy,
    PrioritisePolicy,
    RotatePolicy,
    StaticPolicy,
)
from dpquant.settings import TrainSettings
from dpquant.working_memory import working_memory

_EVALUATION_BATCH = 500
_ANALYSIS_PARTS = {"loss": 1 / 2, "gradient": 1 / 16}  # of a step's batch: a gradient costs more and says more
_ANALYSIS_NORMS = {"loss": 0.25, "gradient": 1.0}


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where a run is, in released numbers only: told after every step.

    Attributes:
      epoch: from 0; step: steps taken; epsilon: spent when the epoch began, which costs an accountant's call.
      layers_quantized: of `num_layers`, in this epoch.
      examples_per_second: expected, not realised.
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


def per_example_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross entropy of each example, `(B,)`."""
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def policy_of(settings: TrainSettings) -> Policy:
    """The policy that the settings name."""
    fraction, macs = settings.fraction, settings.macs
    match settings.policy:
        case "none":
            return NonePolicy()
        case "all":
            return AllPolicy()
        case "static":
            names = None if settings.layers is None else tuple(name.strip() for name in settings.layers.split(","))
            return StaticPolicy(fraction=fraction, macs=macs, names=names, seed=settings.seed)
        case "rotate":
            return RotatePolicy(fraction=fraction, macs=macs)
        case "prioritise":
            return PrioritisePolicy(fraction=fraction, macs=macs, ema=settings.ema)
        case _:
            return DPQuantPolicy(fraction=fraction, macs=macs, beta=settings.beta, ema=settings.ema)


def plan_of(settings: TrainSettings) -> PrivacyPlan:
    """The privacy plan of a run, from public numbers: no data is read.

    Raises:
      SettingError: the number of records is neither public nor given, or a privacy setting is out of range.
      DataError: the data set is unknown.
    """
    records = settings.records or data.public_size(settings.data)
    if settings.sample_rate is None and records is None:
        raise SettingError(
            f"Expected records or sample_rate for data={settings.data}; got neither. The size of a private data set is "
            "itself private, so it is not counted. Give a public number: --records, which may be approximate, or "
            "--sample-rate."
        )
    score, max_norm = settings.analysis_score, settings.analysis_max_norm
    analysis_batch = settings.analysis_batch_size or settings.batch_size * _ANALYSIS_PARTS[score]
    rate = settings.sample_rate or settings.batch_size / (records or 1)
    if rate > 1 or rate * analysis_batch > settings.batch_size:
        raise SettingError(
            f"Expected batch_size and analysis_batch_size of at most {settings.batch_size / rate:g}, the records; got "
            f"batch_size={settings.batch_size:g}, analysis_batch_size={analysis_batch:g}. A record is drawn with "
            "probability batch size over records. Give smaller batches."
        )
    epoch_steps = max(1, round(1 / rate))
    analysis = None
    if policy_of(settings).needs_scores:
        analysis = AnalysisPlan(
            count=-(-settings.epochs // settings.analysis_every),
            sample_rate=rate * analysis_batch / settings.batch_size,
            expected_batch_size=analysis_batch,
            noise_multiplier=settings.analysis_noise_multiplier,
            max_norm=_ANALYSIS_NORMS[score] if max_norm is None else max_norm,
            repeats=settings.analysis_repeats,
            score=cast(Score, score),
        )
    return PrivacyPlan(
        epsilon=settings.epsilon,
        noise_multiplier=settings.noise_multiplier,
        delta=settings.delta,
        max_grad_norm=settings.max_grad_norm,
        sample_rate=rate,
        expected_batch_size=settings.batch_size,
        steps=settings.epochs * epoch_steps,
        analysis=analysis,
    )


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
      DPQuantError: bad settings, model or data, before anything is written; or parameters that did not stay finite.
    Privacy: charges the plan's events to out/ledger.jsonl, each before data is used for it.
    """
    began = time.perf_counter()
    _check_out(out)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    plan = plan or plan_of(settings)
    data_dir = Path(settings.data_dir) if settings.data_dir is not None else None
    dataset = data.load(settings.data, data_dir, image_size=settings.image_size)
    model = model_of(settings, dataset)
    optimizer = optimizer_of(settings, model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _lr_factor(settings.lr_schedule, plan.steps))
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
        ledger=out / "ledger.jsonl",
        microbatch_size=settings.microbatch_size,
        memory=settings.memory,
    )
    tested = _Tested(private.model, settings.average)
    (out / "config.toml").write_text(settings.to_toml())
    accuracies: list[float] = []
    with (out / "metrics.jsonl").open("w") as metrics:
        for epoch in private.epochs():
            epsilon = private.epsilon_spent()
            for batch in epoch:
                private.step(batch)
                schedule.step()
                tested.update(private.model)
                watch(_progress(private, epoch, epsilon, accuracies))
            _check_finite(private)
            accuracies.append(accuracy(tested.model, dataset.test))
            line = {
                "epoch": epoch.index,
                "epsilon": private.epsilon_spent(),
                "accuracy_test": accuracies[-1],
                "layers_quantized": list(epoch.policy),
                "seconds": round(time.perf_counter() - began, 3),
                "examples_per_second": _examples_per_second(private),
            }
            if settings.unsafe_metrics:
                line["nonprivate_accuracy_train"] = accuracy(tested.model, dataset.train)
            metrics.write(json.dumps(line) + "\n")
            metrics.flush()
    state = {name: tensor.detach().contiguous() for name, tensor in tested.model.state_dict().items()}
    save_file(state, out / "model.safetensors")
    record = _record(settings, private, accuracies, command, time.perf_counter() - began)
    record.write(out / "record.json")
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


def charged(ledger: Path, plan: PrivacyPlan) -> tuple[int, float]:
    """What a run has spent so far, read from its ledger: steps, and epsilon at the plan's delta.

    The file is the truth even of a run that was stopped half-way: a charge is there before its data is used.

    Args:
      ledger: the run's file; a missing one holds no charges.
      plan: of that run.
    Raises:
      LedgerError: the file does not agree with itself.
    Privacy: post-processing.
    """
    counts = {"train": 0, "analysis": 0}
    for charge in Ledger.read(ledger) if ledger.exists() else []:
        counts[charge.kind] += charge.count
    return counts["train"], plan.epsilon_spent(steps=counts["train"], analyses=counts["analysis"])


@torch.no_grad()
def accuracy(model: nn.Module, split: data.Split) -> float:
    """The share of a split's records that the model gets right, in evaluation mode; an unreadable one is wrong."""
    training = model.training
    model.eval()
    right = 0
    with working_memory():
        for ids in torch.arange(len(split)).split(_EVALUATION_BATCH):
            inputs, targets = split.batch(ids)
            right += int(((model(inputs).argmax(1) == targets) & split.readable[ids]).sum())
    model.train(training)
    return right / len(split)


def _check_out(out: Path) -> None:
    """The run directory is new or empty, and can be made: later, when everything else has been checked."""
    if os.path.exists(out) and (not out.is_dir() or any(out.iterdir())):
        raise SettingError(f"Expected out to be a new or empty directory; got out={out}. Name another one.")
    # os.path.exists is also False where a folder above may not be looked into, when Path.exists would raise
    nearest = next(folder for folder in (out.absolute(), *out.absolute().parents) if os.path.exists(folder))
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise SettingError(
            f"Expected out to be a place where a directory can be made; got out={out}. {nearest} cannot be written to. "
            "Name another one."
        )


def model_of(settings: TrainSettings, dataset: data.Dataset) -> nn.Module:
    """The settings' model for a data set, its parameters drawn from the settings' seed.

    Raises:
      ModelError: it is unknown, cannot be trained privately, or has not one output for each class.
      SettingError: a width that it does not have.
    """
    torch.manual_seed(settings.seed)
    model = models.build(
        settings.model, num_classes=dataset.num_classes, input_shape=dataset.input_shape, width=settings.width
    )
    if settings.fix:
        model = fix(model)
    check_trainable(model)
    _check_outputs(model, dataset)
    return model


def _check_outputs(model: nn.Module, dataset: data.Dataset) -> None:
    """One logit for each class, or a label could have none: tried on a blank image."""
    rule = f"Expected model to map images of shape {dataset.input_shape} to {dataset.num_classes} logits"
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            shape = tuple(model(torch.zeros(2, *dataset.input_shape)).shape)
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        raise ModelError(
            f"{rule}; got a {type(error).__name__}: {error}. Make it fit the data set's images."
        ) from error
    if shape != (2, dataset.num_classes):
        raise ModelError(
            f"{rule}; two images gave shape {shape}. A label without a logit has no loss. Give the last layer "
            f"{dataset.num_classes} outputs."
        )


def optimizer_of(settings: TrainSettings, model: nn.Module) -> torch.optim.Optimizer:
    """The settings' optimizer of the model's trainable parameters."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    match settings.optimizer:
        case "sgd":
            return torch.optim.SGD(
                parameters, lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
            )
        case "adam":
            return torch.optim.Adam(parameters, lr=settings.lr, weight_decay=settings.weight_decay)
        case _:
            return torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay)


def _lr_factor(schedule: str, steps: int) -> Callable[[int], float]:
    """The learning rate after so many steps, as a part of the first."""
    match schedule:
        case "linear":
            return lambda step: 1 - step / steps
        case "cosine":
            return lambda step: (1 + float(torch.cos(torch.tensor(torch.pi * step / steps)))) / 2
        case _:
            return lambda step: 1.0


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
            raise SettingError(
                f"Expected parameters to stay finite; got {name} that is not, after {private.steps_taken} steps. What "
                f"was charged stays charged: epsilon = {private.epsilon_spent():.4f}. Train again with a lower lr."
            )


def _record(
    settings: TrainSettings, private: PrivateTraining, accuracies: list[float], command: str, seconds: float
) -> RunRecord:
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
        seconds_train=private.seconds_train,
        seconds_analysis=private.seconds_analysis,
        seconds_total=seconds,
        samples_per_second=_examples_per_second(private),
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
