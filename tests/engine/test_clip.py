# SPDX-License-Identifier: Apache-2.0
import copy
import dataclasses
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from opacus import GradSampleModule
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from convolutions import convolutions
from dpquant.backends.doubles import BlocksOfExamples, SharedScale, Wrapped
from dpquant.backends.geometry import Geometry
from dpquant.backends.qtensor import QTensor
from dpquant.backends.reference import Reference
from dpquant.checks.refusals import check_trainable
from dpquant.engine import batches
from dpquant.engine.clip import clip_factors, clipped_sum
from dpquant.engine.convert import fix
from dpquant.engine.layers import prepare, quantizable_layers, set_policy, set_precisions
from dpquant.engine.weight_gradients import LazyWeightGradient
from dpquant.engine.weight_layout import WeightLayout
from dpquant.errors import DPQuantError, ModelError, SettingError
from dpquant.formats import precision
from networks import NAMES, Residual, loss, zoo
from processor import backends_of, preferring

# Opacus refuses in-place networks, does not know all layers, and gives an embedding's padding row a gradient.
OPACUS_NAMES = [
    n for n in NAMES if n not in ("reflect", "residual", "tokens", "tied", "reused", "generic", "norm of vectors")
]


def total(model, batch, rows=None, clip_norm=1.0, step=3, **settings):
    """The clipped sum of some rows as one float64 vector; ids follow the rows."""
    rows = torch.arange(len(batch[1])) if rows is None else torch.as_tensor(rows, dtype=torch.int64)
    part = tuple(t[rows] for t in batch)
    out = clipped_sum(model, loss, part, max_grad_norm=clip_norm, record_ids=100 + rows, step=step, seed=1, **settings)
    assert out.sensitivity == clip_norm
    return torch.cat([g.double().flatten() for g in out.grads.values()])


def prepared(name, policy="none", recipe="luq-fp4", backend="auto"):
    model, batch = zoo()[name]
    model = prepare(model, format=recipe, backend=backend)
    set_policy(model, quantizable_layers(model) if policy == "all" else ())
    return model, batch


def looped(model, batch, clip_norm):
    """What it should be in full precision: one example at a time, by autograd."""
    result = 0
    for i in range(len(batch[1])):
        value = loss(model, tuple(t[[i]] for t in batch)).sum()
        grads = torch.autograd.grad(value, list(model.parameters()))
        flat = torch.cat([g.double().flatten() for g in grads])
        result = result + flat * min(1.0, clip_norm / flat.norm().item())
    return result


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("clip_norm", [0.05, 1.0, 1e6])
def test_the_sum_is_that_of_a_loop_over_single_examples(name, clip_norm):
    plain, batch = zoo()[name]
    expected = looped(plain, batch, clip_norm)
    ours = total(prepare(copy.deepcopy(plain)), batch, clip_norm=clip_norm)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5 * min(clip_norm, 1))


