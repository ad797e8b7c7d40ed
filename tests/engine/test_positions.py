# SPDX-License-Identifier: Apache-2.0
"""Tables of positions that are looked up once for all examples, by ids of one axis."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dpquant
from dpquant.engine.clip import clipped_sum
from dpquant.errors import ModelError
from dpquant.training.private import PrivateTraining
from mechanisms import begun, finish

C, T = 0.3, 6


class Positions(nn.Module):
    """As small language models have it: `self.positions(torch.arange(T))` is added to the embeddings of tokens."""

    def __init__(self, ids=lambda tokens: torch.arange(tokens.shape[1]), after=lambda found: found):
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.positions = nn.Embedding(20, 8), nn.Embedding(T, 8)
        self.output, self.ids, self.after = nn.Linear(8, 3), ids, after

    def forward(self, tokens):
        return self.output(torch.tanh(self.tokens(tokens) + self.after(self.positions(self.ids(tokens))))).mean(1)


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def batch_of(count):
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, T, (count, T), generator=generator), torch.arange(count) % 3


def sum_of(model, batch, size):
    ids = torch.arange(len(batch[1]))
    return clipped_sum(model, loss, batch, max_grad_norm=C, record_ids=ids, step=0, seed=0, microbatch_size=size).grads


def looped(model, batch):
    """The sum by autograd, one example after another."""
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for row in range(len(batch[1])):
        model.zero_grad()
        loss(model, [part[row : row + 1] for part in batch]).sum().backward()
        norm = sum(p.grad.square().sum() for p in model.parameters()).sqrt()
        for name, p in model.named_parameters():
            total[name] += p.grad * min(1, C / norm)
    model.zero_grad()
    return total


def with_an_axis_before(found):
    """For which an axis of examples in front would be in the wrong place."""
    return found.unsqueeze(0)


AFTER = {"as they are": lambda found: found, "with an axis before": with_an_axis_before}


@pytest.mark.parametrize("after", AFTER)
def test_the_sum_is_that_of_a_loop_also_for_as_many_examples_as_positions(after):
    model = dpquant.prepare(Positions(after=AFTER[after]), backend="simulate")
    for count, size in ((T, T), (5, 5), (2 * T, T), (7, 3)):  # the first call finds out what ids of one axis are
        batch = batch_of(count)
        expected, found = looped(model, batch), sum_of(model, batch, size)
        for name, wanted in expected.items():
            assert torch.allclose(found[name], wanted, atol=1e-5), (name, count)


def run(model):
    plan = dpquant.PrivacyPlan(
        noise_multiplier=1.0, delta=1e-5, max_grad_norm=1.0, sample_rate=0.5, expected_batch_size=10, steps=2
    )
    records = torch.utils.data.TensorDataset(*batch_of(20))
    return finish(
        begun(
            model, records, loss_fn=loss, plan=plan, policy=dpquant.AllPolicy(), make_run=PrivateTraining,
            microbatch_size=T, backend="simulate",
        )
    )  # fmt: skip


@pytest.mark.parametrize("after", AFTER)
def test_such_a_model_is_trained_with_as_many_examples_as_positions(after):
    assert run(Positions(after=AFTER[after])).steps_taken == 2


@pytest.mark.parametrize(
    "model",
    [
        Positions(ids=lambda tokens: tokens[0]),  # of one record, for all
        Positions(ids=lambda tokens: tokens.t().flatten(), after=lambda found: found.reshape(T, -1, 8).transpose(0, 1)),
    ],
    ids=["of another record", "of all records, position by position"],
)
def test_other_ids_of_one_axis_are_refused_before_a_record_is_used(model):
    with pytest.raises(ModelError):
        run(model)
