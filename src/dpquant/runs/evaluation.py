# SPDX-License-Identifier: Apache-2.0
"""Losses and metrics by task, and the model that is tested (the trained one or an average of its parameters)."""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dpquant.backends.malloc import working_memory
from dpquant.data.held import Held
from dpquant.data.task import CLASSIFICATION, UNREADABLE, Task
from dpquant.engine.batches import to_device
from dpquant.errors import DataError, DPQuantError, ModelError
from dpquant.machine import current

EVALUATION_BATCH = 500
_FALSE_POSITIVES = 0.01
_TRIED = 8  # test records on which evaluation is tried before the run


def evaluation_batch(memory: float | None, microbatch_size: int) -> int:
    """Return the batch size of evaluation: where memory is limited, at most the microbatch size.

    Args:
      memory: limit in GiB; None: there is none.
      microbatch_size: of training, which fits.
    """
    return EVALUATION_BATCH if memory is None else min(EVALUATION_BATCH, microbatch_size)


def per_example_loss(model: nn.Module, batch: tuple[Any, Tensor]) -> Tensor:
    """Return the cross entropy of each example, `(B,)`; zero, and so its gradient, where the target is UNREADABLE."""
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none", ignore_index=UNREADABLE)


def loss_of(task: Task) -> Callable[[nn.Module, tuple[Any, Tensor]], Tensor]:
    """Return the loss of a task, `(model, batch) -> (B,)`.

    Rare positives: cross entropy of the logits plus the logarithms of the declared shares (Menon et al. 2021,
    arXiv:2007.07314), so that the model need not learn how rare they are. Regression: squared error of scaled targets.
    """
    if task.kind == "regression":
        return _squared_error
    if task.prior is None:
        return per_example_loss

    def adjusted(model: nn.Module, batch: tuple[Any, Tensor]) -> Tensor:
        logits = model(batch[0])
        return F.cross_entropy(
            logits + logits.new_tensor(task.log_prior), batch[1], reduction="none", ignore_index=UNREADABLE
        )

    return adjusted


def _squared_error(model: nn.Module, batch: tuple[Any, Tensor]) -> Tensor:
    """Return the squared error of each example, `(B,)`; zero, with a gradient of zero, where the target is NaN."""
    known = batch[1].isfinite()
    return (model(batch[0])[:, 0] - batch[1].nan_to_num()).square() * known


def accuracy(model: nn.Module, split: Held, *, batch_size: int = EVALUATION_BATCH, records: int | None = None) -> float:
    """Return the share of a split's records that the model classifies correctly, in 0..1.

    An unreadable record counts as wrong.

    Args:
      model: runs in evaluation mode; afterwards every module is in its former mode.
      split: of a data set.
      batch_size: records per forward pass.
      records: evaluate the first `records` records only; None evaluates all.
    Raises:
      ModelError: the model fails on a record. The message leaves out the text of the error, which may quote it.
    Privacy: no mechanism; on private records the result is not private.
    """
    outputs = outputs_of(model, split, batch_size, records)
    right = (outputs.argmax(1) == split.targets[: len(outputs)]) & split.readable[: len(outputs)]
    return int(right.sum()) / len(outputs)


def metrics(model: nn.Module, split: Held, task: Task, *, batch_size: int = EVALUATION_BATCH) -> dict[str, float]:
    """Return the metrics of a task, by name.

    Classification: `accuracy` (an unreadable record counts as wrong) and `balanced_accuracy`, the mean over classes of
    each one's share that is classified correctly. Rare positives: also `average_precision`, `roc_auc` and
    `recall_at_1_percent_fpr`, the share of positives that score above all but a hundredth of the negatives. Regression:
    `mean_absolute_error`, in the targets' unit, of clamped targets and outputs.

    Args, errors and privacy: as for `accuracy`.
    """
    outputs = outputs_of(model, split, batch_size, None).double().nan_to_num()
    targets, readable = split.targets, split.readable
    if task.kind == "regression":
        gaps = (outputs[:, 0].clamp(-1, 1) - targets)[readable].abs()
        return {"mean_absolute_error": float(gaps.mean()) * task.unit}
    known, guesses = targets[readable], outputs[readable].argmax(1)
    shifted = outputs + torch.tensor(task.log_prior) if task.prior is not None else outputs
    right = (shifted.argmax(1) == targets) & readable
    recalls = [float((guesses[known == one] == one).double().mean()) for one in known.unique()]
    found = {"accuracy": int(right.sum()) / len(outputs), "balanced_accuracy": sum(recalls) / len(recalls)}
    if task.kind == "rare positives":
        scores = (outputs[readable, 1] - outputs[readable, 0]).numpy()
        found |= rare_metrics(scores, known.numpy() == 1)
    return found


