# SPDX-License-Identifier: Apache-2.0
"""T10: nobody tells two neighbouring data sets apart better than the claimed noise allows, not even the best player.

A Gaussian mechanism whose noise is sigma times its sensitivity is 1/sigma-GDP (Dong, Roth and Su, arXiv 1905.02383).
Who is given an output and has to say whether the record is in the data makes errors of two kinds. From K outputs of
each world come upper bounds of both, alpha and beta (Clopper and Pearson), and from these a lower bound of mu:

    mu >= quantile(1 - alpha) - quantile(beta)        quantile: of the standard normal

It may not be above 1/sigma. Inclusion is forced (rate 1): sampling has tests of its own. The threshold is fixed in
advance, half way between the worlds, where the player is best.
"""

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

import dpquant
from dpquant.engine.batches import microbatches
from dpquant.engine.passes import Objective
from dpquant.privacy.mechanism import Mechanism
from dpquant.training.epoch import Batch
from dpquant.training.impact import ImpactSum, analysis_keys, impact_sum
from dpquant.training.private import PrivateTraining
from mechanisms import begun, with_doubles
from networks import loss, zoo

ALPHA = 1e-6  # of a false alarm
SIGMA, C, GAMES, ANALYSES = 0.8, 0.5, 4000, 1500
IMPACT = 1e-3  # to which impacts are clipped, less than any has


def lower_bound_of_mu(without, with_record, threshold):
    """A lower bound, at confidence 1 - ALPHA, of the mu that tells apart outputs of two worlds."""

    def at_most(errors, count):
        return stats.beta.ppf(1 - ALPHA / 2, errors + 1, count - errors)

    false_alarms, misses = int((without > threshold).sum()), int((with_record <= threshold).sum())
    alpha, beta = at_most(false_alarms, len(without)), at_most(misses, len(with_record))
    return stats.norm.ppf(1 - alpha) - stats.norm.ppf(beta)


def assert_claim_is_kept(without, with_record, sigma):
    """The bound is below the claim; and not far below, or the game would show nothing."""
    found = lower_bound_of_mu(without, with_record, 0.5)
    assert 0.7 / sigma < found < 1 / sigma


# The step: each record pulls at a row of its own, far beyond the clipping norm, and every other one is in the data.


def pulled_down(model, batch):
    return -100 * model(batch[0]).flatten()


def outputs_of_a_step(make_run=PrivateTraining, **doubles):
    """What a step gives for 2 * GAMES rows, in units of C: those without a record, and those with one."""
    torch.manual_seed(0)
    records = [(torch.tensor([2 * number]), torch.tensor(0)) for number in range(GAMES)]
    plan = dpquant.PrivacyPlan(
        noise_multiplier=SIGMA, delta=1e-5, max_grad_norm=C, sample_rate=1.0, expected_batch_size=GAMES, steps=1
    )
    mechanism = with_doubles(Mechanism.repeatable(5, None), **doubles)
    run = begun(
        nn.Embedding(2 * GAMES, 1), records, loss_fn=pulled_down, plan=plan, policy=dpquant.NonePolicy(),
        mechanism=mechanism, microbatch_size=1000, make_run=make_run,
    )  # fmt: skip
    run.step(next(iter(next(run.epochs()))))
    (parameter,) = run.model.parameters()
    outputs = -parameter.grad.flatten().double().numpy() * GAMES / C
    return outputs[1::2], outputs[::2]


@pytest.mark.always
def test_a_step_is_no_easier_to_see_through_than_is_claimed():
    assert_claim_is_kept(*outputs_of_a_step(), SIGMA)


class ClippedToTwice(PrivateTraining):
    def _clipped_sum(self, pieces, key):
        total = super()._clipped_sum(pieces, key)
        for grad in total.grads.values():
            grad.mul_(1.5)
        return total


EASIER = {
    "noise of two thirds": {"gaussian": lambda honest, shape, std, **k: honest(shape, std / 1.5, **k)},
    "gradients half as large again": {"make_run": ClippedToTwice},
}


@pytest.mark.parametrize("planted", EASIER.values(), ids=EASIER)
def test_a_step_that_is_easier_to_see_through_is_caught(planted):
    with pytest.raises(AssertionError):
        assert_claim_is_kept(*outputs_of_a_step(**planted), SIGMA)


