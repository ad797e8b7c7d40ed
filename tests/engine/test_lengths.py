# SPDX-License-Identifier: Apache-2.0
"""Microbatches of several lengths in one step, as texts in buckets are: their sum is that of a step for each length."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn

import dpquant
from dpquant.backends.choose import Choices, Machine
from dpquant.engine.batches import Microbatch
from dpquant.engine.clip import clipped_sum_of
from dpquant.engine.grid_sum import grid_sum_of
from dpquant.engine.layers import quantizable_layers, set_policy
from dpquant.engine.passes import Objective
from networks import loss

WIDTH = 16
LENGTHS = [8, 4, 4, 8, 1, 12, 4]  # in no order; a length of one has methods of its own


class Reader(nn.Module):
    """Tokens through one layer or block to a class."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.words, self.block, self.head = nn.Embedding(20, WIDTH), block, nn.Linear(WIDTH, 3)

    def forward(self, ids: Tensor) -> Tensor:
        y = self.block(self.words(ids))
        return self.head((y[0] if isinstance(y, tuple) else y).mean(1))


class Channels(nn.Module):
    """A convolution over positions."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.convolution(x.transpose(1, 2)).transpose(1, 2)


BLOCKS = {
    "linear": lambda: nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)),
    "transformer": lambda: nn.TransformerEncoderLayer(WIDTH, 1, 32, dropout=0.0, batch_first=True),
    "convolution": Channels,
    "recurrent": lambda: nn.LSTM(WIDTH, WIDTH, batch_first=True),
    "norm": lambda: nn.LayerNorm(WIDTH),
}


def pieces_of(lengths: list[int]) -> list[Microbatch]:
    """Four records of each length, each record its own id."""
    generator, pieces = torch.Generator().manual_seed(0), []
    for place, length in enumerate(lengths):
        rows = torch.arange(4) + 4 * place
        ids = torch.randint(20, (4, length), generator=generator)
        pieces.append(Microbatch((ids, rows % 3), rows, 4))
    return pieces


@pytest.mark.parametrize("backend", ["simulate", "int8"])
@pytest.mark.parametrize("format", [None, "int8", "luq-fp4"])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("exact", [False, True])
def test_lengths_in_one_step_add_up(block: str, format: str | None, backend: str, exact: bool) -> None:
    torch.manual_seed(0)
    model = dpquant.prepare(Reader(BLOCKS[block]()), format=format or "int8", backend=backend)
    set_policy(model, quantizable_layers(model) if format else ())
    objective = Objective(model, loss)
    add_up = partial(grid_sum_of, grid=2.0**-20) if exact else clipped_sum_of
    pieces, ways = pieces_of(LENGTHS), []

    def in_turn(candidates):
        """Another way for each size."""
        ways.append(len(ways) % len(candidates))
        return {name: float(place != ways[-1]) for place, name in enumerate(candidates)}

    with Choices(timed=in_turn, machine=Machine(None)).active():
        objective.learn(pieces[0])
        found = add_up(objective, pieces, max_grad_norm=0.5, key=7)
        each = [add_up(objective, [piece], max_grad_norm=0.5, key=7) for piece in pieces]
    for name, total in found.grads.items():
        expected = sum(one.grads[name].double() for one in each)
        scale = float(expected.abs().max())
        assert float((total.double() - expected).abs().max()) <= (0 if exact else 1e-5 * scale), name
