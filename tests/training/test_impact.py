# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dpquant.engine.batches import Microbatch, microbatches
from dpquant.engine.context import StepContext
from dpquant.engine.layers import current_precisions, prepare, quantizable_layers, running, set_policy
from dpquant.engine.passes import Objective
from dpquant.engine.randomness import Drawing
from dpquant.errors import SettingError
from dpquant.rounding import derive_key
from dpquant.training.impact import analysis_keys, gradient_impact_vectors, impact_sum, impact_vectors
from networks import loss, zoo

NAMES = ("strided", "residual", "grouped", "reused", "tokens")


def prepared(name):
    model, batch = zoo()[name]
    return prepare(model), batch


def measured(model, batch, rows=None, *, max_norm=0.05, repeats=1, microbatch_size=64, drawing=None, **settings):
    rows = torch.arange(len(batch[1])) if rows is None else torch.as_tensor(rows, dtype=torch.int64)
    part = tuple(t[rows] for t in batch)
    names = list(quantizable_layers(model))
    pieces = microbatches(part, rows, microbatch_size)
    keys = analysis_keys(1, 2, repeats)
    arguments = {"names": names, "max_norm": max_norm, "keys": keys, **settings}
    out = impact_sum(Objective(model, loss, drawing or Drawing()), pieces, **arguments)
    assert out.sensitivity == max_norm
    return out.impacts


def brute_force(model, batch, max_norm, repeats):
    """One full forward pass for every policy and repeat, none of them sharing anything."""
    names, ids = list(quantizable_layers(model)), torch.arange(len(batch[1]))
    model.eval()

    def losses(repeat, policy):
        set_policy(model, policy)
        with running(model, StepContext(key=derive_key(1, "analysis", 2, repeat), record_ids=ids)), torch.no_grad():
            return loss(model, batch).double()

    full = losses(0, ())
    v = torch.stack([sum(losses(r, (n,)) - full for r in range(repeats)) / repeats for n in names], 1)
    set_policy(model, ())
    model.train()
    return (v * (max_norm / v.norm(dim=1)).clamp(max=1)[:, None]).sum(0), v


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("max_norm", "repeats"), [(1e-3, 1), (0.05, 3), (1e3, 1)])
def test_the_sum_is_that_of_full_forward_passes(name, max_norm, repeats):
    model, batch = prepared(name)
    expected, _ = brute_force(model, batch, max_norm, repeats)
    for size in (256, 2):
        ours = measured(model, batch, max_norm=max_norm, repeats=repeats, microbatch_size=size)
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


PRODUCTS = torch.ops.aten.convolution, torch.ops.aten.mm, torch.ops.aten.addmm


class Products(TorchDispatchMode):
    """Counts the layers' products that are computed, which are in float32."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in PRODUCTS and args[1].dtype == torch.float32
        return func(*args, **(kwargs or {}))


def test_what_comes_before_the_quantized_layer_is_not_computed_again():
    model, batch = zoo()["residual"]
    model = prepare(model, backend="simulate")
    with Products() as computed:
        measured(model, batch)
    assert computed.count == 3 + (3 + 2 + 1)  # the full-precision pass, then each policy from its layer on


def gradients_one_by_one(model, batch, repeat, policy):
    """Each example's gradient as one long vector, by autograd on that example alone."""
    set_policy(model, policy)
    model.eval()
    rows = []
    for i in range(len(batch[1])):
        run = StepContext(key=derive_key(1, "analysis", 2, repeat), record_ids=torch.tensor([i]))
        with running(model, run):
            grads = torch.autograd.grad(loss(model, tuple(t[[i]] for t in batch)).sum(), list(model.parameters()))
        rows.append(torch.cat([grad.flatten() for grad in grads]))
    set_policy(model, ())
    model.train()
    return torch.stack(rows).double()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("repeats", [1, 2])
def test_the_gradients_score_is_one_minus_the_cosine_of_gradients_taken_one_by_one(name, repeats):
    model, batch = prepared(name)
    names, ids = list(quantizable_layers(model)), torch.arange(len(batch[1]))
    piece = Microbatch(batch, ids, len(ids))
    found = gradient_impact_vectors(Objective(model, loss), piece, names, analysis_keys(1, 2, repeats))
    full = gradients_one_by_one(model, batch, 0, ())
    quantized = [[gradients_one_by_one(model, batch, r, (n,)) for r in range(repeats)] for n in names]
    cosines = [sum(nn.functional.cosine_similarity(full, one) for one in draws) / repeats for draws in quantized]
    torch.testing.assert_close(found, 1 - torch.stack(cosines, 1), rtol=1e-3, atol=1e-5)
    assert (found.abs() <= 2).all() and (found > 1e-4).any()


def test_the_gradients_score_sees_a_backward_product_that_the_loss_cannot():
    model, batch = zoo()["residual"]
    model = prepare(model, format="full/full/luq-fp4")
    names, ids = list(quantizable_layers(model)), torch.arange(len(batch[1]))
    arguments = Objective(model, loss), Microbatch(batch, ids, len(ids)), names, analysis_keys(0, 0)
    assert impact_vectors(*arguments).abs().max() == 0
    assert gradient_impact_vectors(*arguments).min() > 0


def assert_bounded(summed, count, max_norm):
    """Removing any record moves the sum by at most the sensitivity; an empty sum is zero."""
    whole = summed(range(count))
    for i in range(count):
        assert (whole - summed([j for j in range(count) if j != i])).norm() <= max_norm * (1 + 1e-6)
    assert summed([]).abs().max() == 0


