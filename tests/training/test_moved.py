# SPDX-License-Identifier: Apache-2.0
"""The first step moves every trainable parameter and no frozen one, or one error says which."""

import pytest
import torch
from torch import nn

import dpquant
from dpquant.errors import ModelError
from dpquant.training.moved import check_moved
from networks import loss


class Unused(torch.optim.SGD):
    """Leaves some parameters where they are, or moves others too."""

    left, taken = (), ()

    def step(self, closure=None):
        kept = [p.detach().clone() for p in self.left]
        super().step()
        with torch.no_grad():
            for p, was in zip(self.left, kept, strict=True):
                p.copy_(was)
            for p in self.taken:
                p.mul_(0.99)


def network(frozen=()):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2))
    for name in frozen:
        model.get_submodule(name).requires_grad_(False)
    for p in model.parameters():
        p.grad = torch.randn_like(p) if p.requires_grad else None
    return model


def optimizer_of(model, lr=0.1):
    return Unused([p for p in model.parameters() if p.requires_grad], lr=lr)


def test_a_step_that_moves_all_is_taken_once():
    model = network()
    was = model[0].weight.detach().clone()
    assert check_moved(model, optimizer_of(model))
    torch.testing.assert_close(model[0].weight, was - 0.1 * model[0].weight.grad)


def test_a_trainable_parameter_that_stays_is_named():
    model = network()
    optimizer = optimizer_of(model)
    optimizer.left = (model[2].bias,)
    with pytest.raises(ModelError, match=r"2\.bias where it was.*requires_grad_\(False\)"):
        check_moved(model, optimizer)


def test_a_frozen_parameter_that_moves_is_named():
    model = network(frozen=["0"])
    optimizer = optimizer_of(model)
    assert check_moved(model, optimizer)
    optimizer.taken = (model[0].weight,)
    with pytest.raises(ModelError, match=r"a change of 0\.weight"):
        check_moved(model, optimizer)


def test_what_may_stay_is_no_error():
    model = network()
    model[2].bias.grad.zero_()  # no gradient
    norm = [*model[1].parameters()]
    rest = [p for p in model.parameters() if all(p is not one for one in norm)]
    warm = torch.optim.SGD([{"params": rest, "lr": 0.1}, {"params": norm, "lr": torch.tensor(0.0)}], lr=1.0)
    assert check_moved(model, warm)  # no learning rate
    model = network()
    with torch.no_grad():
        model[1].weight.fill_(1e4)
    assert check_moved(model, optimizer_of(model, lr=1e-6))  # rounding takes the update away
    assert bool((model[1].weight == 1e4).all())


def test_an_optimizer_that_moves_nothing_yet_is_asked_again():
    model = network()
    assert not check_moved(model, optimizer_of(model, lr=0.0))


class Records(torch.utils.data.Dataset):
    def __len__(self):
        return 40

    def __getitem__(self, index):
        return torch.randn(4, generator=torch.Generator().manual_seed(index)), index % 2


def test_a_run_stops_at_its_first_step():
    model = network()
    optimizer = optimizer_of(model)
    plan = dpquant.PrivacyPlan(
        noise_multiplier=1.0, delta=1e-3, max_grad_norm=1.0, sample_rate=0.2, expected_batch_size=8, steps=5
    )
    private = dpquant.make_private(
        model, optimizer, Records(), loss_fn=loss, plan=plan, policy=dpquant.NonePolicy(), backend="simulate",
        microbatch_size=8, mechanism_seed=0,
    )  # fmt: skip
    batch = next(iter(next(private.epochs())))
    optimizer.left = (model[0].bias,)
    with pytest.raises(ModelError, match=r"0\.bias where it was"):
        private.step(batch)
    assert private.steps_taken == 1  # what was charged stays charged