def rare_metrics(scores: np.ndarray, positive: np.ndarray) -> dict[str, float]:
    """Return average precision, area under the ROC curve and recall at a false-positive rate of one percent.

    Args:
      scores: float64 (N,), larger for likelier positives.
      positive: bool (N,), with both values in it.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score  # slow to import

    negatives = np.sort(scores[~positive])[::-1]
    allowed = int(_FALSE_POSITIVES * len(negatives))
    return {
        "average_precision": float(average_precision_score(positive, scores)),
        "roc_auc": float(roc_auc_score(positive, scores)),
        "recall_at_1_percent_fpr": float((scores[positive] > negatives[allowed]).mean()),
    }


@torch.no_grad()
def outputs_of(model: nn.Module, split: Held, batch_size: int, records: int | None) -> Tensor:
    """Return the model's outputs for records, on the CPU; errors as for `accuracy`."""
    failed, found = "", []
    all_ids = torch.arange(len(split))[:records]
    device = next(model.parameters()).device
    try:
        with current(device), working_memory(), evaluating(model):
            for ids in all_ids.split(batch_size):
                found.append(model(to_device(split.batch(ids)[0], device)).float())
        return torch.cat(found).cpu()
    except DPQuantError:
        raise
    except Exception as error:  # a user's model may raise anything
        failed = type(error).__name__
    # raised outside of `except`, so that the original exception is not attached
    raise ModelError(
        f"Expected a model that maps test records to logits in evaluation mode; got a {failed}. Its message is "
        "withheld, because it may hold data. Accuracy is measured after every epoch. Make the model run in "
        "evaluation mode."
    )


def warn_of_guessing(accuracy_test: float | None, test: Held) -> None:
    """Warn of a model that is right no more often than the same class for every record.

    It may have diverged while its parameters stayed finite. Privacy: uses test records alone, as `accuracy`.

    Args:
      accuracy_test: of a classification.
      test: the test records.
    """
    assert accuracy_test is not None
    guessed = int(torch.bincount(test.targets[test.readable]).max()) / len(test)
    if accuracy_test <= guessed:
        warnings.warn(
            f"The model is no better than guessing: its test accuracy is {accuracy_test:.1%}, and that of always the "
            f"same class {guessed:.1%}. Training has diverged, or noise hides what it learns. Give a lower lr, or more "
            "epsilon, epochs or records.",
            stacklevel=2,
        )


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Context: the model is in evaluation mode. On exit every module returns to its own mode, as some may be frozen."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def check_evaluation(model: nn.Module, test: Held, task: Task = CLASSIFICATION) -> None:
    """Evaluate a few test records, to find errors before anything is charged.

    Raises:
      ModelError: evaluation fails.
      DataError: the test records are all of one class, where positives are rare.
    Warns: of test records that are all of one class.
    """
    outputs_of(model, test, EVALUATION_BATCH, _TRIED)
    if task.kind == "regression" or len(test.targets[test.readable].unique()) > 1:
        return
    if task.kind == "classification":
        warnings.warn(
            "All test records are of one class. The accuracy on them says nothing of the others. Give test records of "
            "all classes.",
            stacklevel=2,
        )
    else:
        raise DataError(
            "Expected test records of both classes; got those of one. Whether positives are found cannot be measured. "
            "Give a larger test set."
        )


class Tested:
    """Model that is tested and saved: the model in training, or an exponential moving average of its parameters.

    The average has less noise than the last parameters (De et al. 2022, arXiv:2204.13650).

    Attributes:
      model: the model to test, current after each `update`.
    Privacy: post-processing.
    """

    def __init__(self, model: nn.Module, past: float):
        """Start from a model in training. `past` is the decay of the average, in [0, 1); 0: no average."""
        self._average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(past)) if past else None
        self.model = model if self._average is None else self._average.module

    @property
    def parts(self) -> dict[str, AveragedModel]:
        """What a checkpoint must hold of it, by name: the average, if there is one."""
        return {} if self._average is None else {"average": self._average}

    def update(self, model: nn.Module) -> None:
        """Update the average with the model's parameters after a step."""
        if self._average is not None:
            self._average.update_parameters(model)