# The analysis: its noise on the sums with and without one record, whose impact is as large as it may be.


class Told(PrivateTraining):
    """Measures what it is told."""

    measured: ImpactSum

    def _impact_sum(self, pieces, names, keys):
        return ImpactSum(self.measured.impacts.clone(), self.measured.sensitivity)


def sums_of_two_worlds(max_norm):
    """The impacts' sums over three records, and over these and one more: clipped, each of its own."""
    model, (inputs, labels) = zoo()["strided"]
    model = dpquant.prepare(model, backend="simulate")
    names = list(dpquant.quantizable_layers(model))

    def summed(ids):
        ids = torch.tensor(ids)
        pieces = microbatches((inputs[ids], labels[ids]), ids, 4)
        return impact_sum(Objective(model, loss), pieces, names=names, max_norm=max_norm, keys=analysis_keys(0, 0))

    return summed([0, 1, 2]), summed([0, 1, 2, 3])


def outputs_of_analyses(sums, sigma, *, games=ANALYSES, divide=lambda number: 1.0, sensitivity=None):
    """The scores of two worlds, projected onto their difference, in units of the sensitivity."""
    max_norm = sums[0].sensitivity
    plan = dpquant.PrivacyPlan(
        noise_multiplier=1.0, delta=1e-5, max_grad_norm=1.0, sample_rate=1.0, expected_batch_size=4, steps=4,
        analysis=dpquant.AnalysisPlan(
            count=1, sample_rate=1.0, expected_batch_size=4, noise_multiplier=sigma, max_norm=max_norm
        ),
    )  # fmt: skip
    model, (inputs, labels) = zoo()["strided"]
    run = begun(
        model, list(zip(inputs, labels, strict=True)), loss_fn=loss, plan=plan, mechanism=Mechanism.repeatable(6, None),
        policy=dpquant.DPQuantPolicy(fraction=0.5, ema=1.0), make_run=Told, microbatch_size=4, backend="simulate",
    )  # fmt: skip
    towards = (sums[1].impacts - sums[0].impacts).numpy()
    towards /= np.linalg.norm(towards)
    found = []
    for world, total in enumerate(sums):
        run.measured = ImpactSum(total.impacts, sensitivity or total.sensitivity)
        outputs = []
        for game in range(games):
            run._score(Batch(torch.arange(3 + world), game, 2 * game + world, lambda ids: ()))
            outputs.append(list(run.scores.values()))
        means = 4 * np.array(outputs) * divide(3 + world)
        found.append((means - sums[0].impacts.numpy() * divide(3)) @ towards / max_norm)
    return found


@pytest.fixture(scope="module")
def worlds():
    sums = sums_of_two_worlds(IMPACT)
    gap = (sums[1].impacts - sums[0].impacts).norm().item()
    assert 0.999 * IMPACT < gap <= IMPACT * (1 + 1e-6)  # the worst case that is allowed
    return sums


@pytest.mark.always
def test_an_analysis_is_no_easier_to_see_through_than_is_claimed(worlds):
    assert_claim_is_kept(*outputs_of_analyses(worlds, SIGMA), SIGMA)


@pytest.mark.parametrize(
    "planted",
    [{"sensitivity": IMPACT / 1.5}, {"divide": lambda number: 12 / number**2}],
    ids=["noise of two thirds", "divided by the realised number"],
)
def test_an_analysis_that_is_easier_to_see_through_is_caught(planted, worlds):
    with pytest.raises(AssertionError):
        assert_claim_is_kept(*outputs_of_analyses(worlds, SIGMA, **planted), SIGMA)


def test_the_aggregate_clipped_as_a_whole_is_caught():
    """Two sums in a ball of radius C can lie 2 C apart, and the noise is for C."""
    one, other = (ImpactSum(torch.tensor([sign * IMPACT, 0.0], dtype=torch.float64), IMPACT) for sign in (-0.5, 1.0))
    with pytest.raises(AssertionError):
        assert_claim_is_kept(*outputs_of_analyses((one, other), SIGMA), SIGMA)


def test_the_bound_is_that_of_gaussians():
    generator = np.random.default_rng(0)
    for mu in (0.5, 1.0, 2.0):
        without, with_record = generator.normal(size=20_000) / mu, 1 + generator.normal(size=20_000) / mu
        assert 0.75 * mu < lower_bound_of_mu(without, with_record, 0.5) < mu
