# SPDX-License-Identifier: Apache-2.0
"""What a record contributes does not move when another record's length pads the batch further: codes, scales, sums.

Records are token ids padded by 0, which embeds as zeros and is masked in the model, so that plain autograd's gradients
do not move either.
"""

import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import dpquant
from dpquant.backends.doubles import Wrapped
from dpquant.backends.interface import Backend
from dpquant.backends.qtensor import QTensor
from dpquant.backends.registry import BACKENDS
from dpquant.formats import RECIPES, RoleFormat
from processor import backends_of

C = 0.05
TOLERANCE = 1e-3 * C  # a longer product's sums may differ in their last bits
NUM_RECORDS, LENGTH, PADDING, NUM_TOKENS = 30, 6, 34, 20


class Masked(nn.Module):
    """The mean over a text's tokens."""

    def __init__(self):
        super().__init__()
        self.e, self.f, self.h = nn.Embedding(NUM_TOKENS, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.e.weight.data[0] = 0.0

    def forward(self, ids):
        kept = (ids > 0).float()[..., None]
        return self.h((torch.tanh(self.f(self.e(ids))) * kept).sum(1) / kept.sum(1).clamp(min=1))


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def records(seed: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A model, and texts of 2 to 6 tokens with labels."""
    torch.manual_seed(seed)
    ids = torch.randint(1, NUM_TOKENS, (NUM_RECORDS, LENGTH))
    ids[torch.arange(LENGTH) >= torch.randint(2, LENGTH + 1, (NUM_RECORDS, 1))] = 0
    return Masked(), ids, torch.randint(0, 3, (NUM_RECORDS,))


def clipped_sum(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    """All parameters' sums in one vector, in one microbatch."""
    grads = dpquant.clipped_sum(
        model,
        cross_entropy,
        (ids, labels),
        max_grad_norm=C,
        record_ids=torch.arange(len(ids)),
        step=0,
        seed=0,
        microbatch_size=len(ids),
    ).grads
    return torch.cat([grads[name].flatten() for name in sorted(grads)])


def assert_padding_moves_nothing(recipe: str, backend: str | Backend) -> None:
    """The records' clipped sum stays where it is when their texts are padded further."""
    for seed in range(3):
        model, ids, labels = records(seed)
        model = dpquant.prepare(model, format=recipe, backend=backend)
        dpquant.set_policy(model, list(dpquant.quantizable_layers(model)))
        moved = clipped_sum(model, F.pad(ids, (0, PADDING)), labels) - clipped_sum(model, ids, labels)
        assert moved.norm().item() <= TOLERANCE


WHERE = [(recipe, backend) for recipe in RECIPES for backend in backends_of(recipe)]


@pytest.mark.parametrize(("recipe", "backend"), WHERE)
def test_the_clipped_sum_does_not_move(recipe, backend):
    assert_padding_moves_nothing(recipe, backend)


@pytest.mark.parametrize(("recipe", "backend"), WHERE)
def test_rounding_changes_the_sum(recipe, backend):
    model, ids, labels = records(0)
    full = clipped_sum(dpquant.prepare(copy.deepcopy(model)), ids, labels)
    model = dpquant.prepare(model, format=recipe, backend=backend)
    dpquant.set_policy(model, list(dpquant.quantizable_layers(model)))
    assert (clipped_sum(model, ids, labels) - full).norm().item() > 10 * TOLERANCE


class FlatRows(Wrapped):
    """Maps of some roles are one line each: draws go by row-major position, and a mean is over padding, too."""

    def __init__(self, inner: Backend, *, clipped: bool):
        super().__init__(inner)
        self._clipped = clipped  # the roles with a clip, or those without

    def quantize(self, x: Tensor, role: RoleFormat, row_keys: Tensor) -> QTensor:
        if (role.clip is not None) is not self._clipped:
            return super().quantize(x, role, row_keys)
        q = super().quantize(x.reshape(len(x), 1, 1, -1), role, row_keys)
        return q.rearranged(lambda part: part.view(x.shape).contiguous(memory_format=torch.channels_last))


@pytest.mark.parametrize(("recipe", "backend"), WHERE)
def test_row_major_draws_would_be_seen(recipe, backend):
    with pytest.raises(AssertionError):
        assert_padding_moves_nothing(recipe, FlatRows(BACKENDS[backend], clipped=False))


@pytest.mark.parametrize(("recipe", "backend"), [pair for pair in WHERE if RECIPES[pair[0]].activation.clip])
def test_a_mean_over_the_padding_would_be_seen(recipe, backend):
    with pytest.raises(AssertionError):  # rounded to nearest: there are no draws to move
        assert_padding_moves_nothing(recipe, FlatRows(BACKENDS[backend], clipped=True))
