# SPDX-License-Identifier: Apache-2.0
"""How good a model is: the loss that it is trained by, which model is tested, and its accuracy on a test set."""

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dpquant.backends.malloc import working_memory
from dpquant.data import dataset as data
from dpquant.errors import DPQuantError, ModelError

EVALUATION_BATCH = 500
_TRIED = 8  # test records on which evaluation is tried before the run


def per_example_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the cross entropy of each example, `(B,)`."""
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


@torch.no_grad()
def accuracy(
    model: nn.Module, split: data.Split, *, batch_size: int = EVALUATION_BATCH, records: int | None = None
) -> float:
    """Return the share of a split's records that the model gets right in evaluation mode; unreadable ones are wrong.

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
    """Evaluate within the block. Afterwards every module has its own mode back: a user may have frozen some of them."""
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


class Tested:
    """The model that is tested and saved: the one in training, or its average over steps, which is post-processing.

    The average forgets exponentially (De et al. 2022, arXiv:2204.13650): it sees less of the noise than the last step.

    Attributes:
      model: as the steps so far have made it.
    """

    def __init__(self, model: nn.Module, past: float):
        """Begin with a model in training; `past` is the weight of the past in the average, 0: no average."""
        self._average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(past)) if past else None
        self.model = model if self._average is None else self._average.module

    def update(self, model: nn.Module) -> None:
        """Take in the parameters after a step."""
        if self._average is not None:
            self._average.update_parameters(model)
