# SPDX-License-Identifier: Apache-2.0
"""A module's per-example gradients are those of a loop of autograd over single examples, or the module is refused."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dpquant
from dpquant.engine import per_example
from dpquant.engine.context import twin_of
from dpquant.engine.group_norm import TapedGroupNorm
from dpquant.engine.per_example import RULES, differs, has_formula, unlike
from dpquant.errors import ModelError

COUNT = 4


def at_once(module, again, output):
    """Refuse a module at once whose output for an example alone is another one; a tape waits until the end."""
    if differs(again, output):
        raise unlike(module)


contributions_of = partial(per_example.contributions_of, compare=at_once)


def found_of(module, args, kwargs, contributions=contributions_of):
    output = module(*args, **kwargs).detach()
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    found = contributions(module, args, kwargs, output, grad)
    return {name: contribution.per_example() for name, contribution in found.items()}, grad


def one_by_one(module, args, kwargs, grad, shared=()):
    """The loop; tensors without an axis of examples are named by `shared`: their places, or keywords."""
    parameters = dict(module.named_parameters(recurse=False))
    rows = []
    for i in range(COUNT):
        mine = [a[[i]] if isinstance(a, torch.Tensor) and n not in shared else a for n, a in enumerate(args)]
        named = {k: v[[i]] if isinstance(v, torch.Tensor) and k not in shared else v for k, v in kwargs.items()}
        value = (module(*mine, **named) * grad[[i]]).sum()
        rows.append(torch.autograd.grad(value, list(parameters.values()), allow_unused=True))
    return {
        name: torch.stack([torch.zeros_like(p) if row[place] is None else row[place].to_dense() for row in rows])
        for place, (name, p) in enumerate(parameters.items())
    }


def assert_right(module, *args, shared=(), contributions=contributions_of, **kwargs):
    found, grad = found_of(module, args, kwargs, contributions)
    wanted = one_by_one(module, args, kwargs, grad, shared)
    assert found.keys() >= wanted.keys()
    for name, rows in wanted.items():
        torch.testing.assert_close(found[name], rows, rtol=1e-4, atol=1e-5)


def assert_refused(words, module, *args, **kwargs):
    with pytest.raises(ModelError, match=words):
        found_of(module, args, kwargs)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def floats(*shape):
    return torch.randn(COUNT, *shape)


def filled(module):
    """Weights and biases that a formula cannot leave out unseen."""
    for p in module.parameters():
        nn.init.normal_(p, 0.5)
    return module


# Closed formulas hold for exactly their types.

FORMULAS = {
    "group norm of maps": lambda: (nn.GroupNorm(2, 4), floats(4, 3, 3)),
    "group norm of vectors": lambda: (nn.GroupNorm(2, 4), floats(4)),
    "taped group norm": lambda: (twin_of(TapedGroupNorm, nn.GroupNorm(2, 4), tape=None), floats(4, 3)),
    "layer norm of vectors": lambda: (nn.LayerNorm(4), floats(4)),
    "layer norm of sequences": lambda: (nn.LayerNorm(4), floats(5, 4)),
    "layer norm of maps": lambda: (nn.LayerNorm([2, 3]), floats(5, 2, 3)),
    "layer norm without bias": lambda: (nn.LayerNorm(4, bias=False), floats(4)),
    "embedding": lambda: (nn.Embedding(6, 3), torch.randint(0, 6, (COUNT, 5))),
    "embedding, padded": lambda: (nn.Embedding(6, 3, padding_idx=2), torch.randint(0, 6, (COUNT, 5))),
    "embedding of one id": lambda: (nn.Embedding(6, 3), torch.randint(0, 6, (COUNT,))),
    "embedding of maps": lambda: (nn.Embedding(6, 3), torch.randint(0, 6, (COUNT, 2, 2))),
}


@pytest.mark.parametrize("make", FORMULAS.values(), ids=FORMULAS)
def test_closed_formulas_give_what_autograd_gives(make):
    module, x = make()
    assert has_formula(module)
    assert_right(filled(module), x)


def test_a_formula_is_used_where_the_input_is_given_by_name():
    assert_right(filled(nn.LayerNorm(4)), input=floats(4))
    assert_right(filled(nn.Embedding(6, 3)), input=torch.randint(0, 6, (COUNT, 5)))


class NormAct(nn.GroupNorm):
    def forward(self, x):
        return F.silu(super().forward(x))


class ChannelsLast(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class Scaled(nn.Embedding):
    def forward(self, ids):
        return 3 * super().forward(ids)


class Same(nn.LayerNorm):
    """A subclass without a forward of its own."""


SUBCLASSES = {
    "group norm": lambda: (NormAct(2, 4), floats(4, 3)),
    "layer norm": lambda: (ChannelsLast(4), floats(4, 5)),
    "embedding": lambda: (Scaled(6, 3), torch.randint(0, 6, (COUNT, 5))),
    "without a forward": lambda: (Same(4), floats(4)),
}


@pytest.mark.parametrize("make", SUBCLASSES.values(), ids=SUBCLASSES)
def test_subclasses_are_differentiated_as_they_are(make):
    module, x = make()
    assert not has_formula(module)
    assert_right(filled(module), x)


@pytest.mark.parametrize("name", ["group norm", "layer norm", "embedding"])
def test_a_formula_that_is_taken_for_subclasses_is_caught(name):
    module, x = SUBCLASSES[name]()
    inherited = partial(contributions_of, rules={type(module): RULES[type(module).__mro__[1]]})
    with pytest.raises((AssertionError, RuntimeError)):
        assert_right(filled(module), x, contributions=inherited)


def test_a_forward_of_the_instance_is_differentiated_as_it_is():
    norm = filled(nn.LayerNorm(4))
    norm.forward = lambda x: nn.LayerNorm.forward(norm, x).square()
    assert not has_formula(norm)
    assert_right(norm, floats(4))


# Modules without a formula.


class Pool(nn.Module):
    def __init__(self):
        super().__init__()
        self.query = nn.Parameter(torch.randn(4))

    def forward(self, x, mask=None, bias=None, scale=1.0):
        scores = scale * (x @ self.query)
        scores = scores if bias is None else scores + bias
        scores = scores if mask is None else scores.masked_fill(mask, -1e9)
        return (scores.softmax(1)[..., None] * x).sum(1)


class Mix(nn.Module):
    """Positions are mixed by weights that all examples share; some pairs are left out."""

    def __init__(self, positions=5):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(positions, positions))

    def forward(self, x, causal):
        return (self.weight * causal) @ x


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.unused = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(2))

    def forward(self, x, y, *, z):
        return x @ self.a + y["inner"][0] * z


class Number(nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        return self.factor * x


class Branching(nn.Module):
    """Control flow by values, which cannot be vectorised."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))

    def forward(self, x):
        return torch.stack([row * self.weight if float(row.sum()) > 0 else row + self.weight for row in x])


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))

    def forward(self, x):
        y = x * self.weight
        y += 1
        return y.relu_()