@pytest.mark.parametrize("score", ["loss", "gradient"])
def test_one_record_moves_the_sum_by_at_most_its_sensitivity(score):
    model, batch = prepared("strided")
    batch[0][2] *= 50
    assert_bounded(lambda rows: measured(model, batch, rows, score=score), 6, 0.05)


def test_clipping_the_aggregate_as_the_paper_writes_it_is_caught():
    v = torch.tensor([[1.0, 0.0], [-3.0, 0.0]], dtype=torch.float64)

    def aggregate(rows):
        total = v[list(rows)].sum(0)
        return total * min(1.0, 1.0 / max(total.norm().item(), 1e-12))

    with pytest.raises(AssertionError):
        assert_bounded(aggregate, 2, 1.0)


def test_dividing_by_the_realised_number_is_caught():
    with pytest.raises(AssertionError):
        assert_bounded(lambda rows: torch.tensor([5.0 if 0 in rows else 0.0]) / max(len(list(rows)), 1), 2, 1.0)


@pytest.mark.parametrize("score", ["loss", "gradient"])
def test_an_example_that_is_not_finite_contributes_nothing(score):
    model, batch = prepared("residual")
    rest = measured(model, batch, [0, 1, 3], score=score)
    batch[0][2] = float("nan")
    torch.testing.assert_close(measured(model, batch, [0, 1, 2, 3], score=score), rest)


@pytest.mark.parametrize("score", ["loss", "gradient"])
def test_an_example_on_which_the_loss_raises_contributes_nothing(score):
    model, batch = prepared("strided")
    rest = measured(model, batch, [0, 1, 3], score=score)
    batch[1][2] = 99
    torch.testing.assert_close(measured(model, batch, [0, 1, 2, 3], score=score), rest)


class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.drop, self.head = nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 5)
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x):
        return self.head(self.drop(self.first(x)))


def state_of(model):
    return (
        [t.clone() for t in model.state_dict().values()],
        [m.training for m in model.modules()],
        current_precisions(model),
        torch.random.get_rng_state(),
    )


def assert_same_state(before, after):
    assert all(torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True))
    assert before[1:3] == after[1:3] and torch.equal(before[3], after[3])


@pytest.mark.parametrize("score", ["loss", "gradient"])
def test_everything_else_is_left_bitwise_as_it_was(score):
    model, batch = prepare(Dropping()), (torch.randn(4, 6), torch.tensor([0, 1, 2, 3]))
    model.drop.eval()
    set_policy(model, ["head"])
    before = state_of(model)
    measured(model, batch, score=score)
    assert_same_state(before, state_of(model))
    with pytest.raises(SettingError):
        objective = Objective(model, lambda m, b: loss(m, b).mean())
        impact_sum(objective, [Microbatch(batch, torch.arange(4), 4)], names=["head"], max_norm=1.0, keys=[0])
    assert_same_state(before, state_of(model))


class Noisy(Dropping):
    """Draws random numbers in evaluation mode too, some for each example and some for all."""

    def forward(self, x):
        x = self.first(x)
        return self.head(x + torch.rand_like(x) + torch.rand(8))


def noisy_model_and_batch():
    torch.manual_seed(0)
    return prepare(Noisy()), (torch.randn(6, 6), torch.arange(6) % 5)


@pytest.mark.parametrize("score", ["loss", "gradient"])
def test_a_model_that_draws_random_numbers_disturbs_no_global_stream(score):
    model, batch = noisy_model_and_batch()
    before = state_of(model)
    measured(model, batch, score=score)
    assert_same_state(before, state_of(model))


@pytest.mark.parametrize("score", ["loss", "gradient"])
def test_a_measurement_that_moves_the_global_stream_would_be_caught(score):
    model, batch = noisy_model_and_batch()
    before = state_of(model)
    measured(model, batch, score=score)
    torch.rand(1)  # as a measurement that leaves the stream moved
    with pytest.raises(AssertionError):
        assert_same_state(before, state_of(model))


class ByPlace(Drawing):
    """Leaves draws to the global stream, which gives them by place."""

    def by_record(self, compute, key, record_ids):
        return compute()


def assert_impacts_follow_the_record(score, drawing=Drawing):
    """A record that is left out moves no other's draws, although the others stand at other places."""
    model, batch = noisy_model_and_batch()
    alone = [measured(model, batch, [i], score=score, microbatch_size=5, drawing=drawing()) for i in range(6)]
    for rows in (range(6), [1, 2, 3, 4, 5], [5, 0, 3]):
        whole = measured(model, batch, rows, score=score, microbatch_size=5, drawing=drawing())
        torch.testing.assert_close(whole, sum(alone[i] for i in rows), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("score", ["loss", "gradient"])
def test_what_a_model_draws_follows_the_record(score):
    assert_impacts_follow_the_record(score)


@pytest.mark.parametrize("score", ["loss", "gradient"])
def test_draws_that_follow_the_place_would_be_caught(score):
    with pytest.raises(AssertionError):
        assert_impacts_follow_the_record(score, ByPlace)


@pytest.mark.parametrize("settings", [{"max_norm": 0.0}, {"max_norm": float("inf")}, {"repeats": 0}, {"names": ["x"]}])
def test_bad_arguments_are_refused(settings):
    model, batch = prepared("strided")
    with pytest.raises(SettingError):
        measured(model, batch, **settings)
