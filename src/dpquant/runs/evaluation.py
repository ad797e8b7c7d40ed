# SPDX-License-Identifier: Apache-2.0
"""Training loss, test accuracy, and the model that is tested (the trained one or an average of its parameters)."""

import contextlib
import warnings
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dpquant.backends.malloc import working_memory
from dpquant.data import dataset as data
from dpquant.engine.batches import to_device
from dpquant.errors import DPQuantError, ModelError
from dpquant.machine import current

EVALUATION_BATCH = 500
_TRIED = 8  # test records on which evaluation is tried before the run


def evaluation_batch(memory: float | None, microbatch_size: int) -> int:
    """Return the batch size of evaluation: where memory is limited, at most the microbatch size.

    Args:
      memory: limit in GiB; None: there is none.
      microbatch_size: of training, which fits.
    """
    return EVALUATION_BATCH if memory is None else min(EVALUATION_BATCH, microbatch_size)


def per_example_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the cross entropy of each example, `(B,)`."""
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


@torch.no_grad()
def accuracy(
    model: nn.Module, split: data.Split, *, batch_size: int = EVALUATION_BATCH, records: int | None = None
) -> float:
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
    failed = ""
    all_ids = torch.arange(len(split))[:records]
    device = next(model.parameters()).device
    right = torch.zeros((), dtype=torch.int64, device=device)
    try:
        with current(device), working_memory(), evaluating(model):
            for ids in all_ids.split(batch_size):
                inputs, targets, readable = to_device((*split.batch(ids), split.readable[ids]), device)
                right += ((model(inputs).argmax(1) == targets) & readable).sum()
    except DPQuantError:
        raise
    except Exception as error:  # a user's model may raise anything
        failed = type(error).__name__
    if failed:  # raised outside of `except`, so that the original exception is not attached
        raise ModelError(
            f"Expected a model that maps test records to logits in evaluation mode; got a {failed}. Its message is "
            "withheld, because it may hold data. Accuracy is measured after every epoch. Make the model run in "
            "evaluation mode."
        )
    return int(right) / len(all_ids)


def warn_of_guessing(accuracy_test: float, test: data.Split) -> None:
    """Warn of a model that is right no more often than the same class for every record.

    It may have diverged while its parameters stayed finite. Privacy: uses test records alone, as `accuracy`.
    """
    guessed = int(torch.bincount(test.targets).max()) / len(test)
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


def check_evaluation(model: nn.Module, test: data.Split) -> None:
    """Evaluate a few test records, to find errors before anything is charged.

    Raises:
      ModelError: evaluation fails.
    """
    accuracy(model, test, records=_TRIED)


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
