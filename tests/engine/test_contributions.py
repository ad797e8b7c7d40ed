# SPDX-License-Identifier: Apache-2.0
"""Per-example gradients: an embedding's are autograd's, in little memory; a layer's that wait for others are all added.

Weight gradients themselves are tested with the clipped sum that they belong to.
"""

import contextlib
import dataclasses
import inspect
import itertools
import subprocess
import sys
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dpquant
from dpquant.backends.algebra import ROUND_OFF
from dpquant.backends.choose import Choices, Machine
from dpquant.backends.doubles import Wrapped
from dpquant.backends.gemm_sum import GemmSum, OuterSum
from dpquant.backends.geometry import Geometry
from dpquant.backends.interface import Backend, Operands
from dpquant.backends.reference import Reference
from dpquant.engine.contributions import Lookup, Materialised
from dpquant.engine.layers import quantizable_layers, set_policy
from dpquant.engine.weight_gradients import LazyWeightGradient
from dpquant.engine.weight_layout import WeightLayout
from networks import loss
from processor import preferring

ROWS, FEATURES = 7, 3


def lookups(batch: int = 5, positions: int = 11, seed: int = 0) -> tuple[Tensor, Tensor]:
    """ids and g: few rows, so that most are looked up several times."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(ROWS, (batch, positions), generator=generator)
    return ids, torch.randn(batch, positions, FEATURES, generator=generator)


def tables(ids_BT: Tensor, g_BTD: Tensor, num_rows: int = ROWS) -> Tensor:
    """Each example's own table by autograd, float64."""
    found = []
    for ids, g in zip(ids_BT.long(), g_BTD.double(), strict=True):
        table = torch.zeros(num_rows, g.shape[1], dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad((F.embedding(ids, table) * g).sum(), table)
        found.append(gradient)
    return torch.stack(found)


def weighted_sum(lookup: Lookup, weights: Tensor, times: int = 1) -> Tensor:
    """The weighted sum, added up as often."""
    total = lookup.begin_sum()
    for _ in range(times):
        total.add(lookup, weights)
    return total.value()


def added(lookup: Lookup, batch: int) -> Tensor:
    """What a sum adds up for each example on its own, float64."""
    return torch.stack([weighted_sum(lookup, one) for one in torch.eye(batch)]).double()


# Values.


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_an_embeddings_gradients_are_those_of_autograd(dtype: torch.dtype) -> None:
    ids, g = lookups()
    expected = tables(ids, g)
    lookup = Lookup(ids.to(dtype), g, ROWS)
    weights = torch.rand(len(ids))
    torch.testing.assert_close(lookup.per_example().double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(lookup.squared_norms(), expected.square().sum((1, 2)), rtol=2e-5, atol=0)
    whole = 2 * torch.einsum("b,bvd->vd", weights.double(), expected)
    torch.testing.assert_close(weighted_sum(lookup, weights, times=2).double(), whole, rtol=1e-5, atol=1e-5)


def test_keys_of_many_examples_and_rows_do_not_overflow_int32() -> None:
    ids = torch.full((3, 2), 2**30, dtype=torch.int32)
    total = Lookup(ids, torch.ones(3, 2, 1), 2**30 + 1).squared_norms()
    assert torch.equal(total, torch.full((3,), 4.0, dtype=torch.float64) * (1 + ROUND_OFF))


def test_examples_worked_on_in_turn_are_as_examples_worked_on_at_once() -> None:
    ids, g = lookups()
    at_once = Lookup(ids, g, ROWS)
    norms, gradients = at_once.squared_norms(), at_once.per_example()
    for numbers in (1, 2 * g[0].numel(), 4 * g[0].numel()):
        in_turn = Lookup(ids, g, ROWS, float64_at_once=numbers)
        assert torch.equal(in_turn.squared_norms(), norms) and torch.equal(in_turn.per_example(), gradients)


def test_an_example_is_the_same_in_any_company_and_each_time() -> None:
    ids, g = lookups(batch=9)
    whole = Lookup(ids, g, ROWS)
    for row in range(9):
        alone = Lookup(ids[row : row + 1], g[row : row + 1], ROWS)
        assert torch.equal(alone.squared_norms(), whole.squared_norms()[row : row + 1])
        assert torch.equal(alone.per_example(), whole.per_example()[row : row + 1])
    again = Lookup(ids, g, ROWS)
    assert torch.equal(weighted_sum(again, torch.ones(9)), weighted_sum(whole, torch.ones(9)))


def test_some_of_the_examples_keep_what_is_theirs() -> None:
    ids, g = lookups()
    rows = torch.tensor([3, 1])
    lookup = Lookup(ids, g, ROWS)
    assert torch.equal(lookup.take(rows).squared_norms(), lookup.squared_norms()[rows])
    assert torch.equal(lookup.take(rows).per_example(), lookup.per_example()[rows])
    none = lookup.take(torch.tensor([], dtype=torch.int64))
    assert none.squared_norms().shape == (0,) and none.per_example().shape == (0, ROWS, FEATURES)
    assert torch.equal(weighted_sum(none, torch.ones(0)), torch.zeros(ROWS, FEATURES))


def test_no_positions_are_a_gradient_of_zero() -> None:
    lookup = Lookup(torch.zeros(2, 0, dtype=torch.int64), torch.zeros(2, 0, FEATURES), ROWS)
    assert torch.equal(lookup.squared_norms(), torch.zeros(2, dtype=torch.float64))
    assert not lookup.per_example().any()


def test_calls_of_one_table_are_merged_into_one() -> None:
    calls = [lookups(positions=positions, seed=positions) for positions in (4, 1, 6)]
    merged = Lookup.merged([Lookup(ids, g, ROWS) for ids, g in calls])
    expected = torch.stack([tables(ids, g) for ids, g in calls]).sum(0)
    torch.testing.assert_close(merged.per_example().double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(merged.squared_norms(), expected.square().sum((1, 2)), rtol=2e-5, atol=0)


# Inner products.


@pytest.mark.parametrize("positions", [11, 2])
def test_inner_products_are_those_of_the_tables(positions: int) -> None:
    first, second = lookups(positions=11), lookups(positions=positions, seed=1)
    expected = (tables(*first) * tables(*second)).sum((1, 2))
    ours, theirs = Lookup(*first, ROWS), Lookup(*second, ROWS)
    for other in (theirs, Materialised(theirs.per_example())):
        torch.testing.assert_close(ours.inner_products(other).double(), expected, rtol=1e-5, atol=1e-5)


def test_rows_that_only_one_looks_up_add_nothing_unless_they_are_not_finite() -> None:
    ours = Lookup(torch.tensor([[0, 1], [0, 1]]), torch.tensor([[[1.0], [5.0]], [[1.0], [torch.inf]]]), 3)
    theirs = Lookup(torch.tensor([[0, 2], [0, 2]]), torch.ones(2, 2, 1), 3)
    products = ours.inner_products(theirs)
    assert products[0] == 1 and products[1].isnan()


# Norms bound what is summed.


def equal(count: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(1, count, dtype=torch.int64), torch.full((1, count, 1), 0.1)


def cancelling() -> tuple[Tensor, Tensor]:
    g = torch.randn(1, 4096, FEATURES, generator=torch.Generator().manual_seed(0))
    return torch.zeros(1, 8192, dtype=torch.int64), torch.cat([g, -g * (1 + 2.0**-20)], 1)


def huge_and_small() -> tuple[Tensor, Tensor]:
    g = torch.tensor([1e18, 1.0, -1e18, 1e-18, 1e-30, 1e30]).reshape(1, 6, 1)
    return torch.tensor([[0, 0, 0, 1, 2, 3]]), g


def rounded_up() -> tuple[Tensor, Tensor]:
    """Half a last bit and a little: the float32 sum is larger than the exact one."""
    return torch.zeros(1, 2, dtype=torch.int64), torch.tensor([1.0, 2.0**-24 * 1.5]).reshape(1, 2, 1)


def rounded_down() -> tuple[Tensor, Tensor]:
    return torch.zeros(1, 2, dtype=torch.int64), torch.tensor([1.0, 2.0**-24 * 0.9]).reshape(1, 2, 1)


ADVERSARIAL = {
    "random": lookups,
    "16,384 equal terms": lambda: equal(16_384),
    "cancelling": cancelling,
    "huge and small": huge_and_small,
    "float32 rounds up": rounded_up,
    "float32 rounds down": rounded_down,
}


def assert_norms_are_never_less(
    lookup: Lookup, ids: Tensor, g: Tensor, squared_norms: Callable[[Lookup], Tensor] = Lookup.squared_norms
) -> None:
    exact, summed = tables(ids, g), added(lookup, len(ids))
    norms = squared_norms(lookup)
    assert (norms >= summed.square().sum((1, 2))).all() and (norms >= exact.square().sum((1, 2))).all()
    assert (norms <= exact.square().sum((1, 2)) * (1 + 3 * ROUND_OFF)).all()
    torch.testing.assert_close(summed, exact, rtol=2.0**-23, atol=0)


@pytest.mark.parametrize("case", ADVERSARIAL)
def test_a_norm_is_never_less_than_that_of_what_is_summed(case: str) -> None:
    ids, g = ADVERSARIAL[case]()
    assert_norms_are_never_less(Lookup(ids, g, ROWS), ids, g)


def test_norms_that_are_not_rounded_up_would_be_seen() -> None:
    ids, g = rounded_down()
    with pytest.raises(AssertionError):
        assert_norms_are_never_less(
            Lookup(ids, g, ROWS), ids, g, lambda lookup: lookup.squared_norms() / (1 + ROUND_OFF)
        )


def test_norms_of_the_exact_sums_in_place_of_the_added_ones_would_be_seen() -> None:
    ids, g = rounded_up()
    with pytest.raises(AssertionError):
        assert_norms_are_never_less(Lookup(ids, g, ROWS), ids, g, lambda lookup: tables(ids, g).square().sum((1, 2)))


def test_sums_in_float32_would_be_seen() -> None:
    ids, g = equal(16_384)
    lookup = Lookup(ids, g, ROWS)
    lookup._sums = torch.zeros(1, dtype=torch.int64), torch.zeros(1, 1).index_add_(0, ids[0], g[0])
    with pytest.raises(AssertionError):
        assert_norms_are_never_less(lookup, ids, g)


# What is not finite.


def assert_only_its_own_example_is_not_finite(squared_norms: Callable[[Lookup], Tensor], value: float) -> None:
    ids, g = lookups()
    clean = Lookup(ids, g, ROWS).squared_norms()
    g[2, 4, 1] = value
    norms = squared_norms(Lookup(ids, g, ROWS))
    others = torch.tensor([0, 1, 3, 4])
    assert not norms[2].isfinite() and torch.equal(norms[others], clean[others])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_gradient_that_is_not_finite_stays_in_its_own_example(value: float) -> None:
    assert_only_its_own_example_is_not_finite(Lookup.squared_norms, value)


def test_rows_shared_by_all_examples_would_be_seen() -> None:
    def shared(lookup: Lookup) -> Tensor:
        table = lookup.per_example().sum(0)
        return torch.stack([(table[ids] * g).sum().double() for ids, g in zip(lookup._ids, lookup._g, strict=True)])

    with pytest.raises(AssertionError):
        assert_only_its_own_example_is_not_finite(shared, torch.nan)


def test_opposite_infinities_and_sums_beyond_float32_are_not_finite() -> None:
    ids = torch.zeros(2, 2, dtype=torch.int64)
    g = torch.tensor([[torch.inf, -torch.inf], [3e38, 3e38]])[..., None]
    assert not Lookup(ids, g, ROWS).squared_norms().isfinite().any()


# Memory. Each case has a process of its own, whose peak nothing else has raised.

PEAK = """
from pathlib import Path
import torch
from dpquant.engine.contributions import Lookup

torch.set_num_threads(1)

def gradients(batch, positions, rows, features, seed):
    torch.manual_seed(seed)
    return Lookup(torch.randint(rows, (batch, positions)), torch.randn(batch, positions, features), rows)

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()  # getrusage counts what the parent had, too
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024

def norms(lookup):
    lookup.squared_norms()
    lookup.begin_sum().add(lookup, torch.ones(len(lookup._ids)))

def norms_by_pairs(lookup):
    (lookup._g @ lookup._g.transpose(1, 2)).double() * (lookup._ids[:, :, None] == lookup._ids[:, None, :])

def products(lookup, other):
    lookup.inner_products(other)

def products_by_tables(lookup, other):
    (lookup.per_example() * other.per_example()).flatten(1).sum(1)

def operands(*shape):
    return [gradients(*shape, seed) for seed in range({count})]

{work}(*operands(2, 3, 5, 2))
measured = operands(*{shape})
before = peak()
{work}(*measured)
print(peak() - before)
"""


def growth_mib(work: str, shape: tuple[int, int, int, int], count: int) -> float:
    """By how much the peak of a process grows when it does this once to `count` gradients of `shape`."""
    script = inspect.cleandoc(PEAK).format(work=work, shape=shape, count=count)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return float(done.stdout)


def test_many_positions_take_memory_for_positions_not_for_pairs() -> None:
    assert growth_mib("norms", (32, 2048, 500, 8), 1) < 100


def test_memory_for_pairs_of_positions_would_be_seen() -> None:
    assert growth_mib("norms_by_pairs", (8, 2048, 500, 8), 1) > 100


def test_inner_products_take_memory_for_positions_not_for_tables() -> None:
    assert growth_mib("products", (64, 16, 200_000, 16), 2) < 200


def test_memory_for_tables_would_be_seen() -> None:
    assert growth_mib("products_by_tables", (16, 16, 200_000, 16), 2) > 200


# Weight gradients whose products wait for more positions.

CONVOLUTION = Geometry(kernel=(3, 3), padding=(1, 1), groups=2)


def product(batch: int, backend: Backend, side: int = 5) -> LazyWeightGradient:
    x, g = torch.randn(batch, 4, side, side), torch.randn(batch, 6, side, side)
    return LazyWeightGradient.of(
        x, g, CONVOLUTION, WeightLayout(torch.Size((6, 2, 3, 3))), backend=backend, significant_bits=0
    )


class Sums(Wrapped):
    """All methods add up by another sum."""

    def __init__(self, inner, sum):
        super().__init__(inner)
        self._sum = sum

    def methods(self, operands):
        return [dataclasses.replace(one, sum=self._sum) for one in self.inner.methods(operands)]


def assert_what_waited_is_what_is_added(way: str, sums: type[GemmSum]) -> None:
    torch.manual_seed(0)
    backend = Sums(Reference(), partial(sums, enough_positions=150))  # six examples: some are worked off before the end
    total, expected = product(4, backend).begin_sum(), torch.zeros(6, 2, 3, 3)
    with preferring(way):
        for batch in (4, 3, 0, 2):
            part, weights = product(batch, backend), torch.rand(batch)
            total.add(part, weights)
            if batch:
                expected += torch.einsum("b,bocij->ocij", weights, part.per_example())
        torch.testing.assert_close(total.value(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", ["convolution", "patches"])
def test_what_waited_is_what_is_added(way: str) -> None:
    assert_what_waited_is_what_is_added(way, GemmSum)


def test_each_size_is_added_by_the_way_that_suits_it() -> None:
    torch.manual_seed(0)
    backend = Sums(Reference(), partial(GemmSum, enough_positions=150))

    turns = itertools.cycle(["convolution", "patches"])  # which leave their totals in different orders

    def timed(ways):
        chosen = next(turns)
        return {way: float(way != chosen) for way in ways}

    total, expected = product(4, backend).begin_sum(), torch.zeros(6, 2, 3, 3)
    with Choices(timed=timed, machine=Machine(None)).active():
        for side in (5, 7, 7, 5, 6):
            part, weights = product(4, backend, side), torch.rand(4)
            total.add(part, weights)
            expected += torch.einsum("b,bocij->ocij", weights, part.per_example())
        torch.testing.assert_close(total.value(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", ["convolution", "patches"])
def test_what_waits_and_is_forgotten_would_be_seen(way: str) -> None:
    class Forgetful(GemmSum):
        def value(self) -> Tensor:
            self._x = []
            return super().value()

    with pytest.raises(AssertionError):
        assert_what_waited_is_what_is_added(way, Forgetful)


def assert_outer_products_are_added(inputs: int, outputs: int, sum: type[OuterSum] = OuterSum) -> None:
    """Of microbatches that are empty, of one slice, and of more than two."""
    torch.manual_seed(0)
    shapes, total, expected = ((inputs, 1, 1), (outputs, 1, 1)), None, torch.zeros(outputs, inputs).double()
    for batch in (0, 512, 1100):
        x, g = (torch.randn(batch, *shape) for shape in shapes)
        operands, weights = Operands(x=x, g=g, geometry=Geometry()), torch.rand(batch)
        total = total or sum(operands)
        total.add(operands, weights)
        expected += torch.einsum("b,bo,bi->oi", weights.double(), g.flatten(1).double(), x.flatten(1).double())
    assert total is not None and total.value().is_contiguous()
    torch.testing.assert_close(total.value().flatten(1).double(), expected, rtol=1e-5, atol=1e-4)


SIDES = [(3, 8), (8, 3), (5, 5)]


@pytest.mark.parametrize("sides", SIDES, ids=str)
def test_a_sum_of_outer_products_is_that_of_all_examples(sides: tuple[int, int]) -> None:
    assert_outer_products_are_added(*sides)


class FirstSlice(OuterSum):
    """A plant: a large microbatch counts by its first slice only."""

    def add(self, operands: Operands, weights_B: Tensor) -> None:
        rows = torch.arange(min(len(operands), 512))
        super().add(operands.take(rows), weights_B[rows])


class Unweighted(OuterSum):
    """A plant: no example is scaled."""

    def add(self, operands: Operands, weights_B: Tensor) -> None:
        super().add(operands, torch.ones_like(weights_B))


@pytest.mark.parametrize("sum", [FirstSlice, Unweighted])
@pytest.mark.parametrize("sides", SIDES, ids=str)
def test_outer_products_that_are_left_out_or_not_scaled_would_be_seen(
    sides: tuple[int, int], sum: type[OuterSum]
) -> None:
    with pytest.raises(AssertionError):
        assert_outer_products_are_added(*sides, sum)


def assert_examples_without_a_finite_gradient_add_zero(policy: str, backend: str | Backend = "auto") -> None:
    torch.manual_seed(0)
    for model, inputs in (
        (nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 5)), torch.full((5, 6), torch.nan)),
        (
            nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)),
            torch.full((5, 1, 8, 8), torch.nan),
        ),
    ):
        dpquant.prepare(model, backend=backend)
        set_policy(model, list(quantizable_layers(model)) if policy == "all" else [])
        total = dpquant.clipped_sum(
            model, loss, (inputs, torch.zeros(5).long()), max_grad_norm=1.0, record_ids=torch.arange(5), step=0, seed=0
        )
        for name, parameter in model.named_parameters():
            assert torch.equal(total.grads[name], torch.zeros_like(parameter))


METHODS = [None, "patches", "groups", "direct", "recompute", "code norms", "code grams", "grams, recompute", "grams"]


@pytest.mark.parametrize("policy", ["none", "all"])
@pytest.mark.parametrize("method", METHODS)
def test_examples_without_a_finite_gradient_add_zero(policy: str, method: str | None) -> None:
    with preferring(method) if method else contextlib.nullcontext():
        assert_examples_without_a_finite_gradient_add_zero(policy)


def test_a_sum_of_nothing_that_is_nothing_would_be_seen() -> None:
    class Nothing(GemmSum):
        def value(self) -> Tensor | None:
            return next(iter(self._totals.values()), None)

    with preferring("grams"), pytest.raises(AttributeError, match="NoneType"):
        assert_examples_without_a_finite_gradient_add_zero("none", Sums(Reference(), Nothing))