def padding():
    return torch.arange(5) >= torch.randint(1, 6, (COUNT, 1))


GENERAL = {
    "one tensor": lambda: (Pool(), (floats(5, 4),), {}),
    "a mask by keyword": lambda: (Pool(), (floats(5, 4),), {"mask": padding()}),
    "a mask by place": lambda: (Pool(), (floats(5, 4), padding()), {}),
    "several by keyword": lambda: (Pool(), (), {"x": floats(5, 4), "bias": floats(5), "mask": padding(), "scale": 2.0}),
    "a tensor in a tuple in a dict": lambda: (Two(), (floats(4), {"inner": (floats(3),)}), {"z": 2.0}),
    "one number": lambda: (Number(), (floats(3),), {}),
    "control flow": lambda: (Branching(), (floats(4),), {}),
    "in place": lambda: (InPlace(), (floats(4),), {}),
    "PReLU": lambda: (nn.PReLU(), (floats(3, 3),), {}),
    "Conv1d": lambda: (nn.Conv1d(2, 3, 3), (floats(2, 6),), {}),
    "Bilinear": lambda: (nn.Bilinear(3, 4, 2), (floats(3), floats(4)), {}),
    "RMSNorm": lambda: (nn.RMSNorm(4), (floats(5, 4),), {}),
}


@pytest.mark.parametrize("make", GENERAL.values(), ids=GENERAL)
def test_any_module_is_differentiated_with_all_that_it_was_called_with(make):
    module, args, kwargs = make()
    if "inner" in str(kwargs) or (len(args) > 1 and isinstance(args[1], dict)):
        found, grad = found_of(module, args, kwargs)
        wanted = torch.einsum("bi,bo->bio", args[0], grad)
        torch.testing.assert_close(found["a"], wanted)
        assert bool((found["unused"] == 0).all())
        return
    assert_right(module, *args, **kwargs)


def test_a_mask_that_all_examples_share_is_given_to_each():
    assert_right(Mix(), floats(5, 4), torch.ones(5, 5).tril(), shared=(1,))
    assert_right(Mix(), floats(5, 4), causal=torch.ones(5, 5).tril(), shared=("causal",))


def test_a_shared_mask_that_has_as_many_rows_as_there_are_examples_is_refused():
    assert_refused("another one", Mix(COUNT), floats(COUNT, 4), torch.ones(COUNT, COUNT).tril())


def without_keywords(module, args, kwargs, output, grad, **settings):
    """A plant: arguments given by keyword are forgotten."""
    return contributions_of(module, args, {}, output, grad, **settings)


def unchecked(module, again, output):
    """A plant: whatever a module gives for an example alone is right."""


def test_an_argument_that_is_forgotten_is_caught():
    mask = torch.arange(5) >= torch.tensor([[1], [2], [3], [4]])
    with pytest.raises(ModelError, match="gives another one"):
        assert_right(Pool(), floats(5, 4), mask=mask, contributions=without_keywords)
    assert_right(Pool(), floats(5, 4), mask=mask, contributions=partial(contributions_of, compare=unchecked))
    with pytest.raises(AssertionError):
        forgetful = partial(without_keywords, compare=unchecked)
        assert_right(Pool(), floats(5, 4), mask=mask, contributions=forgetful)


