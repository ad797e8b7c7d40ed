# SPDX-License-Identifier: Apache-2.0
"""Small networks, with batches that fit them, for tests of clipping, impact and privacy."""

import torch
import torch.nn.functional as F
from torch import nn


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


class Residual(nn.Module):
    """Additions and activations in place, as torchvision's networks have them."""

    def __init__(self, channels=8):
        super().__init__()
        self.first = nn.Conv2d(1, channels, 3, padding=1)
        self.inner = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(4, channels)
        self.head = nn.Linear(channels, 5)

    def forward(self, x):
        x = F.relu(self.first(x), inplace=True)
        y = self.norm(self.inner(x))
        y += x
        return self.head(F.relu(y, inplace=True).mean((2, 3)))


class Tokens(nn.Module):
    """An embedding, a normalisation and linear layers over positions."""

    def __init__(self, tied=False, padding_idx=0):
        super().__init__()
        self.table = nn.Embedding(12, 6, padding_idx=padding_idx)
        self.norm = nn.LayerNorm(6)
        self.mix = nn.Linear(6, 6)
        self.head = nn.Linear(6, 12, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids):
        return self.head(self.mix(self.norm(self.table(ids)))).mean(1)


class Reused(nn.Module):
    """One layer called three times."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        for _ in range(3):
            x = torch.tanh(self.layer(x))
        return self.head(x)


def images(count, channels=1, side=8):
    return torch.randn(count, channels, side, side), torch.randint(0, 5, (count,))


def zoo():
    """{name: (network, batch)}: every kind of layer that clipping knows, and some that it does not know by name."""
    torch.manual_seed(0)
    flat = nn.Flatten()
    return {
        "strided": (nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), flat, nn.Linear(64, 5)), images(6)),
        "grouped": (
            nn.Sequential(nn.Conv2d(4, 8, 3, groups=4), nn.Tanh(), nn.Conv2d(8, 8, 2, dilation=2, groups=8), flat,
                          nn.Linear(128, 5)),
            images(5, 4),
        ),
        "reflect": (nn.Sequential(nn.Conv2d(2, 4, 3, padding="same", padding_mode="reflect"), flat, nn.Linear(256, 5)),
                    images(5, 2)),
        "residual": (Residual(), images(6)),
        "many positions": (nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 3, 3), flat, nn.Linear(432, 5)),
                           images(4, 1, 16)),
        "few positions": (nn.Sequential(nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(), flat, nn.Linear(128, 5)),
                          images(4, 16, 4)),
        "tokens": (Tokens(), (torch.randint(0, 12, (5, 7)), torch.randint(0, 12, (5,)))),
        "unpadded": (Tokens(padding_idx=None), (torch.randint(0, 12, (5, 7)), torch.randint(0, 12, (5,)))),
        "tied": (Tokens(tied=True), (torch.randint(0, 12, (5, 7)), torch.randint(0, 12, (5,)))),
        "reused": (Reused(), (torch.randn(5, 6), torch.randint(0, 5, (5,)))),
        "positions": (nn.Sequential(nn.Linear(6, 4), nn.ReLU(), flat, nn.Linear(24, 5)),
                      (torch.randn(5, 2, 3, 6), torch.randint(0, 5, (5,)))),
        "generic": (nn.Sequential(nn.Conv1d(2, 3, 3), nn.PReLU(), nn.RMSNorm(6), flat, nn.Linear(18, 5)),
                    (torch.randn(5, 2, 8), torch.randint(0, 5, (5,)))),
        "norm of images": (nn.Sequential(nn.Conv2d(1, 4, 3), nn.LayerNorm([4, 6, 6]), flat, nn.Linear(144, 5)),
                           images(5)),
        "shared": (nn.Sequential(shared := nn.Linear(6, 6), nn.Tanh(), shared, nn.Linear(6, 5)),
                   (torch.randn(5, 6), torch.randint(0, 5, (5,)))),
        "norm of vectors": (nn.Sequential(nn.Linear(6, 8), nn.GroupNorm(2, 8), nn.ReLU(), nn.Linear(8, 5)),
                            (torch.randn(5, 6), torch.randint(0, 5, (5,)))),
    }  # fmt: skip


NAMES = tuple(zoo())
