# SPDX-License-Identifier: Apache-2.0
"""Modules called with the examples elsewhere than on the first axis, or nowhere, or that return several tensors."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tests.engine.test_leaves import B, C, D, T, by_loop
from tests.engine.test_leaves import Body as Layers
from torch import nn
from torch.utils.data import default_collate

import dpquant
from dpquant.checks.isolation import check_isolation
from dpquant.checks.synthetic import candidates
from dpquant.engine.arrangement import ARRANGEMENTS, arrangement_of, can_be, examples_first, put_back
from dpquant.engine.context import StepContext
from dpquant.engine.layers import ROUTES, count_macs
from dpquant.engine.leaves import Routes
from dpquant.engine.one_after_another import one_after_another
from dpquant.engine.passes import Objective
from dpquant.errors import ModelError
from dpquant.formats import precision
from networks import loss


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class Body(Layers):
    """Has something to be called between its layers."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, D), nn.Tanh())


class Flat(Body):
    """All positions in one axis, as OPT has them."""

    def between(self, x):
        return self.inner(x.reshape(-1, D)).view(x.shape)


class Second(Body):
    """Sequences first, as Longformer and `nn.Transformer` have them."""

    def between(self, x):
        return self.inner(x.transpose(0, 1)).transpose(0, 1)


class Both(Body):
    """A layer that is called in two ways."""

    def between(self, x):
        return self.inner(x.transpose(0, 1)).transpose(0, 1) + self.inner(x)


class PositionsOutside(Body):
    """All positions in one axis, those of a position next to each other."""

    def between(self, x):
        return self.inner(x.transpose(0, 1).reshape(-1, D)).view(T, -1, D).transpose(0, 1)


class Words(nn.Module):
    """Ids of all examples in one axis."""

    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(7, D), nn.Linear(D, 5)

    def forward(self, ids):
        return self.head(self.words(ids.flatten()).view(*ids.shape, D)).mean(1)


class Scaled(nn.Module):
    """A norm of a library's own, which has no formula."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(D))

    def forward(self, x):
        return self.weight * x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt()


class Own(Flat):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(Scaled(), nn.Linear(D, D))


class Router(nn.Module):
    """Chooses an expert for every token; returns a tuple."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, D))

    def forward(self, x):
        scores = F.linear(x, self.weight).softmax(-1)
        return scores.max(-1).values, scores.argmax(-1)


class Experts(nn.Module):
    """Each token is given to its expert: what is computed depends on the data."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, D, D))

    def forward(self, x, shares, chosen):
        y = torch.zeros_like(x)
        for expert in chosen.unique().tolist():
            rows = torch.where(chosen == expert)[0]
            y[rows] = (x[rows] @ self.weight[expert]) * shares[rows, None]
        return y


class Mixture(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.experts, self.out = Router(), Experts(), nn.Linear(D, D)

    def forward(self, x):
        tokens = x.reshape(-1, D)
        return self.out(self.experts(tokens, *self.gate(tokens))).view(x.shape)


class OfExperts(Body):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(Mixture(), Mixture())

    def between(self, x):
        return self.inner(x)


class Attention(nn.Module):
    """Uses its layer's weight without calling it, with a bias of its own, and also returns what it has attended to."""

    def __init__(self):
        super().__init__()
        self.query, self.bias = nn.Linear(D, D, bias=False), nn.Parameter(torch.randn(D))

    def forward(self, x):
        shares = (F.linear(x, self.query.weight, self.bias) @ x.transpose(1, 2)).softmax(-1)
        return {"y": shares @ x, "shares": shares}


class WithShares(Body):
    """Takes both tensors of the attention, or one."""

    def __init__(self, both):
        super().__init__()
        self.inner, self.both = Attention(), both

    def between(self, x):
        found = self.inner(x)
        return found["y"] + found["shares"][..., :1] if self.both else found["y"]


class Table(nn.Embedding):
    """Positions as BART has them: a class of its own, called with a length, whose output is the same for all."""

    def forward(self, length, lead):
        found = super().forward(torch.arange(length) + 1)
        return found[None] if lead else found


class Placed(Body):
    def __init__(self, lead):
        super().__init__()
        self.inner, self.lead = Table(T + 1, D), lead

    def between(self, x):
        return x + self.inner(x.shape[1], self.lead)


def tokens(count=B):
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, T, 3, generator=generator), torch.arange(count) % 5


def words(count=B):
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 7, (count, T), generator=generator), torch.arange(count) % 5


def summed(model, batch, rows=None, **settings):
    rows = torch.arange(len(batch[1])) if rows is None else torch.tensor(rows)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*one example at a time.*")
        found = dpquant.clipped_sum(
            model,
            loss,
            tuple(part[rows] for part in batch),
            max_grad_norm=C,
            record_ids=rows,
            step=0,
            seed=0,
            **settings,
        ).grads
    return flat(found)


def flat(grads):
    return torch.cat([grads[name].double().flatten() for name in sorted(grads)])


MODELS = {
    "flat": (Flat, tokens),
    "sequences first": (Second, tokens),
    "flat ids": (Words, words),
    "flat, without a formula": (Own, tokens),
    "experts": (OfExperts, tokens),
    "two tensors": (lambda: WithShares(True), tokens),
    "two tensors, of which one is used": (lambda: WithShares(False), tokens),
    "positions of all": (lambda: Placed(False), tokens),
    "positions of all, with an axis": (lambda: Placed(True), tokens),
}


