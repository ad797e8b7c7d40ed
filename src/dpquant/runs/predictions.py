# SPDX-License-Identifier: Apache-2.0
"""What a model's outputs say: classes with probabilities, or a number in its own unit."""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from dpquant.data.task import Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
    """What is predicted for one input.

    Attributes:
      labels: classes, the likeliest first; () for a regression.
      probabilities: of these classes, by the model, in 0..1.
      positive: probability of the rare class, by which records are ranked; None where no class is rare.
      value: of a regression; None for classes.
    """

    labels: tuple[str, ...] = ()
    probabilities: tuple[float, ...] = ()
    positive: float | None = None
    value: float | None = None


def predictions(outputs: Tensor, task: Task, class_names: Sequence[str], top: int) -> list[Prediction | None]:
    """Return what outputs say.

    Where positives are rare, the declared shares of the classes are taken into account, as in training.

    Args:
      outputs: of the model, float32 (B, outputs).
      task: what is told from an input.
      class_names: in the order of the outputs.
      top: number of classes to name.
    Returns: a prediction for each input; None where an output is not finite.
    """
    known = outputs.isfinite().all(1).tolist()
    if task.kind == "regression":
        values = [task.low + (value + 1) * task.unit for value in outputs[:, 0].double().clamp(-1, 1).tolist()]
        return [Prediction(value=value) if finite else None for value, finite in zip(values, known, strict=True)]
    shares = (outputs.double() + torch.tensor(task.log_prior) if task.prior is not None else outputs.double()).softmax(
        1
    )
    best = shares.nan_to_num().topk(min(top, shares.shape[1]), 1)
    positives = shares[:, -1].tolist() if task.prior is not None else [None] * len(known)
    return [
        Prediction(
            labels=tuple(class_names[int(one)] for one in places), probabilities=tuple(values), positive=positive
        )
        if finite
        else None
        for values, places, positive, finite in zip(
            best.values.tolist(), best.indices.tolist(), positives, known, strict=True
        )
    ]
