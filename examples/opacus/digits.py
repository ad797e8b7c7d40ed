# SPDX-License-Identifier: Apache-2.0
"""What both scripts share: handwritten digits, a network with BatchNorm as one finds them, and its accuracy."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

_digits = load_digits()
_images = torch.tensor(_digits.images, dtype=torch.float32)[:, None] / 8 - 1
_labels = torch.tensor(_digits.target)
_is_test = torch.arange(len(_labels)) % 5 == 0
train_set = TensorDataset(_images[~_is_test], _labels[~_is_test])  # 1,437 records
test_set = TensorDataset(_images[_is_test], _labels[_is_test])


def network() -> nn.Module:
    """Return a small convolutional network."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Flatten(), nn.Linear(512, 10),
    )  # fmt: skip


def accuracy(model: nn.Module) -> float:
    """Return the share of test images that the model classifies rightly."""
    model.eval()
    with torch.no_grad():
        inputs, labels = test_set.tensors
        return float((model(inputs).argmax(1) == labels).float().mean())
