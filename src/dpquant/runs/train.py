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
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dpquant.backends.choose import Choices
from dpquant.backends.malloc import working_memory
from dpquant.checks.refusals import check_trainable
from dpquant.data import dataset as data
from dpquant.data import models
from dpquant.engine.convert import fix
from dpquant.engine.randomness import seeded
from dpquant.errors import DivergedError, DPQuantError, ModelError, SettingError
from dpquant.privacy import accounting
from dpquant.privacy.ledger import Ledger
from dpquant.privacy.plan import PrivacyPlan, rounded_up
from dpquant.runs.record import LayerRecord, RunRecord, Timings, replacing
from dpquant.runs.settings import TrainSettings, plan_of, policy_of
from dpquant.training.private import Epoch, PrivateTraining
from dpquant.training.start import make_private

_CONFIG, _LEDGER, _METRICS = "config.toml", "ledger.jsonl", "metrics.jsonl"
_MODEL, _RECORD, _TIMINGS, _CHOICES = "model.safetensors", "record.json", "timings.json", "choices.json"
_EVALUATION_BATCH = 500
_TRIED = 8  # test records on which evaluation is tried before the run


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


def per_example_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross entropy of each example, `(B,)`."""
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


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
    _check_out(out)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    plan = plan or plan_of(settings)
    data_dir = Path(settings.data_dir) if settings.data_dir is not None else None
    dataset = data.load(settings.data, data_dir, image_size=settings.image_size)
    model = model_of(settings, dataset)
    optimizer = optimizer_of(settings, model)
    factor = _lr_factor(settings.lr_schedule, plan.steps)
    _check_lr_factor(factor, plan.steps)
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
        ledger=out / _LEDGER,
        microbatch_size=settings.microbatch_size,
        memory=settings.memory,
        choices=None if settings.choices is None else Choices.read(Path(settings.choices)),
    )
    tested = _Tested(private.model, settings.average)
    evaluate = functools.partial(accuracy, batch_size=_evaluation_batch(settings, private))
    try:
        _check_evaluation(tested.model, dataset.test)
        with _writing(out, private):
            _check_saving(tested.model, out)
            (out / _CONFIG).write_text(settings.to_toml())
            _write_choices(private, out)
    except BaseException:
        _take_back(out, is_new)
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
            _save(tested.model, out / _MODEL)
            _append_line(out / _METRICS, json.dumps(line))
            _timings(private, began, ends).write(out / _TIMINGS)
            _write_choices(private, out)
    record = _record(settings, private, accuracies, command)
    with _writing(out, private):
        _timings(private, began, ends).write(out / _TIMINGS)
        record.write(out / _RECORD)
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


class Charged(NamedTuple):
    """What a run has spent.

    Attributes:
      steps: training steps that were charged.
      epsilon: of everything that was charged, at the plan's delta.
      research: some of it came from a seed, so that epsilon is no guarantee.
    """

    steps: int
    epsilon: float
    research: bool


def charged(ledger: Path, plan: PrivacyPlan) -> Charged:
    """What a run has spent so far, by its ledger's own lines.

    The file is the truth even of a run that was stopped half-way: a charge is there before its data is used.

    Args:
      ledger: the run's file; a missing one holds no charges.
      plan: of that run, for delta.
    Raises:
      LedgerError: the file does not agree with itself.
    Privacy: post-processing.
    """
    events = Ledger.read(ledger) if ledger.exists() else []
    return Charged(
        steps=sum(event.count for event in events if event.kind == "train"),
        epsilon=accounting.epsilon(events, plan.delta),
        research=any(event.research for event in events),
    )


@torch.no_grad()
def accuracy(
    model: nn.Module, split: data.Split, *, batch_size: int = _EVALUATION_BATCH, records: int | None = None
) -> float:
    """The share of a split's records that the model gets right, in evaluation mode; an unreadable one is wrong.

    Args:
      model: every module's mode is given back as it was.
      split: of a data set.
      batch_size: records a forward pass.
      records: count only so many, the first; None counts all.
    """
    all_ids, right = torch.arange(len(split))[:records], 0
    with working_memory(), _evaluating(model):
        for ids in all_ids.split(batch_size):
            inputs, targets = split.batch(ids)
            right += int(((model(inputs).argmax(1) == targets) & split.readable[ids]).sum())
    return right / len(all_ids)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside. Afterwards every module is in its own mode again: a user may have frozen some of them."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _evaluation_batch(settings: TrainSettings, private: PrivateTraining) -> int:
    """Records that evaluation takes at once: where memory is limited, no more than a backward pass does."""
    return _EVALUATION_BATCH if settings.memory is None else min(_EVALUATION_BATCH, private.execution.microbatch_size)


def _check_evaluation(model: nn.Module, test: data.Split) -> None:
    """Evaluate a few test records before anything is charged. What the error says may quote one, so it is left out."""
    try:
        accuracy(model, test, records=_TRIED)
    except DPQuantError:
        raise
    except Exception as error:  # a user's model raises what it likes
        raise ModelError(
            f"Expected a model that maps test records to logits in evaluation mode; got a {type(error).__name__}. "
            "Accuracy is measured after every epoch. Make the model run in evaluation mode."
        ) from error


def _check_saving(model: nn.Module, out: Path) -> None:
    """Save the model to where it will be kept and load it back, before anything is charged."""
    draft = out / f"{_MODEL}.trial"
    try:
        before = {name: _bytes(tensor) for name, tensor in model.state_dict().items()}
        save_model(model, str(draft))
        load_model(model, draft)
        changed = [name for name, t in model.state_dict().items() if not torch.equal(before[name], _bytes(t))]
    except (OSError, SafetensorError):
        raise
    except Exception as error:  # safetensors and a user's own state_dict raise what they like
        raise ModelError(
            f"Expected a model that safetensors can save and load back; got a {type(error).__name__}: {error}. A model "
            "that cannot be saved would be lost after training. Let its state_dict hold whole tensors only."
        ) from error
    finally:
        draft.unlink(missing_ok=True)
    if changed:
        raise ModelError(
            f"Expected a model that comes back from its file as it was saved; got another {changed[0]}. It would not "
            "be the model that was trained. Let its state_dict hold its parameters and buffers as they are."
        )


def _bytes(tensor: Tensor) -> Tensor:
    """A copy of a tensor's bytes: two tensors of NaN differ as numbers."""
    return tensor.detach().cpu().reshape(-1).clone().view(torch.uint8)


