# SPDX-License-Identifier: Apache-2.0
"""Builds model, optimizer and learning-rate schedule from the settings, and checks each before a run begins."""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from dpquant.checks.refusals import check_trainable
from dpquant.data import models
from dpquant.data.form import Form
from dpquant.data.pretrained import freeze_others, pretrained
from dpquant.data.sizes import HF_PREFIX
from dpquant.engine.batches import cut_to, leaves
from dpquant.engine.convert import fix
from dpquant.engine.randomness import seeded
from dpquant.errors import ModelError, SettingError, kind_of, quoted
from dpquant.runs.evaluation import evaluating
from dpquant.runs.named import not_for_texts
from dpquant.runs.settings import TrainSettings
from dpquant.runs.size import check_network_fits

_BLANKS = 2  # inputs on which a network is tried


def model_of(settings: TrainSettings, form: Form) -> nn.Module:
    """Build the settings' model for records of a form, and check that it can be trained on them; see `built_model`.

    Raises:
      ModelError: the model is unknown, cannot be trained privately, or does not have one output for each class.
      SettingError: the model cannot have the width.
    """
    model = built_model(settings, form)
    check_trainable(model)
    check_outputs(model, form)
    return model


def built_model(settings: TrainSettings, form: Form) -> nn.Module:
    """Build the settings' model, with parameters drawn from the settings' seed and the trained ones chosen.

    Raises:
      ModelError: it is unknown or cannot be built.
      SettingError: it cannot have the width.
    """
    build = functools.partial(
        models.build,
        settings.model,
        num_classes=form.num_classes,
        input_shape=form.input_shape,
        width=settings.width,
        categories=form.categories,
        vocabulary=form.vocabulary,
    )
    if settings.model in models.NAMES and form.vocabulary is None:  # a user's function may not run on meta
        blank = torch.empty(_BLANKS, *form.input_shape, device="meta")
        kind = "images" if blank.ndim == 4 else "rows"
        check_network_fits(build, blank, f"width={settings.width:g} and {kind} of {tuple(blank.shape[1:])}")
    torch.manual_seed(settings.seed)
    model = _pretrained(settings, form) if settings.model.startswith(HF_PREFIX) else build()
    if settings.fix:
        model = fix(model)
    if settings.train_only is not None:
        freeze_others(model, settings.train_only)
    return model


def _pretrained(settings: TrainSettings, form: Form) -> nn.Module:
    if form.vocabulary is None or settings.width != 1.0:
        raise not_for_texts(settings)
    return pretrained(settings.model, form, lora=settings.lora)


def blank_of(form: Form, count: int = _BLANKS) -> Any:
    """Return inputs on which a model is tried: zeros, or synthetic texts, since an empty text has no meaning.

    Args:
      form: of the records.
      count: of inputs, at most 2.
    """
    if form.vocabulary is None:
        return torch.zeros(count, *form.input_shape)
    if form.synthetic is None:  # tokens alone, for a network of the user's own
        return torch.zeros(count, *form.input_shape, dtype=torch.int64)
    return default_collate([inputs for inputs, _ in form.synthetic[:count]])


def check_outputs(model: nn.Module, form: Form) -> None:
    """Check that the model returns one logit per class for two blank inputs, in training and in evaluation mode.

    Texts that differ in length are of the longest and then of the shortest.

    Args:
      model: of the user.
      form: of the records.
    Raises:
      ModelError: it does not, or it raises.
    """
    blank = blank_of(form)
    _check_outputs(model, blank, form)
    if len(form.lengths) > 1:
        _check_outputs(model, cut_to(blank, form.lengths[0], longest=form.lengths[-1]), form)


def _check_outputs(model: nn.Module, blank: Any, form: Form) -> None:
    first, num_classes = next(leaf for _, leaf in leaves(blank)), form.num_classes
    what = "texts" if first is not blank else "images" if first.ndim == 4 else "inputs"
    shape = f"{len(first[0])} tokens" if first is not blank else f"shape {tuple(first.shape[1:])}"
    rule = f"Expected model to map {what} of {shape} to {num_classes} logits"
    try:
        with torch.no_grad(), seeded(0):
            outputs = [model(blank)]
            with evaluating(model):
                outputs.append(model(blank))
    except Exception as error:  # the user's code may raise anything; it has seen no data
        lengths = f", which have {form.lengths[0]} to {form.lengths[-1]} tokens" if len(form.lengths) > 1 else ""
        gets = f": forward gets a dictionary of {', '.join(blank)}" if isinstance(blank, dict) else ""
        raise ModelError(f"{rule}; got {quoted(error)}. Make it fit the data set's {what}{lengths}{gets}.") from error
    for output in outputs:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            raise ModelError(
                f"{rule}; got {_kind(output)}. The loss is computed from one tensor of floating-point numbers. Let "
                "forward return the logits alone."
            )
        if output.shape != (len(first), num_classes):
            raise ModelError(
                f"{rule}; two {what} gave shape {tuple(output.shape)}. A label without a logit has no loss. Give the "
                f"last layer {num_classes} outputs."
            )


def _kind(output: object) -> str:
    return f"a tensor of {output.dtype}" if isinstance(output, Tensor) else kind_of(output)


def optimizer_of(settings: TrainSettings, model: nn.Module) -> torch.optim.Optimizer:
    """Build the settings' optimizer for the model's trainable parameters."""
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


def schedule_of(
    settings: TrainSettings, optimizer: torch.optim.Optimizer, steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Build the settings' learning-rate schedule over the plan's steps.

    Raises:
      SettingError: the learning rate of a step is not a finite number >= 0.
    """
    factor = lr_factor(settings.lr_schedule, steps)
    check_lr_factor(factor, steps)
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def move_schedule(schedule: torch.optim.lr_scheduler.LambdaLR, steps: int) -> None:
    """Set the optimizer's learning rates to those after a number of steps. Steps that were lost count."""
    schedule.last_epoch = steps
    groups = zip(schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True)
    for group, base, factor in groups:
        group["lr"] = base * factor(steps)


def lr_factor(schedule: str, steps: int) -> Callable[[int], float]:
    """Return the function from the number of steps taken to the learning rate over the initial one."""
    match schedule:
        case "linear":
            return lambda step: 1 - step / steps
        case "cosine":
            return lambda step: (1 + math.cos(math.pi * step / steps)) / 2
        case _:
            return lambda step: 1.0


def check_lr_factor(factor: Callable[[int], float], steps: int) -> None:
    """Check the learning-rate factor of every step before the run, and of the step after the last one.

    torch computes the latter when the last step has been taken; it is not used.

    Raises:
      SettingError: a factor is not a finite number >= 0, or `factor` raises.
    """
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