class Twice(nn.Module):
    """A table that is looked up twice for each example."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(12, 5)

    def forward(self, ids):
        return self.table(ids).mean(1) + 2 * self.table(ids[:, :3]).sum(1)


def test_a_table_that_is_looked_up_twice_is_clipped_by_both_together():
    torch.manual_seed(0)
    plain, batch = Twice(), (torch.randint(0, 12, (5, 7)), torch.randint(0, 5, (5,)))
    ours = total(prepare(copy.deepcopy(plain)), batch, clip_norm=0.05)
    torch.testing.assert_close(ours, looped(plain, batch, 0.05), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", OPACUS_NAMES)
def test_the_sum_is_that_of_opacus(name):
    plain, batch = zoo()[name]
    ours = total(prepare(copy.deepcopy(plain)), batch, clip_norm=0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = GradSampleModule(plain, loss_reduction="sum")
        loss(theirs, batch).sum().backward()
    each = torch.cat([p.grad_sample.double().flatten(1) for p in theirs.parameters()], 1)
    expected = (each * (0.3 / each.norm(dim=1)).clamp(max=1)[:, None]).sum(0)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_a_clip_of_the_sum_instead_of_the_examples_is_caught():
    plain, batch = zoo()["residual"]
    grads = torch.autograd.grad(loss(plain, batch).sum(), list(plain.parameters()))
    flat = torch.cat([g.double().flatten() for g in grads])
    with pytest.raises(AssertionError):
        torch.testing.assert_close(flat / flat.norm(), looped(plain, batch, 1.0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("policy", ["none", "all"])
def test_quantized_or_not_the_sum_is_that_of_its_examples_and_each_is_at_most_c(name, policy):
    model, batch = prepared(name, policy)
    assert_bounded_and_additive(lambda rows, **kw: total(model, batch, rows, **kw), len(batch[1]))


@pytest.mark.parametrize(
    "text", ["full/luq-fp4/luq-fp4", "luq-fp4/full/full", "luq/full/int8", "full/int8/full", "mxfp4", "nvfp4"]
)
@pytest.mark.parametrize("name", ["strided", "residual"])
@pytest.mark.parametrize("backend", ["simulate", "int8"])
def test_so_it_is_whatever_recipe_each_product_runs_in(backend, name, text):
    if backend in backends_of(text):
        model, batch = prepared(name, backend=backend)
        set_precisions(model, dict.fromkeys(quantizable_layers(model), precision(text)))
        assert_bounded_and_additive(lambda rows, **kw: total(model, batch, rows, **kw), len(batch[1]))


def assert_bounded_and_additive(summed, count):
    """Both together bound the sensitivity by C for every data set."""
    whole = summed(range(count))
    parts = [summed([i]) for i in range(count)]
    assert max(part.norm().item() for part in parts) <= 1 + 1e-6
    assert (sum(parts) - whole).norm() <= 1e-4 * count
    for size in (1, 2, 3):
        assert (summed(range(count), microbatch_size=size) - whole).norm() <= 1e-4 * count
    assert summed([]).abs().max() == 0


@pytest.mark.parametrize(("recipe", "planted"), [("luq-fp4", SharedScale), ("mxfp4", BlocksOfExamples)])
def test_a_scale_over_the_batch_is_caught(recipe, planted):
    model, batch = prepared("strided", "all", recipe, backend=planted(Reference()))
    batch[0][1] *= 30
    with pytest.raises(AssertionError):
        assert_bounded_and_additive(lambda rows, **kw: total(model, batch, rows, **kw), len(batch[1]))


def test_batch_norm_forced_through_is_caught():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, affine=False), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
    model, batch = prepare(net), (torch.randn(5, 1, 8, 8), torch.randint(0, 5, (5,)))
    with pytest.raises(AssertionError):
        assert_bounded_and_additive(lambda rows, **kw: total(model, batch, rows, **kw), 5)


def test_norms_from_one_rounding_and_sums_from_another_would_exceed_c():
    model, batch = prepared("few positions", "all")
    scale = 1e6  # no clipping: the whole gradient of one example, rounded twice
    first, second = (total(model, batch, [0], clip_norm=scale, step=step) for step in (1, 2))
    assert (second / first.norm()).norm() > 1.01 or (first / second.norm()).norm() > 1.01
    assert total(model, batch, [0], clip_norm=1e-3).norm() <= 1e-3 * (1 + 1e-6)


@pytest.mark.parametrize("policy", ["none", "all"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("name", ["strided", "residual", "many positions", "positions"])
def test_a_record_that_is_not_finite_contributes_nothing_and_a_huge_one_at_most_c(name, policy, value):
    model, batch = prepared(name, policy)
    rest = total(model, batch, [0, 1, 3])
    batch[0][2, ..., 0] = value
    moved = (total(model, batch, [0, 1, 2, 3]) - rest).norm()
    assert moved <= (1e-4 if value != 1e30 else 1 + 1e-3)


@pytest.mark.parametrize("policy", ["none", "all"])
@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("tokens", "unpadded", "tied")])
def test_records_of_which_none_is_finite_contribute_nothing(name, policy):
    model, batch = prepared(name, policy)
    batch[0].fill_(float("nan"))
    assert total(model, batch).abs().max() == 0
    assert total(model, batch, microbatch_size=2).abs().max() == 0


class FiniteNorms(Wrapped):
    """Says that a gradient which is not finite is zero, so that it counts."""

    def methods(self, operands):
        def finite(norms):
            def of(operands):
                found = norms(operands)
                return dataclasses.replace(found, squares_B=found.squares_B.nan_to_num(0))

            return of

        return [dataclasses.replace(one, norms=finite(one.norms)) for one in self.inner.methods(operands)]


def test_a_record_that_is_not_finite_and_counts_would_be_seen():
    batch = torch.full((4, 6), float("nan")), torch.zeros(4, dtype=torch.int64)
    for backend, seen in ((Reference(), False), (FiniteNorms(Reference()), True)):
        plain = nn.Sequential(nn.Linear(6, 4, bias=False), nn.Tanh(), nn.Linear(4, 5, bias=False))
        assert total(prepare(plain, backend=backend), batch).isfinite().all() != seen


def test_a_clip_factor_that_lets_nan_through_is_caught():
    norms = torch.tensor([4.0, float("nan"), float("inf")], dtype=torch.float64)
    factors, finite = clip_factors(norms, 1.0)
    assert finite.tolist() == [True, False, False] and factors[1:].tolist() == [0, 0]
    assert 0.4999 < factors[0] <= 0.5
    assert not torch.isfinite((1.0 / norms.sqrt()).clamp(max=1)).all()  # what Opacus' formula gives


@pytest.mark.parametrize("max_grad_norm", [1.0, 1e-2, 1e-6, 1e-7])
def test_a_clip_factor_never_rounds_up_however_small(max_grad_norm):
    norms = torch.logspace(30, 38.5, 1000, dtype=torch.float64)
    factors, _ = clip_factors(norms.square(), max_grad_norm)
    assert (factors.double() * norms <= max_grad_norm).all()


@pytest.mark.parametrize("positions", [1, 2, 16])
def test_long_rows_of_one_value_do_not_exceed_c(positions):
    """Sums of equal terms round one way, each time: the worst that a record can do to a float32 norm."""
    x, g = torch.full((1, 16384, positions, 1), 1 / 3), torch.full((1, 64, positions, 1), 0.7)
    product = lazy(x, g, Geometry(), (64, 16384), significant_bits=1)
    methods = Reference().methods(product.operands)
    expected = {"outer"} if positions == 1 else {"patches", "groups", "grams"}
    assert expected <= {method.name for method in methods}
    for contribution in (product, *map(product.by, methods)):
        factors, _ = clip_factors(contribution.squared_norms(), 1e-3)
        total = contribution.begin_sum()
        total.add(contribution, factors)
        assert total.value().double().norm() <= 1e-3 * (1 + 1e-6)


def lazy(x, g, geometry, shape, **settings):
    return LazyWeightGradient.of(x, g, geometry, WeightLayout(torch.Size(shape)), backend=Reference(), **settings)


def test_gradients_of_many_examples_are_formed_a_few_at_a_time():
    """2,000 gradients of 9,216 values: more than are formed at a time, and too many positions for Gram matrices."""
    torch.manual_seed(0)
    x, x2, g, g2 = (torch.randn(2000, channels, 10, 10) for channels in (16, 16, 64, 64))
    shape = (64, 16, 3, 3)
    one, other = (
        lazy(*pair, Geometry(kernel=(3, 3), padding=(1, 1)), shape, significant_bits=3) for pair in ((x, g), (x2, g2))
    )
    found, squares = one.inner_products(other), one.squared_norms()
    for row in (0, 1819, 1820, 1821, 1999):
        formed, formed2 = (
            torch.nn.grad.conv2d_weight(some_x[[row]].double(), shape, some_g[[row]].double(), padding=1)
            for some_x, some_g in ((x, g), (x2, g2))
        )
        torch.testing.assert_close(
            one.take(torch.tensor([row])).per_example()[0].double(), formed, rtol=1e-4, atol=1e-3
        )
        assert abs(found[row] - (formed * formed2).sum()) <= 1e-5 * formed.norm() * formed2.norm()
        torch.testing.assert_close(squares[row], formed.square().sum(), rtol=1e-5, atol=0)


@given(convolutions(), st.booleans())
def test_inner_products_are_those_of_the_gradients_themselves(convolution, quantized):
    geometry, shape, size = convolution
    x = torch.randn(2, 3, shape[1] * geometry.groups, *size)
    outputs = F.conv2d(
        x[0], torch.zeros(shape), None, geometry.stride, geometry.padding, geometry.dilation, geometry.groups
    ).shape
    g = torch.randn(2, *outputs)

    def operand(t):
        codes = t.mul(8).to(torch.int8).contiguous(memory_format=torch.channels_last)  # as layers have them
        return QTensor(codes=codes, scale=torch.rand(3)) if quantized else t

    operands = [[operand(t) for t in pair] for pair in zip(x, g, strict=True)]
    one, other = (lazy(*pair, geometry, shape, significant_bits=3) for pair in operands)
    expected = (one.per_example() * other.per_example()).flatten(1).sum(1)
    lengths = one.per_example().flatten(1).norm(dim=1) * other.per_example().flatten(1).norm(dim=1)
    formed_one, formed_other = (each.by(Reference().methods(each.operands)[0]) for each in (one, other))
    for ours, theirs in ((one, other), (one, formed_other), (formed_one, other)):
        gap = (ours.inner_products(theirs) - expected).abs()  # of what may cancel, round-off is a part of the lengths
        assert (gap <= 1e-5 * lengths).all()
    assert (one.inner_products(one) >= 0).all()


@pytest.mark.parametrize("policy", ["none", "all"])
def test_all_ways_agree(policy):
    """Whichever way is taken, where it can be: norms and sums are those of patches."""
    names, seen = ("grouped", "many positions", "tokens", "strided"), set()
    results: dict[str, list] = {}
    for way in ("patches", "groups", "direct", "recompute", "code norms", "code grams", "grams, recompute", "grams"):
        with preferring(way, seen):
            results[way] = [total(*prepared(name, policy), clip_norm=0.01) for name in names]
    for other in results.values():
        for mine, formed in zip(other, results["patches"], strict=True):
            torch.testing.assert_close(mine, formed, rtol=1e-4, atol=1e-7)
    assert seen >= {"patches", "groups"} and seen & {"grams", "code grams"}


class Off(Wrapped):
    """One method adds a little too much."""

    def __init__(self, inner, method):
        super().__init__(inner)
        self._method = method

    def methods(self, operands):
        def more(norms):
            def of(operands):
                found = norms(operands)
                return dataclasses.replace(found, gradients=1.01 * found.gradients)

            return of

        return [
            dataclasses.replace(one, norms=more(one.norms)) if one.name == self._method else one
            for one in self.inner.methods(operands)
        ]


def test_a_way_that_does_not_agree_would_be_seen():
    sums = []
    for way in ("patches", "groups"):
        with preferring(way):
            sums.append(total(*prepared("grouped", "all", backend=Off(Reference(), "groups")), clip_norm=0.01))
    with pytest.raises(AssertionError):
        torch.testing.assert_close(*sums, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("recipe", ["luq-fp4", "luq", "int4-clip", "int8"])
def test_backends_agree(recipe):
    for name in ("strided", "residual", "positions"):
        sums = [total(*prepared(name, "all", recipe, backend)) for backend in backends_of(recipe)]
        torch.testing.assert_close(sums[0], sums[-1], rtol=1e-5, atol=1e-6)


def test_no_gradient_is_left_on_the_model_even_after_an_error():
    model, batch = prepared("residual")
    total(model, batch)
    with pytest.raises(RuntimeError):
        total(model, (batch[0][:, :, :, :0], batch[1]))
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(layer.current is None for layer in quantizable_layers(model).values())
    assert not model.norm._forward_hooks


def test_frozen_parameters_take_no_part():
    model, batch = prepared("residual")
    model.inner.weight.requires_grad_(False)
    model.norm.bias.requires_grad_(False)
    out = clipped_sum(model, loss, batch, max_grad_norm=1.0, record_ids=torch.arange(6), step=0, seed=0)
    assert set(out.grads) == {n for n, p in model.named_parameters() if p.requires_grad}


def assert_refused(model, *words):
    with pytest.raises(ModelError) as caught:
        check_trainable(model)
    assert all(word in str(caught.value) for word in words), caught.value


def test_models_that_cannot_be_trained_privately_are_refused_with_their_place():
    assert_refused(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), "1 (BatchNorm1d)", "dpquant.fix")
    assert_refused(nn.Sequential(nn.Sequential(nn.BatchNorm2d(2, affine=False))), "0.0 (BatchNorm2d)")
    assert_refused(nn.Sequential(nn.MultiheadAttention(2, 1, add_bias_kv=True)), "0 (MultiheadAttention)")
    assert_refused(nn.Sequential(nn.InstanceNorm1d(2, track_running_stats=True)), "track_running_stats")
    assert_refused(nn.Sequential(nn.Embedding(3, 2, scale_grad_by_freq=True)), "scale_grad_by_freq")
    assert_refused(nn.Sequential(nn.Embedding(3, 2, max_norm=1.0)), "max_norm")
    assert_refused(nn.Linear(2, 2).requires_grad_(False), "trainable parameter")
    assert_refused(nn.Sequential(nn.LazyLinear(2)), "no shape yet")
    for model, _ in zoo().values():
        check_trainable(model)
    check_trainable(fix(nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8))))


def test_an_unused_parameter_is_an_error():
    model = prepare(nn.ModuleList([nn.Linear(6, 5), nn.Linear(6, 5)]))
    model.forward = lambda x: model[0](x)
    with pytest.raises(ModelError, match=r"1\.weight got none"):
        total(model, (torch.randn(3, 6), torch.randint(0, 5, (3,))))


def test_a_first_axis_that_is_not_the_example_is_an_error():
    class InOneAxis(nn.Sequential):
        """The rows of a position next to each other."""

        def forward(self, x):
            return super().forward(x.transpose(0, 1).reshape(-1, 6)).view(8, -1, 5).mean(0)

    model = prepare(InOneAxis(nn.Linear(6, 5)))
    with pytest.raises(ModelError, match=r"examples first"):
        total(model, (torch.randn(3, 8, 6), torch.randint(0, 5, (3,))))


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"max_grad_norm": 0.0}, "max_grad_norm > 0"), ({"max_grad_norm": float("nan")}, "max_grad_norm"),
     ({"microbatch_size": 0}, "microbatch_size >= 1"), ({"loss_fn": lambda m, b: loss(m, b).mean()}, "one loss per")],
)  # fmt: skip
def test_bad_arguments_are_refused(settings, words):
    model, batch = prepared("strided")
    arguments = {"loss_fn": loss, "max_grad_norm": 1.0, "record_ids": torch.arange(6), "step": 0, "seed": 0, **settings}
    with pytest.raises(SettingError, match=words):
        clipped_sum(model, batch=batch, **arguments)


def test_an_unprepared_model_and_a_strange_batch_are_refused():
    model, batch = zoo()["strided"]
    with pytest.raises(ModelError, match="prepare"):
        total(model, batch)
    with pytest.raises(SettingError, match="tensors, tuples, lists and mappings"):
        batches.take_rows("text", slice(0, 1))
    assert issubclass(ModelError, DPQuantError)


def test_in_place_networks_are_clipped_like_their_out_of_place_twins():
    torch.manual_seed(0)
    model, batch = Residual(), (torch.randn(4, 1, 8, 8), torch.randint(0, 5, (4,)))
    torch.testing.assert_close(
        total(prepare(copy.deepcopy(model)), batch), looped(model, batch, 1.0), rtol=1e-4, atol=1e-5
    )


def in_place():
    """Layers that clipping evaluates again, followed by activations that overwrite what they gave."""
    torch.manual_seed(0)
    sequence = [nn.Conv1d(2, 3, 3), nn.ReLU(inplace=True), nn.Conv1d(3, 3, 3), nn.ReLU(inplace=True)]
    return nn.Sequential(*sequence, nn.Flatten(), nn.Linear(12, 5))


def test_what_a_layer_gave_may_be_overwritten():
    model, batch = in_place(), (torch.randn(4, 2, 8), torch.randint(0, 5, (4,)))
    torch.testing.assert_close(
        total(prepare(copy.deepcopy(model)), batch), looped(model, batch, 1.0), rtol=1e-4, atol=1e-5
    )


class ByNeighbour(nn.Linear):
    """Computes each output from the example before."""

    def forward(self, x):
        return super().forward(x.roll(1, 0))


def test_a_layer_that_gives_something_else_when_evaluated_alone_is_refused():
    model = prepare(nn.Sequential(ByNeighbour(6, 6), nn.ReLU(inplace=True), nn.Linear(6, 5)))
    with pytest.raises(ModelError, match=r"ByNeighbour .*gives another one"):
        total(model, (torch.randn(3, 6), torch.randint(0, 5, (3,))))


def sizes_seen(run, count, size):
    """How many examples the loss is asked for, piece by piece."""
    model, (x, y) = prepared("strided")
    batch, seen = (x[:1].repeat(count, 1, 1, 1), y[:1].repeat(count)), []
    clipped(model, loss, batch, torch.arange(count), size)  # the first call on a model has two and three rows, too

    def watched(model, batch):
        seen.append(len(batch[1]))
        return loss(model, batch)

    run(model, watched, batch, torch.arange(count), size)
    return set(seen)


def clipped(model, loss_fn, batch, ids, size):
    clipped_sum(model, loss_fn, batch, max_grad_norm=1.0, record_ids=ids, step=0, seed=0, microbatch_size=size)


def ragged(model, loss_fn, batch, ids, size):
    """The usual way: the last piece is as long as need be."""
    for start in range(0, len(ids), size):
        loss_fn(model, batches.take_rows(batch, slice(start, start + size)))


@pytest.mark.parametrize("count", [1, 3, 4, 7])
def test_every_pass_has_the_same_number_of_examples_however_many_there_are(count):
    assert sizes_seen(clipped, count, 4) == {4}


def test_a_last_piece_that_is_shorter_would_be_seen():
    assert sizes_seen(ragged, 7, 4) == {4, 3}


def test_microbatches_are_of_128_examples_unless_told_otherwise():
    model, batch = prepared("strided")
    sums = [total(model, batch, **given) for given in ({}, {"microbatch_size": None}, {"microbatch_size": 128})]
    assert torch.equal(sums[0], sums[1]) and torch.equal(sums[0], sums[2])


def test_the_copies_that_fill_a_microbatch_up_do_not_count():
    model, batch = prepared("strided")
    alone = [total(model, batch, [i]) for i in range(3)]
    torch.testing.assert_close(total(model, batch, [0, 1, 2]), sum(alone), rtol=1e-5, atol=1e-6)


# Draws of the model's own


class Attending(nn.Module):
    """Attention and dropout over positions, and noise that is the same for all examples."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x):
        x = self.first(x)
        x = x + F.scaled_dot_product_attention(x, x, x, dropout_p=0.3)
        return self.head(F.dropout(x, 0.4).mean(1) + torch.rand(7).sum())


