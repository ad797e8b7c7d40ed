# SPDX-License-Identifier: Apache-2.0
"""What the bits of a release tell: with discrete noise nothing, with Gaussian noise something. Planted bugs are found.

T14 of the guarantees: released values lie on a grid that does not depend on data, sums on it are exact, and no record
moves them by more than the sensitivity, counted in integers.
"""

import dataclasses
import functools
import math
from fractions import Fraction

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import dpquant
from dpquant.engine import grid_sum
from dpquant.engine.batches import microbatches
from dpquant.engine.clip import ClippedSum
from dpquant.engine.grid_sum import grid_sum_of
from dpquant.engine.passes import Objective
from dpquant.errors import SettingError
from dpquant.privacy.grid_noise import BITS, grid_of
from dpquant.privacy.mechanism import Mechanism
from dpquant.privacy.noise import NoiseSource
from dpquant.training.impact import analysis_keys, impact_sum
from dpquant.training.private import PrivateTraining
from dpquant.training.sums import noisy_mean
from mechanisms import begun, finish, with_doubles
from networks import loss, zoo

C = 1.0
GRID = grid_of(C)
FOR = {"stream": "train", "step": 0, "attempt": 0, "name": "weight"}


def network(name, *, quantized):
    net, batch = zoo()[name]
    model = dpquant.prepare(net, format="luq-fp4", backend="simulate")
    dpquant.set_policy(model, dpquant.quantizable_layers(model) if quantized else ())
    return Objective(model, loss), batch


def awkward(batch):
    """The batch with a huge, a tiny, an empty and a broken record."""
    first = batch[0].clone()
    first[0] *= 1e4
    first[1] *= 1e-20
    first[2] = 0
    first[3] = math.nan
    return first, batch[1]


def summed(objective, batch, rows, *, size=1, grid=GRID):
    """{name: int64 sum} of some records, which keep their ids whatever company they are in."""
    rows = torch.as_tensor(rows, dtype=torch.int64)
    pieces = microbatches(tuple(t[rows] for t in batch), rows, size) if len(rows) else ()
    return grid_sum_of(objective, pieces, max_grad_norm=C, grid=grid, key=5)


def flat(total: ClippedSum) -> torch.Tensor:
    return torch.cat([grad.flatten() for grad in total.grads.values()])


# Sums


def assert_sums_are_exact(sum_of, count) -> None:
    """The sum of all is that of the parts, in any order: equal integers, not close ones."""
    whole = sum_of(range(count))
    assert whole.dtype == torch.int64
    assert torch.equal(sum_of(range(count - 1, -1, -1)), whole)
    assert torch.equal(sum(sum_of([row]) for row in range(count)), whole)
    for row in range(count):
        assert torch.equal(whole - sum_of([other for other in range(count) if other != row]), sum_of([row]))
    assert not sum_of([]).any()


NETS = [("strided", False), ("residual", True), ("tied", False), ("reused", False), ("norm of vectors", False)]


@pytest.mark.parametrize(("name", "quantized"), NETS)
def test_sums_are_exact_whoever_passes_and_in_any_order(name, quantized):
    objective, batch = network(name, quantized=quantized)
    assert_sums_are_exact(lambda rows: flat(summed(objective, batch, rows)), len(batch[1]))


@pytest.mark.parametrize("name", ["reused", "norm of vectors"])
def test_in_larger_microbatches_a_records_place_shows_in_its_last_bits(name):
    """Why runs with discrete noise pass records one by one. On some processors it may not show."""
    objective, batch = network(name, quantized=False)
    one = flat(summed(objective, batch, range(len(batch[1])), size=3))
    other = flat(summed(objective, batch, range(len(batch[1]) - 1, -1, -1), size=3))
    assert (one - other).abs().max() < 2**10  # float32 round-off of C, in steps of the grid


def test_sums_of_floats_would_be_seen():
    objective, batch = network("strided", quantized=False)
    step = grid_of(C)
    plain = {row: flat(summed(objective, batch, [row])).float() * step for row in range(len(batch[1]))}

    def of_floats(rows):
        total = torch.zeros_like(plain[0])
        for row in rows:
            total += plain[row]
        return (total.double() / step).long()

    with pytest.raises(AssertionError):
        assert_sums_are_exact(of_floats, len(batch[1]))


# Sensitivity, in integers


def assert_each_part_is_bounded(sum_of, count, grid) -> None:
    """||k_i||^2 grid^2 <= C^2, as fractions."""
    for row in range(count):
        squares = sum(int(k) ** 2 for k in sum_of([row]).tolist() if k)
        assert squares * Fraction(grid) ** 2 <= Fraction(C) ** 2


def assert_parts_are_bounded_on_grids(objective, batch):
    for grid in (grid_of(C), 2.0**-20, C / 3, C / 100):
        assert_each_part_is_bounded(
            lambda rows, grid=grid: flat(summed(objective, batch, rows, grid=grid)), len(batch[1]), grid
        )


