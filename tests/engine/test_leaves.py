# SPDX-License-Identifier: Apache-2.0
"""Parameters beside other layers, or used by another module: each gets autograd's gradient per example, or an error."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import default_collate

import dpquant
from dpquant.checks.isolation import check_isolation
from dpquant.checks.synthetic import from_examples
from dpquant.engine.batches import Microbatch, take_rows
from dpquant.engine.clip import step_key
from dpquant.engine.grid_sum import grid_sum_of
from dpquant.engine.layers import ROUTES, quantizable_layers
from dpquant.engine.leaves import Leaves, Routes, forms_of, leaf_of
from dpquant.engine.passes import Objective
from dpquant.errors import ModelError
from networks import loss

B, T, D, C = 5, 4, 6, 0.4


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class Body(nn.Module):
    """Layers around which parameters lie: tokens (B, T, D) become five classes."""

    def __init__(self):
        super().__init__()
        self.into, self.head = nn.Linear(3, D), nn.Linear(D, 5)

    def forward(self, x):
        return self.head(torch.tanh(self.between(torch.tanh(self.into(x)))).mean(1))


class Tokens(Body):
    """As vision transformers have them, torchvision's with `expand`, timm's with a sum of broadcast positions."""

    def __init__(self):
        super().__init__()
        self.class_token = nn.Parameter(torch.randn(1, 1, D))
        self.positions = nn.Parameter(torch.randn(1, T + 1, D))
        self.dropout = nn.Dropout(0.3)

    def between(self, x):
        return self.dropout(torch.cat([self.class_token.expand(len(x), -1, -1), x], 1) + self.positions)


class Positions(Body):
    """Positions without an axis of examples, and a gate that is one number and zero."""

    def __init__(self):
        super().__init__()
        self.positions, self.gate = nn.Parameter(torch.randn(T, D)), nn.Parameter(torch.zeros(()))

    def between(self, x):
        return x + self.positions * (1 + self.gate)


class Scale(Body):
    """LayerScale, of so small values that a gradient passes hardly."""

    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((D,), 1e-6))
        self.inner = nn.Linear(D, D)

    def between(self, x):
        return x + self.gamma * self.inner(x)


class Maps(nn.Module):
    """A scale (C, 1, 1) of maps, as torchvision's ConvNeXt has it."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 4, 3), nn.Linear(4, 5)
        self.layer_scale = nn.Parameter(torch.randn(4, 1, 1))

    def forward(self, x):
        return self.head(torch.tanh(self.layer_scale * self.conv(x)).mean((2, 3)))


class Listed(Body):
    """Queries in a list of parameters, which is not called, and a table of positions that is not either."""

    def __init__(self):
        super().__init__()
        self.queries = nn.ParameterList([torch.randn(D) for _ in range(2)])
        self.table = nn.Embedding(T, D)

    def between(self, x):
        attended = [torch.softmax((x * query.unsqueeze(-2)).sum(-1), -1)[..., None] * x for query in self.queries]
        return sum(attended) + self.table.weight


class Windows(nn.Module):
    """As Swin's attention: uses a layer's weight without a call, and has a table of its own. It calls another layer."""

    def __init__(self, dim=D):
        super().__init__()
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.bias = nn.Parameter(torch.randn(T, T))

    def forward(self, x):
        q, k, v = F.linear(x, self.qkv.weight, self.qkv.bias).chunk(3, -1)
        return self.proj(torch.softmax(q @ k.mT + self.bias, -1) @ v)


class Swin(Body):
    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(Windows(), Windows())

    def between(self, x):
        return x + self.blocks(x)


class Relative(Body):
    """Attention with a table of relative positions that is looked up once for all examples, as T5 has."""

    def __init__(self):
        super().__init__()
        self.bias, self.key = nn.Embedding(2 * T - 1, 2), nn.Linear(D, 2 * D)
        places = torch.arange(T)
        self.register_buffer("distances", places[None] - places[:, None] + T - 1)

    def between(self, x):
        bias = self.bias(self.distances).permute([2, 0, 1]).unsqueeze(0)
        key = self.key(x).unflatten(2, (2, D)).transpose(1, 2)
        return (self.scores(key, bias).softmax(-1) @ key).sum(1)

    def scores(self, key, bias):
        scores = key @ key.mT
        scores += bias[:, :, -T:, :] * 1.5
        return scores


class Expanded(Relative):
    """The same as MPNet has it: one table for each example before it meets the scores."""

    def scores(self, key, bias):
        assert bias.shape == (1, 2, T, T) and bias.size(1) == 2 and len(bias) == 1
        return key @ key.mT + bias.expand((len(key), -1, T, T)).contiguous()


def tokens():
    return torch.randn(B, T, 3), torch.randint(0, 5, (B,))


def maps():
    return torch.randn(B, 1, 6, 6), torch.randint(0, 5, (B,))