def vectors(count):
    return torch.randn(count, 6), torch.arange(count) % 5


DRAWING = {
    "dropout": lambda: (nn.Sequential(nn.Linear(6, 32), nn.Dropout(0.5), nn.Linear(32, 5)), vectors(9)),
    "in place": lambda: (nn.Sequential(nn.Linear(6, 32), nn.Dropout(0.5, inplace=True), nn.Linear(32, 5)), vectors(9)),
    "of channels": lambda: (
        nn.Sequential(nn.Conv2d(1, 6, 3), nn.Dropout2d(0.5), nn.RReLU(), nn.Flatten(), nn.Linear(96, 5)),
        (torch.randn(9, 1, 6, 6), torch.arange(9) % 5),
    ),
    "attention": lambda: (Attending(), (torch.randn(9, 5, 6), torch.arange(9) % 5)),
}


def assert_a_record_leaves_with_its_own_part_alone(name, policy="none", around=lambda model: model):
    """Record 0 goes, and all others stand one place earlier, some of them in another microbatch."""
    torch.manual_seed(0)
    model, batch = DRAWING[name]()
    model = prepare(around(model))
    set_policy(model, quantizable_layers(model) if policy == "all" else ())
    whole, rest, own = (total(model, batch, rows, microbatch_size=4) for rows in (range(9), range(1, 9), [0]))
    assert own.norm() > 0.1
    torch.testing.assert_close(whole - own, rest, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("policy", ["none", "all"])
@pytest.mark.parametrize("name", DRAWING)
def test_a_record_that_leaves_moves_no_other_s_draws(name, policy):
    assert_a_record_leaves_with_its_own_part_alone(name, policy)


class Global(nn.Module):
    """Draws from torch's global stream, which nobody divides into records."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        with _disable_current_modes():
            return self.inner(x)


@pytest.mark.parametrize("name", DRAWING)
def test_draws_of_one_global_stream_are_caught(name):
    with pytest.raises(AssertionError):
        assert_a_record_leaves_with_its_own_part_alone(name, around=Global)


def test_a_model_that_draws_leaves_the_global_streams_as_they_were():
    model, batch = DRAWING["dropout"]()
    model = prepare(model)
    before = torch.random.get_rng_state()
    total(model, batch, microbatch_size=4)
    assert torch.equal(before, torch.random.get_rng_state())


class DrawnBackward(torch.autograd.Function):
    """Noise that is drawn when the gradient arrives."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad + torch.rand_like(grad)


class NoisyGradient(nn.Module):
    def forward(self, x):
        return DrawnBackward.apply(x)


def test_draws_of_a_backward_pass_are_refused():
    model = prepare(nn.Sequential(nn.Linear(6, 6), NoisyGradient(), nn.Linear(6, 5)))
    with pytest.raises(ModelError, match="backward pass to draw no random numbers"):
        total(model, vectors(4))