@pytest.mark.parametrize(("name", "quantized"), [("strided", True), ("residual", False), ("few positions", False)])
def test_no_record_moves_a_sum_by_more_than_the_clipping_norm(name, quantized):
    objective, batch = network(name, quantized=quantized)
    assert_parts_are_bounded_on_grids(objective, awkward(batch))


def nearest(vectors, factors_B):
    return (torch.nan_to_num(vectors) * factors_B.view(-1, *[1] * (vectors.ndim - 1))).round().long().sum(0)


def unclipped(squared_norms_B, max_norm, grid):
    return torch.full_like(squared_norms_B, 1 / grid).where(squared_norms_B.isfinite(), 0.0)


@pytest.mark.parametrize(("name", "planted"), [("rounded_sum", nearest), ("grid_factors", unclipped)])
def test_contributions_that_rounding_lengthens_or_nothing_clips_would_be_seen(name, planted, monkeypatch):
    objective, batch = network("few positions", quantized=False)
    monkeypatch.setattr(grid_sum, name, planted)
    with pytest.raises(AssertionError):
        assert_parts_are_bounded_on_grids(objective, awkward(batch))


def test_broken_records_contribute_nothing_and_clipping_cuts_nothing_off_small_ones():
    objective, batch = network("strided", quantized=False)
    bad = awkward(batch)
    assert not flat(summed(objective, bad, [3])).any()
    length = float(flat(summed(objective, bad, [0])).double().norm()) * grid_of(C)
    assert C * (1 - 2e-5) < length <= C  # the huge one is clipped, not cut down


def test_impacts_are_summed_in_integers_too():
    objective, batch = network("residual", quantized=False)
    norm = 0.05  # most vectors are longer
    names, grid = list(dpquant.quantizable_layers(objective.model)), grid_of(norm)

    def sum_of(rows):
        rows = torch.as_tensor(rows, dtype=torch.int64)
        pieces = microbatches(tuple(t[rows] for t in batch), rows, 1) if len(rows) else ()
        keys = analysis_keys(0, 0)
        return impact_sum(objective, pieces, names=names, max_norm=norm, keys=keys, score="gradient", grid=grid).impacts

    assert_sums_are_exact(sum_of, len(batch[1]))
    for row in range(len(batch[1])):
        assert sum(int(k) ** 2 for k in sum_of([row]).tolist()) * Fraction(grid) ** 2 <= Fraction(norm) ** 2
    assert sum_of(range(len(batch[1]))).any()


# Lattice


def worlds():
    """The sums of a data set and of its neighbour, which has one record more."""
    objective, batch = network("strided", quantized=False)
    return [flat(summed(objective, batch, range(count))) for count in (3, 4)]


def released(total, noise):
    return noisy_mean(noise, total, grid=grid_of(C), expected=24.0)


def assert_is_on_the_grid(values) -> None:
    """Every value is a whole number of steps, bit for bit; the steps follow from public numbers."""
    step = grid_of(C) / 24.0
    assert torch.equal((values / step).round() * step, values)
    assert len(set((values / step).round().remainder(8).tolist())) == 8  # and of no coarser grid


def test_releases_lie_on_the_grid_in_both_worlds():
    for total in worlds():
        assert_is_on_the_grid(released(total, NoiseSource.from_seed(1).discrete(total.shape, **FOR)))


@pytest.mark.parametrize("planted", ["float noise", "another grid"])
def test_noise_or_sums_that_are_off_the_grid_would_be_seen(planted):
    for total in worlds():
        noise = NoiseSource.from_seed(1).discrete(total.shape, **FOR).double()
        if planted == "float noise":
            noise = NoiseSource.from_seed(1).gaussian(total.shape, 2.0**BITS, **FOR).double() * (1 + 1e-9)
        else:
            total = total * 0.75
        with pytest.raises(AssertionError):
            assert_is_on_the_grid(released(total, noise))


def test_gaussian_noise_leaves_gaps_by_which_worlds_can_be_told_apart():
    """The limitation that the statement names: which float32 values can be released depends on the sum."""

    def off_lattice(total):
        noise = NoiseSource.from_seed(2).gaussian((20_000,), 1.0, **FOR)
        values = noisy_mean(noise, torch.full((20_000,), total), grid=None, expected=1.0)
        return float((values.double().remainder(2.0**-24) != 0).double().mean())

    assert off_lattice(0.0) > 0.2 and off_lattice(1.0) == 0.0
    statement = plan("gaussian").statement()
    assert "floating-point side channels" in statement and "discrete" not in statement


# Runs


SETTINGS = {
    "noise_multiplier": 1.5, "delta": 1e-5, "max_grad_norm": C, "sample_rate": 0.5, "expected_batch_size": 8,
    "steps": 3,
}  # fmt: skip
ANALYSIS = dpquant.AnalysisPlan(
    count=1, sample_rate=0.5, expected_batch_size=4, noise_multiplier=2.0, max_norm=0.5, score="loss"
)


def plan(noise, **changes):
    return dpquant.PrivacyPlan(**{**SETTINGS, "analysis": ANALYSIS, "noise": noise, **changes})


DISCRETE = plan("discrete")


def records(count=6):
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(count, 6, generator=generator), torch.arange(count) % 3)