def evaluations(module, *args):
    """How often a module is called for its per-example gradients."""
    forward, calls = type(module).forward, []

    class Counted(type(module)):
        def forward(self, *args):
            calls.append(1)
            return forward(self, *args)

    module.__class__ = Counted
    output = module(*args).detach()
    calls.clear()
    contributions_of(module, args, {}, output, torch.ones_like(output))
    return len(calls)


def test_control_flow_is_evaluated_one_by_one():
    assert evaluations(Pool(), floats(5, 4)) == 1
    assert evaluations(Branching(), floats(4)) == 1 + COUNT  # vectorised in vain


# Refusals.


class State(Pool):
    """Takes a mask that somebody put on it."""

    mask = None

    def forward(self, x):
        return super().forward(x, self.mask)


class Coupled(InPlace):
    def forward(self, x):
        return super().forward(x - x.mean(0))


class Counting(InPlace):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x) + 1.0 * self.calls


class Whole(InPlace):
    """Runs on a whole batch only."""

    def forward(self, x):
        return super().forward(x.reshape(COUNT, 4))


class Flat(InPlace):
    """Its output's first axis is not the examples'."""

    def forward(self, x):
        return super().forward(x.flatten(0, 1))


class Repeated(InPlace):
    def forward(self, count):
        return super().forward(torch.ones(count, 4))


def test_a_state_that_was_put_on_a_module_is_refused_for_what_it_is():
    pool = State()
    pool.mask = torch.arange(5) >= torch.tensor([[1], [2], [3], [4]])
    assert_refused("State.*state that was put on it before the call|State.*cannot be evaluated one", pool, floats(5, 4))
    pool.mask = None
    assert_right(pool, floats(5, 4))


@pytest.mark.parametrize(
    ("words", "module", "shape"),
    [
        ("Coupled.*gives another one", Coupled, (4,)),
        ("Counting.*gives another one", Counting, (4,)),
        ("Whole.*one example at a time", Whole, (4,)),
        ("Flat", Flat, (3, 4)),
    ],
)
def test_a_module_that_depends_on_more_than_an_examples_arguments_is_refused(words, module, shape):
    assert_refused(words, module(), floats(*shape))


def test_a_module_that_is_called_without_the_batch_is_refused():
    assert_refused("first axis of a tensor", Repeated(), COUNT)


# Inside of a clipped sum.


def loss(model, batch):
    return F.cross_entropy(model(*batch[:-1]), batch[-1], reduction="none")


def clipped_sum(model, batch):
    return dpquant.clipped_sum(
        dpquant.prepare(model), loss, batch, max_grad_norm=0.1, record_ids=torch.arange(COUNT), step=0, seed=0
    ).grads


def assert_clipped_sum(model, batch, clipped_sum=clipped_sum):
    named = sorted(model.named_parameters())
    wanted = 0.0
    for i in range(COUNT):
        grads = torch.autograd.grad(loss(model, tuple(t[[i]] for t in batch)).sum(), [p for _, p in named])
        row = torch.cat([g.flatten() for g in grads])
        wanted = wanted + row * min(1.0, 0.1 / float(row.norm()))
    found = clipped_sum(model, batch)
    got = torch.cat([found[name].flatten() for name, _ in named])
    assert float((got - wanted).norm()) < 1e-4 * float(wanted.norm())


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.pool, self.head = Pool(), nn.Linear(4, 3)

    def forward(self, x, mask):
        return self.head(self.pool(x, mask=mask))


def with_hook(model):
    model.pool.register_forward_hook(lambda module, args, output: 2 * output)
    return model


def with_pre_hook(model):
    model.pool.register_forward_pre_hook(lambda module, args: (3 * args[0], *args[1:]))
    return model


@pytest.mark.parametrize("change", [lambda model: model, with_hook, with_pre_hook], ids=["plain", "hook", "pre-hook"])
def test_hooks_that_change_what_a_module_is_given_or_gives_are_part_of_the_function(change):
    assert_clipped_sum(change(Masked()), (floats(5, 4), padding(), torch.randint(0, 3, (COUNT,))))


def test_what_follows_may_write_into_a_modules_output():
    model = nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4), nn.ReLU(inplace=True), nn.PReLU(), nn.Linear(4, 3))
    assert_clipped_sum(model, (floats(6), torch.randint(0, 3, (COUNT,))))


def of_another_call(model, batch):
    """A plant: the pool's gradients are those of a call without its mask, of the right norm."""
    x, mask, targets = batch
    found, other = clipped_sum(model, batch), clipped_sum(model, (x, torch.zeros_like(mask), targets))
    query = "pool.query"
    return {**found, query: other[query] * found[query].norm() / other[query].norm()}


def test_a_gradient_of_another_call_is_caught():
    model, batch = Masked(), (floats(5, 4), padding(), torch.randint(0, 3, (COUNT,)))
    assert_clipped_sum(model, batch)
    with pytest.raises(AssertionError):
        assert_clipped_sum(model, batch, of_another_call)
