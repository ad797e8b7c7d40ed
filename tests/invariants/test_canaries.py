# SPDX-License-Identifier: Apache-2.0
"""T5, T11: noise and canaries, measured at the far end of whole runs."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import dpquant
from dpquant.privacy.mechanism import Mechanism
from dpquant.training.private import PrivateTraining
from mechanisms import begun, finish, with_doubles
from networks import loss

Z = 4.9  # a standard normal lies farther out with probability 1e-6


def run_of(model, records, *, steps=1, sample_rate=0.1, policy=None, max_grad_norm=0.5, loss_fn=loss, parts=None):
    """What a run with doubles of its mechanism has moved its parameters by, times the batch size."""
    plan = dpquant.PrivacyPlan(
        noise_multiplier=1.3, delta=1e-5, max_grad_norm=max_grad_norm, sample_rate=sample_rate,
        expected_batch_size=sample_rate * len(records), steps=steps,
    )  # fmt: skip
    doubles = dict(parts or {})
    make_run = doubles.pop("make_run", PrivateTraining)
    mechanism = with_doubles(Mechanism.repeatable(3, None), **doubles)
    run = begun(
        model, records, loss_fn=loss_fn, plan=plan, policy=policy or dpquant.NonePolicy(), mechanism=mechanism, lr=1.0,
        make_run=make_run,
    )  # fmt: skip
    before = [p.detach().clone() for p in run.model.parameters()]
    finish(run)
    moved = [old - new.detach() for old, new in zip(before, run.model.parameters(), strict=True)]
    return torch.cat([m.double().flatten() for m in moved]) * plan.expected_batch_size


def noise_of_blank_records(**parts):
    """Records without a gradient leave a step of noise alone: 200 000 entries, in units of the promised deviation."""
    model = nn.Sequential(nn.Linear(400, 400, bias=False), nn.Linear(400, 100, bias=False))
    records = TensorDataset(torch.zeros(40, 400), torch.zeros(40).long())
    return run_of(model, records, parts=parts) / (1.3 * 0.5)


def assert_standard_normal(noise):
    n = len(noise)
    assert abs(noise.mean().item()) * n**0.5 < Z
    assert abs(noise.square().mean().item() - 1) / (2 / n) ** 0.5 < Z
    assert abs(noise.pow(4).mean().item() - 3) / (96 / n) ** 0.5 < Z


def test_a_step_adds_gaussian_noise_of_the_promised_size_to_every_parameter():
    assert_standard_normal(noise_of_blank_records())


@pytest.mark.parametrize("factor", [0.98, 1.02])
def test_noise_that_is_off_by_two_in_a_hundred_is_caught(factor):
    noise = noise_of_blank_records(gaussian=lambda honest, shape, std, **k: honest(shape, factor * std, **k))
    with pytest.raises(AssertionError):
        assert_standard_normal(noise)


CANARIES, STEPS, RATE = 2000, 20, 0.1


def steep_linear_loss(model, batch):
    return 100 * model(batch[0]).squeeze(1)


def canary_sums(policy, parts=None):
    """Canary i pulls weight i alone, far beyond the clip norm; every other one is in the data."""
    torch.manual_seed(0)
    records = TensorDataset(torch.eye(CANARIES)[::2], torch.zeros(CANARIES // 2))
    model = nn.Linear(CANARIES, 1, bias=False)
    return run_of(
        model, records, steps=STEPS, sample_rate=RATE, policy=policy, max_grad_norm=1.0, loss_fn=steep_linear_loss,
        parts=parts,
    )  # fmt: skip


def assert_canaries_are_heard_as_promised(sums):
    """Absent: N(0, T sigma^2 C^2). Present: the same plus C times a binomial number of T draws at rate q."""
    absent, present = sums[1::2], sums[::2]
    n, variance, binomial = len(absent), STEPS * 1.3**2, STEPS * RATE * (1 - RATE)
    assert abs(absent.mean().item()) / (variance / n) ** 0.5 < Z
    assert abs(absent.var().item() / variance - 1) / (2 / n) ** 0.5 < Z
    assert abs(present.mean().item() - STEPS * RATE) / ((variance + binomial) / n) ** 0.5 < Z


@pytest.mark.always
@pytest.mark.parametrize("policy", [dpquant.NonePolicy(), dpquant.AllPolicy()], ids=["full", "quantized"])
def test_canaries_are_heard_as_loudly_as_the_accounting_assumes(policy):
    assert_canaries_are_heard_as_promised(canary_sums(policy))


class GradientsTimesThree(PrivateTraining):
    def _clipped_sum(self, pieces, key):
        out = super()._clipped_sum(pieces, key)
        return dataclasses.replace(out, grads={name: 3 * grad for name, grad in out.grads.items()})


LOUDER = {
    "half the noise": {"gaussian": lambda honest, shape, std, **k: honest(shape, std / 2, **k)},
    "gradients times three": {"make_run": GradientsTimesThree},
    "a higher rate than charged": {"draw": lambda honest, n, rate, **k: honest(n, 2 * rate, **k)},
}


@pytest.mark.parametrize("parts", LOUDER.values(), ids=LOUDER)
def test_canaries_that_are_heard_louder_are_caught(parts):
    sums = canary_sums(dpquant.NonePolicy(), parts)
    with pytest.raises(AssertionError):
        assert_canaries_are_heard_as_promised(sums)
