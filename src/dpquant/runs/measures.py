# SPDX-License-Identifier: Apache-2.0
"""Measures a model on test records for `dpquant evaluate`: by classes, as a ranking, or as errors of numbers."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dpquant.data.held import Held
from dpquant.data.task import Task
from dpquant.runs.evaluated import Bin, ClassResult, Ranking
from dpquant.runs.evaluation import EVALUATION_BATCH, outputs_of, rare_metrics

_CONFIDENCE = 0.95
_BINS = 10


def measured(model: nn.Module, split: Held, task: Task, class_names: Sequence[str]) -> dict[str, Any]:
    """Return the fields of an `Evaluation` that are computed from test records.

    Args:
      model: in evaluation mode.
      split: test records.
      task: what is told from a record.
      class_names: in the order of the outputs.
    Raises:
      ModelError: the model fails on a record.
    Privacy: no mechanism; the test records are not protected.
    """
    outputs = outputs_of(model, split, EVALUATION_BATCH, None).double().nan_to_num()
    readable = split.readable
    found: dict[str, Any] = {"records": len(split), "unreadable": int((~readable).sum())}
    targets, outputs = split.targets[readable], outputs[readable]
    if task.kind == "regression":
        return found | {"errors": _errors(outputs[:, 0].clamp(-1, 1) * task.unit, targets.double() * task.unit)}
    if task.prior is not None:
        outputs = outputs + torch.tensor(task.log_prior, dtype=torch.float64)
    return found | _accuracy(outputs, targets, len(split)) | _by_class(outputs, targets, class_names)


def count_right(model: nn.Module, split: Held, task: Task) -> int:
    """Return how many records of a classification a model tells correctly; an unreadable one is not.

    Each record passes the model alone, so that whether it counts depends on no other record, to the last bit. A record
    on which the model fails does not count, and is not reported. So one record more or less changes the count by at
    most one.

    Args:
      model: in evaluation mode.
      split: test records.
      task: what is told from a record.
    Privacy: per example; the sum has a sensitivity of one under adding or removing a record.
    """
    return sum(_is_right(model, split, task, index) for index in range(len(split)))


@torch.no_grad()
def _is_right(model: nn.Module, split: Held, task: Task, index: int) -> bool:
    try:
        inputs, targets = split.batch(torch.tensor([index]))
        outputs = model(inputs).double()
        if task.prior is not None:
            outputs = outputs + torch.tensor(task.log_prior)
        return (
            bool(split.readable[index]) and bool(outputs.isfinite().all()) and bool((outputs.argmax(1) == targets)[0])
        )
    except Exception:  # a record may not be recognised by an error, whatever the model raises
        return False


def _accuracy(outputs: Tensor, targets: Tensor, count: int) -> dict[str, float]:
    """Return the accuracy with its Wilson interval. Unreadable records count as wrong."""
    from scipy.stats import binomtest  # slow to import

    right = int((outputs.argmax(1) == targets).sum())
    interval: Any = binomtest(right, count).proportion_ci(_CONFIDENCE, method="wilson")
    return {"accuracy": right / count, "accuracy_low": float(interval.low), "accuracy_high": float(interval.high)}


def _by_class(outputs: Tensor, targets: Tensor, class_names: Sequence[str]) -> dict[str, Any]:
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    known, guesses, labels = targets.numpy(), outputs.argmax(1).numpy(), np.arange(len(class_names))
    unknown: Any = np.nan
    scores: Any = precision_recall_fscore_support(known, guesses, labels=labels, zero_division=unknown)
    precisions, recalls, _, supports = scores
    found: dict[str, Any] = {
        "classes": [
            ClassResult(name=name, support=int(support), precision=_known(precision), recall=_known(recall))
            for name, support, precision, recall in zip(class_names, supports, precisions, recalls, strict=True)
        ],
        "confusion": confusion_matrix(known, guesses, labels=labels).tolist(),
    }
    if len(class_names) == 2:
        found["ranking"] = _ranking((outputs[:, 1] - outputs[:, 0]).numpy(), known == 1)
    return found


def _ranking(scores: np.ndarray, positive: np.ndarray) -> Ranking:
    """Return how well scores, differences of logits, tell positives."""
    from sklearn.metrics import roc_auc_score

    both = bool(positive.any() and (~positive).any())
    found = rare_metrics(scores, positive) if both else {}
    shares = torch.from_numpy(scores).sigmoid().numpy()
    places = np.minimum((shares * _BINS).astype(int), _BINS - 1)
    bins = [
        Bin(
            count=int((places == place).sum()),
            predicted=float(shares[places == place].mean()),
            observed=float(positive[places == place].mean()),
        )
        for place in range(_BINS)
        if (places == place).any()
    ]
    return Ranking(
        average_precision=found.get("average_precision"),
        roc_auc=float(roc_auc_score(positive, scores)) if both else None,
        recall_at_1_percent_fpr=found.get("recall_at_1_percent_fpr"),
        calibration_error=sum(one.count * abs(one.predicted - one.observed) for one in bins) / len(scores),
        calibration=bins,
    )


def _errors(outputs: Tensor, targets: Tensor) -> dict[str, float]:
    """Return errors of numbers in their own unit, and the share of their variance that is explained."""
    from sklearn import metrics

    found, known = outputs.numpy(), targets.numpy()
    errors = {
        "mean_absolute_error": float(metrics.mean_absolute_error(known, found)),
        "median_absolute_error": float(metrics.median_absolute_error(known, found)),
        "root_mean_squared_error": float(metrics.root_mean_squared_error(known, found)),
    }
    if len(known) > 1 and known.std() > 0:
        errors["r2"] = float(metrics.r2_score(known, found))
    return errors


def _known(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