@pytest.mark.parametrize(("make", "data"), MODELS.values(), ids=MODELS)
def test_the_sum_is_that_of_a_loop_whatever_the_microbatch(make, data):
    model = make()
    wanted, model = flat(by_loop(model, data())), dpquant.prepare(model, backend="simulate")
    for size in (B, 3, 8, T):  # eight: the last rows are padding; four: as many examples as positions
        found = summed(model, data(), microbatch_size=size)
        assert (found - wanted).norm() <= 1e-4 * wanted.norm(), size


@pytest.mark.parametrize("format", ["int8", "luq-fp4"])
@pytest.mark.parametrize(("make", "data"), MODELS.values(), ids=MODELS)
def test_quantized_the_batch_is_the_sum_of_its_examples(make, data, format):
    model = dpquant.prepare(make(), format=format, backend="simulate")
    summed(model, data())
    dpquant.set_policy(model, dpquant.quantizable_layers(model))
    parts = [summed(model, data(), [row]) for row in range(B)]
    assert max(part.norm() for part in parts) <= C
    assert (sum(parts) - summed(model, data())).norm() <= 1e-5


@pytest.mark.parametrize("make", [Flat, Second])
def test_scales_and_draws_of_a_frozen_layer_are_an_examples_own(make):
    """What it is called with is found out though it has no gradient; else its draws would be those of other rows."""
    model = make()
    model.inner.requires_grad_(False)
    model = dpquant.prepare(model, format="luq-fp4", backend="simulate")
    dpquant.set_policy(model, ["inner.1"])
    parts = [summed(model, tokens(), [row]) for row in range(B)]
    assert (sum(parts) - summed(model, tokens())).norm() <= 1e-5


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("make", [Flat, Second])
def test_the_isolation_check_accepts_them_quantized_trained_or_frozen(make, frozen):
    model = make()
    if frozen:
        model.inner.requires_grad_(False)
    assert checked(model, quantized=True).macs["into"] == T * 3 * D


@pytest.mark.parametrize("seed", range(4))
def test_what_experts_compute_of_an_example_follows_no_other_in_the_last_bit(seed):
    """Products of the rows of all examples together would round in another way among other batchmates."""
    torch.manual_seed(seed)
    assert checked(OfExperts(), quantized=True).macs["into"] == T * 3 * D


def test_what_experts_are_given_is_one_example_after_another():
    model = dpquant.prepare(OfExperts(), backend="simulate")
    summed(model, tokens())
    assert Routes.of(model).alone == Routes.of(model).separate == ["inner.0", "inner.1"]
    counting, run, x = Counting(), StepContext(key=0, record_ids=torch.arange(B)), torch.zeros(B, T)
    assert counting(x)["rows"].unique().tolist() == [B]
    with one_after_another([counting], run):
        found = counting(x, scale=torch.ones(T))
    assert found["rows"].shape == x.shape and found["rows"].unique().tolist() == [1] and found["count"] == 1
    assert "forward" not in counting.__dict__ and counting(x)["count"] == B


class Counting(nn.Module):
    """Gives the number of rows that it was called with, as a row of each and beside them."""

    def forward(self, x, scale=1.0):
        return {"rows": (x + len(x)) * scale, "count": len(x)}


def checked(model, *, quantized):
    chosen = precision("luq-fp4")
    objective = Objective(dpquant.prepare(model, format=chosen, backend="simulate"), loss)
    records = candidates([(torch.zeros(T, 3), torch.tensor(0))], default_collate, torch.device("cpu"))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*one example at a time.*")
        return check_isolation(objective, records, quantized=[chosen] if quantized else ())


def test_their_work_is_that_of_one_example():
    model = dpquant.prepare(Flat(), backend="simulate")
    summed(model, tokens())
    work = count_macs(model, lambda: model(tokens(3)[0]), 3)
    assert work == {"into": T * 3 * D, "head": D * 5, "inner.1": T * D * D}
    assert Routes.of(model).arranged == {"inner.0": "flat", "inner.1": "flat"}


@pytest.mark.parametrize("make", [Both, PositionsOutside])
def test_what_is_in_no_arrangement_is_refused(make):
    with pytest.raises(ModelError, match="examples first"):
        summed(dpquant.prepare(make(), backend="simulate"), tokens())


def test_a_wrong_arrangement_gives_another_sum():
    """So the tests above would see it."""
    model = dpquant.prepare(Second(), backend="simulate")
    summed(model, tokens(), microbatch_size=B)
    wanted = summed(model, tokens(T), microbatch_size=T)
    model.__dict__[ROUTES].arranged = {}
    assert (summed(model, tokens(T), microbatch_size=T) - wanted).norm() > 1e-2 * wanted.norm()


@given(
    st.sampled_from(ARRANGEMENTS), st.integers(2, 4), st.integers(2, 5), st.integers(0, 2**31), st.booleans()
)  # fmt: skip
def test_an_arrangement_is_told_from_whose_loss_depends_on_what(arrangement, rows, positions, seed, is_mixed):
    generator = torch.Generator().manual_seed(seed)
    own = torch.rand(rows, positions, 3, generator=generator) + 0.1
    gradients = []
    for row in range(rows):
        g = torch.zeros(rows, positions, 3)
        g[row] = own[row]
        if is_mixed:
            g[(row + 1) % rows] = 1e-9  # a trace of another example
        gradients.append(put_back(g, arrangement))
    assert arrangement_of(gradients) == (None if is_mixed else arrangement)
    assert can_be(gradients[0], arrangement, rows)
    assert torch.equal(put_back(examples_first(gradients[0], arrangement, rows), arrangement), gradients[0])


def test_without_any_gradient_nothing_is_told():
    assert arrangement_of([None, None]) is None and arrangement_of([torch.zeros(4, 2), None]) is None