MODELS = {
    "class token and positions": (Tokens, tokens),
    "positions and a gate": (Positions, tokens),
    "layer scale": (Scale, tokens),
    "scale of maps": (Maps, maps),
    "parameters that no call reaches": (Listed, tokens),
    "layers that are not called": (Swin, tokens),
    "relative positions": (Relative, tokens),
    "relative positions, expanded": (Expanded, tokens),
}


def by_loop(model, batch):
    """The clipped sum, by autograd, one example at a time."""
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    total = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in trainable.items()}
    for i in range(B):
        grads = torch.autograd.grad(loss(model, take_rows(batch, slice(i, i + 1))).sum(), list(trainable.values()))
        norm = torch.stack([g.double().norm() for g in grads]).norm()
        for name, g in zip(trainable, grads, strict=True):
            total[name] += g.double() * min(1.0, C / float(norm))
    return total


def summed(model, batch, rows=None, **options):
    rows = torch.arange(B) if rows is None else torch.tensor(rows)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of modules that are evaluated alone
        out = dpquant.clipped_sum(
            model, loss, take_rows(batch, rows), max_grad_norm=C, record_ids=rows, step=0, seed=0, microbatch_size=3,
            **options,
        )  # fmt: skip
    return out.grads


def gap(found, wanted):
    """Relative distance of two sums."""
    assert found.keys() == wanted.keys()
    squares = sum(float((found[name].double() - wanted[name].double()).square().sum()) for name in wanted)
    return (squares / sum(float(w.double().square().sum()) for w in wanted.values())) ** 0.5


def made(name):
    kind, batch = MODELS[name]
    return kind().eval(), batch()


@pytest.mark.parametrize("name", MODELS)
def test_the_sum_is_that_of_a_loop_over_single_examples(name):
    model, batch = made(name)
    wanted = by_loop(copy.deepcopy(model), batch)
    model = dpquant.prepare(model, backend="simulate")
    assert gap(summed(model, batch), wanted) < 1e-4
    assert gap(summed(model, batch), wanted) < 1e-4  # with what the first call has learnt


@pytest.mark.parametrize("name", MODELS)
def test_quantized_the_batch_is_the_sum_of_its_examples_and_each_is_at_most_c(name):
    model, batch = made(name)
    model = dpquant.prepare(model, format="int8", backend="simulate")
    summed(model, batch)  # layers that are never called become plain
    dpquant.set_policy(model, [*quantizable_layers(model)])
    alone = [summed(model, batch, [i]) for i in range(B)]
    norms = [sum(float(g.double().square().sum()) for g in one.values()) ** 0.5 for one in alone]
    assert min(norms) > 0 and max(norms) <= C
    assert gap(summed(model, batch), {key: sum(one[key] for one in alone) for key in alone[0]}) < 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_the_check_on_synthetic_records_accepts_it(name):
    model, (x, _) = made(name)
    model = dpquant.prepare(model.train(), backend="simulate")
    records = [(x[i], torch.tensor(i)) for i in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        check_isolation(Objective(model, loss), [from_examples(records, default_collate, torch.device("cpu"))])
    assert model.training


def test_parameters_and_modes_are_as_they_were():
    model, batch = made("class token and positions")
    model = dpquant.prepare(model.train(), backend="simulate")
    before = {name: p.clone() for name, p in model.named_parameters()}
    own = dict(model.named_parameters())
    summed(model, batch)
    assert model.training and all(p is own[name] and p.requires_grad for name, p in model.named_parameters())
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())


def test_a_leaf_is_taken_out_after_an_error():
    model = Tokens()
    with pytest.raises(ZeroDivisionError), Leaves.placed(model, {"class_token": -1}, 3):
        assert model.class_token.shape == (3, 1, D)
        raise ZeroDivisionError
    assert isinstance(model.class_token, nn.Parameter) and model.class_token.shape == (1, 1, D)


@pytest.mark.parametrize("shape", [(), (6,), (1, 6), (4, 6), (1, 4, 6)])
def test_every_form_holds_one_copy_for_each_example(shape):
    p = torch.randn(shape)
    for form in forms_of(shape):
        leaf = leaf_of(p, form, 3)
        assert leaf.is_leaf and leaf.requires_grad and len(leaf) == 3
        assert all(torch.equal(row.reshape(shape), p) for row in leaf)


def test_integers_of_a_grid_are_those_of_single_examples():
    model, batch = made("class token and positions")
    model = dpquant.prepare(model, backend="simulate")
    summed(model, batch)

    def integers(rows):
        rows = torch.tensor(rows)
        pieces = [Microbatch(take_rows(batch, rows[i : i + 1]), rows[i : i + 1], 1) for i in range(len(rows))]
        out = grid_sum_of(Objective(model, loss), pieces, max_grad_norm=C, grid=C / 2**20, key=step_key(0, 0))
        return out.grads

    every, first, rest = integers([0, 1, 2]), integers([0]), integers([1, 2])
    assert all(torch.equal(every[name], first[name] + rest[name]) for name in every)
    assert gap({name: g * C / 2**20 for name, g in integers([*range(B)]).items()}, by_loop(model, batch)) < 1e-3