def run(data=None, *, policy=None, plan=DISCRETE, mechanism=None, **keywords):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    return begun(
        model, data or records(), loss_fn=loss, plan=plan, policy=policy or dpquant.DPQuantPolicy(fraction=0.5),
        mechanism=mechanism or Mechanism.repeatable(7, None), backend="simulate", **keywords,
    )  # fmt: skip


def weights(a_run):
    return [p.detach().clone() for p in a_run.model.parameters()]


@functools.cache
def finished(noise):
    return finish(run(plan=plan(noise)))


def test_a_run_repeats_from_its_seed_passes_records_one_by_one_and_draws_all_noise_once():
    purposes = []

    def watched(honest, *arguments, **purpose):
        purposes.append(tuple(purpose.values()))
        return honest(*arguments, **purpose)

    first = finished("discrete")
    second = finish(run(mechanism=with_doubles(Mechanism.repeatable(7, None), gaussian=watched)))
    assert first.execution.microbatch_size == first.execution.analysis_microbatch_size == 1
    assert all(map(torch.equal, weights(first), weights(second))) and first.scores == second.scores
    assert len(purposes) == len(set(purposes)) == 3 * 4 + 1


def test_it_is_charged_as_with_gaussian_noise_and_says_what_it_covers():
    discrete, gaussian = finished("discrete"), finished("gaussian")
    assert discrete.events() == gaussian.events() and discrete.epsilon_spent() == gaussian.epsilon_spent()
    statement = discrete.statement()
    assert "discrete Gaussian" in statement and "one by one" in statement
    assert "floating-point side channels" not in statement and "timing and memory" in statement
    assert "adds at most" in statement and "for each number" in DISCRETE.statement()


def test_larger_microbatches_are_refused():
    with pytest.raises(SettingError, match=r"Expected microbatch_size=1 with noise=discrete; got microbatch_size=4\."):
        run(microbatch_size=4)


def test_other_laws_are_refused():
    with pytest.raises(SettingError, match="Expected noise to be one of gaussian, discrete; got noise='laplace'"):
        plan("laplace")


class Heard(torch.optim.SGD):
    """An optimizer that keeps what it is given."""

    def step(self, closure=None):
        self.state.setdefault("heard", []).append([p.grad.clone() for g in self.param_groups for p in g["params"]])
        return super().step(closure)


def assert_only_noise_is_heard(mechanism=None) -> None:
    """Of records that contribute nothing, a step tells noise of the planned deviation, and so does an analysis."""
    broken = TensorDataset(torch.full((2, 6), math.nan), torch.arange(2))
    long = plan("discrete", analysis=None, steps=8)
    mechanism = mechanism or Mechanism.repeatable(3, None)
    a_run = finish(run(broken, plan=long, policy=dpquant.NonePolicy(), mechanism=mechanism, optimizer=Heard))
    grads = a_run.optimizer.state["heard"]
    heard = torch.cat([grad.flatten() for step in grads for grad in step]).double() * 8 / 1.5
    assert len(grads) == 8
    assert abs(float((heard.square().mean() - 1) * math.sqrt(len(heard) / 2))) < 4.9
    assert abs(float(heard.mean() * math.sqrt(len(heard)))) < 4.9


def test_a_step_adds_noise_of_the_planned_deviation():
    assert_only_noise_is_heard()


@pytest.mark.parametrize("planted", [lambda noise: noise // 2, lambda noise: noise + 2**27])
def test_less_noise_or_a_shift_would_be_heard(planted):
    doubled = with_doubles(Mechanism.repeatable(3, None), gaussian=lambda honest, *a, **k: planted(honest(*a, **k)))
    with pytest.raises(AssertionError):
        assert_only_noise_is_heard(doubled)


class Measured(PrivateTraining):
    """Keeps the grids of the sums of impacts."""

    grids = ()

    def _impact_sum(self, pieces, names, keys):
        total = super()._impact_sum(pieces, names, keys)
        self.grids = (*self.grids, total.grid)
        return total


def assert_impacts_have_the_grid_of_their_noise(of) -> None:
    assert finish(run(plan=of, make_run=Measured)).grids == (grid_of(2.0 * 0.5),)


def test_impacts_are_counted_in_steps_of_their_own_noise():
    assert_impacts_have_the_grid_of_their_noise(DISCRETE)


class NoiseOfTraining(dpquant.PrivacyPlan):
    def analysis_noise_std(self, sensitivity):
        return self.noise_multiplier * sensitivity


def test_steps_of_another_noise_would_be_seen():
    with pytest.raises(AssertionError):
        assert_impacts_have_the_grid_of_their_noise(NoiseOfTraining(**SETTINGS, analysis=ANALYSIS, noise="discrete"))


class OffTheSum(PrivateTraining):
    """Sums of another sensitivity than the plan's."""

    def _clipped_sum(self, pieces, key):
        return dataclasses.replace(super()._clipped_sum(pieces, key), sensitivity=2.0)


def test_sums_of_another_sensitivity_stop_the_run():
    with pytest.raises(dpquant.ModelError, match="sensitivity"):
        finish(run(make_run=OffTheSum))
