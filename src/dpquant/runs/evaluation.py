# SPDX-License-Identifier: Apache-2.0
"""How good a model is: the loss that it is trained by, and its accuracy on a test set."""

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpquant.backends.malloc import working_memory
from dpquant.data import dataset as data
from dpquant.errors import DPQuantError, ModelError

EVALUATION_BATCH = 500
_TRIED = 8  # test records on which evaluation is tried before the run


def per_example_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross entropy of each example, `(B,)`."""
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


@torch.no_grad()
def accuracy(
    model: nn.Module, split: data.Split, *, batch_size: int = EVALUATION_BATCH, records: int | None = None
) -> float:
    """The share of a split's records that the model gets right, in evaluation mode; an unreadable one is wrong.

    Args:
      model: every module's mode is given back as it was.
      split: of a data set.
      batch_size: records a forward pass.
      records: count only so many, the first; None counts all.
    """
    all_ids, right = torch.arange(len(split))[:records], 0
    with working_memory(), evaluating(model):
        for ids in all_ids.split(batch_size):
            inputs, targets = split.batch(ids)
            right += int(((model(inputs).argmax(1) == targets) & split.readable[ids]).sum())
    return right / len(all_ids)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside. Afterwards every module is in its own mode again: a user may have frozen some of them."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def check_evaluation(model: nn.Module, test: data.Split) -> None:
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