def _save(model: nn.Module, path: Path) -> None:
    """Save the model, whole or not at all; of parameters that are one tensor, one is in the file."""
    with replacing(path) as draft:
        save_model(model, str(draft))


def _write_choices(private: PrivateTraining, out: Path) -> None:
    with replacing(out / _CHOICES) as draft:
        draft.write_text(private.choices.to_json())


def _append_line(path: Path, line: str) -> None:
    """Append a line that is on disk when this returns."""
    with path.open("a") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


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


def _take_back(out: Path, is_new: bool) -> None:
    """Remove what a run wrote that was refused before its first charge."""
    for name in (_CONFIG, _LEDGER, _CHOICES):
        (out / name).unlink(missing_ok=True)
    if is_new:
        with contextlib.suppress(OSError):  # what else is there stays
            out.rmdir()


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
    """One logit for each class, or a label could have none: tried on blank images, in training and in evaluation."""
    rule = f"Expected model to map images of shape {dataset.input_shape} to {dataset.num_classes} logits"
    blank = torch.zeros(2, *dataset.input_shape)
    try:
        with torch.no_grad(), seeded(0):
            shapes = [tuple(model(blank).shape)]
            with _evaluating(model):
                shapes.append(tuple(model(blank).shape))
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        raise ModelError(
            f"{rule}; got a {type(error).__name__}: {error}. Make it fit the data set's images."
        ) from error
    for shape in shapes:
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
            return lambda step: (1 + math.cos(math.pi * step / steps)) / 2
        case _:
            return lambda step: 1.0


def _check_lr_factor(factor: Callable[[int], float], steps: int) -> None:
    """Compute every step's learning rate before the run. The one after the last step is computed too, and not used."""
    for step in range(steps + 1):
        try:
            value = float(factor(step))
        except Exception as error:
            raise SettingError(
                f"Expected lr_schedule to give a number for every step; got a {type(error).__name__} at step {step}. "
                "The run would stop there. Choose another schedule."
            ) from error
        if not 0 <= value < math.inf:
            raise SettingError(
                f"Expected lr_schedule to give numbers >= 0 and finite; got {value} at step {step}. The run would be "
                "lost there. Choose another schedule."
            )


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