# What has no right form is refused.


class Indexed(Body):
    """Takes the first of the copies for all examples."""

    def __init__(self):
        super().__init__()
        self.positions = nn.Parameter(torch.randn(1, T, D))

    def between(self, x):
        return x + self.positions[0]


class Coupled(Body):
    """A parameter that couples the examples."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(D))

    def between(self, x):
        return x + (self.scale * x).mean(0)


class Filter(Body):
    """A convolution on a parameter, in the module that is the whole model."""

    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(D, D, 1))

    def between(self, x):
        return F.conv1d(x.mT, self.kernel).mT


@pytest.mark.parametrize("kind", [Indexed, Coupled, Filter])
def test_what_has_no_copy_for_each_example_is_refused(kind):
    model = dpquant.prepare(kind(), backend="simulate")
    with pytest.raises(ModelError, match=r"requires_grad_\(False\)"):
        summed(model, tokens())


def test_a_wrong_form_would_be_off_and_the_check_would_see_it():
    model, (x, y) = Indexed(), tokens()
    wanted = by_loop(copy.deepcopy(model), (x, y))
    model = dpquant.prepare(model, backend="simulate")
    Routes(leaves={"positions": -1}).keep(model)
    assert gap(summed(model, (x, y)), wanted) > 0.01
    records = [(x[i], torch.tensor(i)) for i in range(3)]
    with pytest.raises(ModelError):
        check_isolation(Objective(model, loss), [from_examples(records, default_collate, torch.device("cpu"))])


def test_a_parameter_that_is_not_used_is_named_with_a_way_out():
    model = dpquant.prepare(Tokens(), backend="simulate")
    model.mask_token = nn.Parameter(torch.zeros(1, 1, D))
    with pytest.raises(ModelError, match=r'model.get_parameter\("mask_token"\).requires_grad_\(False\)'):
        summed(model, tokens())
    model.get_parameter("mask_token").requires_grad_(False)
    assert "mask_token" not in summed(model, tokens())


def test_layers_that_are_not_called_are_not_quantized_and_this_is_said():
    model = dpquant.prepare(Swin(), backend="simulate")
    dpquant.set_policy(model, [*quantizable_layers(model)])
    with pytest.warns(UserWarning, match="2 modules .Windows; the first is blocks.0"):
        dpquant.clipped_sum(
            model, loss, tokens(), max_grad_norm=C, record_ids=torch.arange(B), step=0, seed=0, microbatch_size=B
        )
    assert [*quantizable_layers(model)] == ["into", "head"]
    assert all(layer.quantized for layer in quantizable_layers(model).values())


def test_a_new_preparation_forgets_what_was_learnt_and_a_copy_keeps_it():
    model = dpquant.prepare(Swin(), backend="simulate")
    summed(model, tokens())
    assert Routes.of(copy.deepcopy(model)).alone == ["blocks.0", "blocks.1"]
    dpquant.prepare(model, backend="simulate")
    assert not hasattr(model, ROUTES) and len(quantizable_layers(model)) == 6
    batch = tokens()
    assert gap(summed(model, batch), by_loop(copy.deepcopy(dpquant.restore(model)), batch)) < 1e-4
    assert not hasattr(model, ROUTES)


# What a module is called with once for all examples


class Embedded(Body):
    """Position ids of shape (1, T), as BERT's and GPT-2's; coordinates that a linear layer embeds."""

    def __init__(self):
        super().__init__()
        self.table, self.embed, self.norm = nn.Embedding(T, D), nn.Linear(2, D), nn.LayerNorm(D)
        self.register_buffer("ids", torch.arange(T)[None])
        self.register_buffer("grid", torch.randn(1, T, 2))

    def between(self, x):
        return x + self.norm(self.table(self.ids)) + self.embed(self.grid)


@pytest.mark.parametrize("chosen", [False, True])
def test_what_is_given_once_for_all_examples_is_repeated_for_each(chosen):
    model, batch = Embedded(), tokens()
    wanted = by_loop(copy.deepcopy(model), batch)
    model = dpquant.prepare(model, format="int8", backend="simulate")
    if chosen:
        dpquant.set_policy(model, ["embed"])
    found = summed(model, batch)
    assert gap(found, wanted) < (0.02 if chosen else 1e-4)
    alone = [summed(model, batch, [i]) for i in range(B)]
    assert gap(found, {key: sum(one[key] for one in alone) for key in alone[0]}) < 1e-5


class Folded(Body):
    """One row of all examples' tokens: what is computed from records is not repeated."""

    def between(self, x):
        self.seen = x.flatten(0, 1)[None]
        return self.inner(self.seen).unflatten(1, x.shape[:2])[0]

    def __init__(self):
        super().__init__()
        self.inner = nn.LayerNorm(D)


def test_activations_are_not_repeated():
    with pytest.raises(ModelError, match="first axis"):
        summed(dpquant.prepare(Folded(), backend="simulate"), tokens())
