# SPDX-License-Identifier: Apache-2.0
"""What all silos and the server have agreed on before the first round: network, data, and the plan of each silo.

A silo takes its plan from this file, which is its own copy. Nothing that a server sends can change it.
"""

import dataclasses

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset, TensorDataset

import dpquant


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """The numbers of a study, all of them public.

    Attributes:
      rounds: of the whole study.
      local_steps: that a silo takes in a round.
      records: of a silo, about; the true number is private.
      batch_size: expected size of a Poisson batch.
      epsilon, delta: that a silo promises each of its records for all rounds together.
      max_grad_norm: L2 norm that each record's gradient is clipped to.
      lr, momentum: of a silo's optimizer.
    """

    rounds: int = 12
    local_steps: int = 10
    records: int = 700
    batch_size: float = 70.0
    epsilon: float = 8.0
    delta: float = 1e-4
    max_grad_norm: float = 1.0
    lr: float = 0.2
    momentum: float = 0.9

    @property
    def plan(self) -> dpquant.PrivacyPlan:
        """The plan of one silo: all steps of all rounds."""
        return dpquant.PrivacyPlan(
            epsilon=self.epsilon,
            delta=self.delta,
            max_grad_norm=self.max_grad_norm,
            sample_rate=self.batch_size / self.records,
            expected_batch_size=self.batch_size,
            steps=self.rounds * self.local_steps,
        )


STUDY = Study()


def network() -> nn.Module:
    """Return the network, with the same first parameters everywhere."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.Tanh(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(32 * 4 * 4, 10),
        )


def per_example_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the cross-entropy of each example, shape (B,)."""
    images, labels = batch
    return nn.functional.cross_entropy(model(images), labels, reduction="none")


def records_of(silo: int, silos: int) -> Dataset:
    """Return the private records of a silo: a share of the handwritten digits that come with scikit-learn."""
    digits = _digits()
    mine = [index for index in range(len(digits)) if not _is_public(index) and index % silos == silo]
    return Subset(digits, mine)


def public_test_set() -> tuple[Tensor, Tensor]:
    """Return the images and labels on which the server tests. They are in no silo."""
    images, labels = _digits().tensors
    public = torch.tensor([_is_public(index) for index in range(len(labels))])
    return images[public], labels[public]


def _digits() -> TensorDataset:
    found = load_digits()
    images = torch.from_numpy(found.images).float().unsqueeze(1) / 16
    return TensorDataset(images, torch.from_numpy(found.target))


def _is_public(index: int) -> bool:
    return index % 5 == 4
