# SPDX-License-Identifier: Apache-2.0
"""Policies choose the stated number of layers with the stated probabilities, and from nothing but scores and a key."""

import ast
import dataclasses
import inspect
import itertools
import math
import random
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dpquant.errors import SettingError
from dpquant.training import policies
from dpquant.training.policies import (
    AllPolicy,
    DPQuantPolicy,
    NonePolicy,
    PrioritisePolicy,
    RotatePolicy,
    StaticPolicy,
    ema,
    largest_layers,
    noise_left,
    probabilities,
)

ALPHA = 1e-6
MACS = {"stem": 10.0, "conv1": 40.0, "conv2": 40.0, "head": 10.0}
SCORES = {"stem": 0.9, "conv1": 0.1, "conv2": 0.4, "head": -0.2}
NUM_EPOCHS = 4000
RANDOM_POLICIES = [RotatePolicy(fraction=0.5), DPQuantPolicy(fraction=0.5)]


def chosen(policy, scores=SCORES, macs=MACS, key=1, epochs=range(NUM_EPOCHS)) -> list[tuple[str, ...]]:
    return [policy.choose(macs, scores, epoch=epoch, key=key) for epoch in epochs]


def drawing_without_replacement(weights: dict[str, float], count: int) -> dict[tuple[str, ...], float]:
    """The probability of every set (in forward order), by enumeration of all orders."""
    result: Counter[tuple[str, ...]] = Counter()
    for order in itertools.permutations(weights, count):
        probability, left = 1.0, sum(weights.values())
        for name in order:
            probability *= weights[name] / left
            left -= weights[name]
        result[tuple(name for name in weights if name in order)] += probability
    return dict(result)


def assert_frequencies_are(expected: dict[tuple[str, ...], float], draws: list[tuple[str, ...]]) -> None:
    counts = Counter(draws)
    assert set(counts) <= set(expected)
    sets = list(expected)
    observed = [counts[s] for s in sets]
    assert stats.chisquare(observed, [expected[s] * len(draws) for s in sets]).pvalue > ALPHA


def weights(beta: float) -> dict[str, float]:
    z = (np.array(list(SCORES.values())) - np.mean(list(SCORES.values()))) / np.std(list(SCORES.values()))
    return dict(zip(SCORES, np.exp(-beta * z).tolist(), strict=True))


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("beta", [0.0, 0.7, 1.0])
def test_sets_are_drawn_without_replacement_by_their_probabilities(beta, count):
    policy = DPQuantPolicy(fraction=count / 4, beta=beta)
    assert_frequencies_are(drawing_without_replacement(weights(beta), count), chosen(policy))


@pytest.mark.parametrize("wrong_beta", [0.0, 0.8, -1.0])
def test_another_beta_would_be_seen(wrong_beta):
    with pytest.raises(AssertionError):
        assert_frequencies_are(drawing_without_replacement(weights(wrong_beta), 2), chosen(DPQuantPolicy(fraction=0.5)))


def test_drawing_sets_by_the_product_of_probabilities_would_be_seen():
    expected = {s: math.prod(weights(1.0)[name] for name in s) for s in itertools.combinations(SCORES, 2)}
    expected = {s: weight / sum(expected.values()) for s, weight in expected.items()}
    with pytest.raises(AssertionError):
        assert_frequencies_are(expected, chosen(DPQuantPolicy(fraction=0.5)))


def test_rotation_draws_every_set_alike_whatever_the_scores():
    uniform = dict.fromkeys(itertools.combinations(MACS, 2), 1 / 6)
    for scores in (SCORES, None):
        assert_frequencies_are(uniform, chosen(RotatePolicy(fraction=0.5), scores))
    assert_frequencies_are(uniform, chosen(DPQuantPolicy(fraction=0.5), None))
    assert_frequencies_are(uniform, chosen(DPQuantPolicy(fraction=0.5, beta=0.0)))


def test_preferring_a_layer_slightly_would_be_seen():
    biased = [
        ("stem", "conv1") if i % 25 == 0 else layers for i, layers in enumerate(chosen(RotatePolicy(fraction=0.5)))
    ]
    with pytest.raises(AssertionError):
        assert_frequencies_are(dict.fromkeys(itertools.combinations(MACS, 2), 1 / 6), biased)


def test_rotation_reaches_every_layer():
    assert set().union(*chosen(RotatePolicy(fraction=0.25), epochs=range(30))) == set(MACS)


def test_prioritising_takes_the_least_harmful_layers_every_time():
    assert set(chosen(PrioritisePolicy(fraction=0.5), epochs=range(20))) == {("conv1", "head")}
    assert chosen(PrioritisePolicy(fraction=0.5), dict.fromkeys(MACS, 1.0), epochs=[0]) == [("stem", "conv1")]
    assert set(chosen(DPQuantPolicy(fraction=0.5, beta=1e6), epochs=range(20))) == {("conv1", "head")}


def test_a_static_set_depends_on_its_seed_alone():
    def sets(seed: int, key: int) -> set[tuple[str, ...]]:
        return set(chosen(StaticPolicy(fraction=0.5, seed=seed), key=key, epochs=range(20)))

    assert sets(3, key=1) == sets(3, key=2)
    assert len(sets(3, key=1)) == 1
    assert len(set.union(*(sets(seed, key=1) for seed in range(30)))) == 6


def test_named_layers_come_in_forward_order():
    assert chosen(StaticPolicy(names=("head", "stem")), epochs=[0]) == [("stem", "head")]
    assert chosen(StaticPolicy(names=[]), epochs=[0]) == [()]


def test_none_and_all():
    assert chosen(NonePolicy(), epochs=[0]) == [()]
    assert chosen(AllPolicy(), epochs=[0]) == [tuple(MACS)]


@pytest.mark.parametrize("policy", RANDOM_POLICIES, ids=lambda policy: type(policy).__name__)
def test_draws_repeat_for_one_key_and_differ_for_another(policy):
    assert chosen(policy, epochs=range(50)) == chosen(policy, epochs=range(50))
    assert chosen(policy, epochs=range(50)) != chosen(policy, key=2**64 - 1, epochs=range(50))
    assert len(set(chosen(policy, epochs=range(50)))) > 1


def test_draws_leave_the_global_streams_alone():
    random.seed(0)
    np.random.seed(0)
    before = random.getstate(), np.random.get_state()[1].tolist()
    chosen(DPQuantPolicy(fraction=0.5), epochs=range(3))
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before


@pytest.mark.parametrize(
    ("fraction", "num_layers", "expected"),
    [(0.6, 5, 3), (0.5, 5, 3), (0.9, 10, 9), (1.0, 7, 7), (1e-6, 7, 1), (0.7, 10, 7)],
)
def test_a_fraction_is_reached_by_the_fewest_layers(fraction, num_layers, expected):
    macs = {f"layer{i}": 1.0 for i in range(num_layers)}
    for policy in (RotatePolicy(fraction=fraction), StaticPolicy(fraction=fraction), DPQuantPolicy(fraction=fraction)):
        assert len(policy.choose(macs, None, epoch=0, key=0)) == expected


@settings(derandomize=True, deadline=None)
@given(st.lists(st.floats(0, 1e12), min_size=1, max_size=8), st.floats(1e-3, 1), st.integers(0, 2**64 - 1))
def test_a_share_of_the_work_is_reached_and_by_no_layer_too_many(values, share, key):
    macs = {f"layer{i}": value for i, value in enumerate(values)}
    layers = PrioritisePolicy(macs=share).choose(macs, dict(zip(macs, values, strict=True)), epoch=0, key=key)
    work = macs if any(values) else dict.fromkeys(macs, 1.0)
    target = share * sum(work.values())
    cheapest_first = sorted(layers, key=macs.__getitem__)
    assert sum(work[name] for name in layers) >= target * (1 - 1e-6)
    assert sum(work[name] for name in cheapest_first[:-1]) <= target * (1 + 1e-6)


def test_a_share_is_taken_in_the_order_of_the_draw():
    assert chosen(PrioritisePolicy(macs=0.45), epochs=[0]) == [("conv1", "head")]
    assert chosen(PrioritisePolicy(macs=0.1), epochs=[0]) == [("head",)]
    assert chosen(PrioritisePolicy(macs=1.0), epochs=[0]) == [tuple(MACS)]


def test_a_model_without_layers_has_nothing_to_choose():
    for policy in (RotatePolicy(fraction=0.5), DPQuantPolicy(macs=0.5), PrioritisePolicy(fraction=1.0), AllPolicy()):
        assert policy.choose({}, {}, epoch=0, key=0) == ()


@settings(derandomize=True, deadline=None)
@given(st.lists(st.floats(-1e300, 1e300), min_size=1, max_size=8), st.floats(0, 50))
def test_probabilities_are_positive_ordered_and_sum_to_one(values, beta):
    scores = {f"layer{i}": value for i, value in enumerate(values)}
    result = probabilities(scores, beta)
    assert math.fsum(result.values()) == pytest.approx(1, abs=1e-12)
    assert all(0 <= p <= 1 for p in result.values())
    ranked = sorted(scores, key=scores.__getitem__)
    assert all(result[a] >= result[b] - 1e-12 for a, b in itertools.pairwise(ranked))


def assert_units_of_the_loss_do_not_matter(function) -> None:
    scaled = {name: 3 * score + 7 for name, score in SCORES.items()}
    assert function(scaled, 1.0) == pytest.approx(function(SCORES, 1.0), rel=1e-9)


def test_scores_count_in_units_of_their_own_spread():
    assert_units_of_the_loss_do_not_matter(probabilities)
    assert probabilities(SCORES, 1.0) == pytest.approx({n: w / sum(weights(1).values()) for n, w in weights(1).items()})
    assert probabilities(dict.fromkeys("abcd", 0.3), 5.0) == dict.fromkeys("abcd", 0.25)
    assert probabilities({"only": 4.0}, 5.0) == {"only": 1.0}
    assert probabilities({}, 1.0) == {}


def test_scores_used_as_they_are_would_be_seen():
    def planted(scores, beta):
        total = sum(math.exp(-beta * score) for score in scores.values())
        return {name: math.exp(-beta * score) / total for name, score in scores.items()}

    with pytest.raises(AssertionError):
        assert_units_of_the_loss_do_not_matter(planted)


def test_the_average_begins_with_the_first_analysis_and_then_moves():
    assert ema({}, {"a": 4.0}, 0.25) == {"a": 4.0}
    assert ema({"a": 4.0, "b": 0.0}, {"a": 0.0, "b": 1.0}, 0.25) == {"a": 3.0, "b": 0.25}
    assert ema({"a": 4.0}, {"a": 1.0}, 1.0) == {"a": 1.0}


def test_policies_say_what_they_need():
    assert [p.needs_scores for p in (NonePolicy(), AllPolicy(), RotatePolicy(macs=0.5), StaticPolicy(names=()))] == [
        False
    ] * 4
    assert [p.needs_scores for p in (PrioritisePolicy(macs=0.5), DPQuantPolicy(macs=0.5))] == [True] * 2
    assert [p.quantizes for p in (NonePolicy(), StaticPolicy(names=()), AllPolicy(), RotatePolicy(macs=1))] == [
        False,
        False,
        True,
        True,
    ]
    assert (DPQuantPolicy(macs=0.5, ema=0.3).ema, DPQuantPolicy(macs=0.5).ema, RotatePolicy(macs=0.5).ema) == (
        0.3,
        0.5,
        1.0,
    )


def test_policies_are_values():
    assert DPQuantPolicy(fraction=0.5) == DPQuantPolicy(fraction=0.5, beta=1.0)
    assert {StaticPolicy(names=["a"]), StaticPolicy(names=("a",))} == {StaticPolicy(names=("a",))}
    with pytest.raises(dataclasses.FrozenInstanceError):
        RotatePolicy(fraction=0.5).fraction = 0.6


@pytest.mark.parametrize(
    ("policy", "arguments", "message"),
    [
        (RotatePolicy, {}, "exactly one of fraction, macs for RotatePolicy; got none"),
        (DPQuantPolicy, {"fraction": 0.5, "macs": 0.5}, "got fraction, macs"),
        (StaticPolicy, {"fraction": 0.5, "names": ("a",)}, "got names, fraction"),
        (StaticPolicy, {"names": "stem"}, "names='stem'"),
        (StaticPolicy, {"fraction": 0.5, "seed": -1}, "seed=-1"),
        (RotatePolicy, {"fraction": 0.0}, "fraction=0.0"),
        (RotatePolicy, {"fraction": 1.1}, "fraction=1.1"),
        (RotatePolicy, {"macs": math.nan}, "macs=nan"),
        (DPQuantPolicy, {"fraction": 0.5, "beta": -0.1}, "beta=-0.1"),
        (DPQuantPolicy, {"fraction": 0.5, "beta": math.inf}, "beta=inf"),
        (DPQuantPolicy, {"fraction": 0.5, "ema": 0.0}, "ema=0.0"),
        (PrioritisePolicy, {"fraction": 0.5, "ema": 1.5}, "ema=1.5"),
    ],
)
def test_settings_out_of_range_are_refused(policy, arguments, message):
    with pytest.raises(SettingError, match=message):
        policy(**arguments)


def test_unknown_names_and_scores_that_do_not_fit_are_refused():
    with pytest.raises(SettingError, match=r"'stam'.*Known: stem, conv1, conv2, head"):
        StaticPolicy(names=("stam",)).choose(MACS, None, epoch=0, key=0)
    for scores in ({"stem": 1.0}, {**SCORES, "head": math.nan}, {**SCORES, "extra": 0.0}):
        with pytest.raises(SettingError, match="one finite number"):
            DPQuantPolicy(fraction=0.5).choose(MACS, scores, epoch=0, key=0)


def assert_imports_nothing_that_sees_data(source: str) -> None:
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    assert {name for name in imported if name not in sys.stdlib_module_names} <= {
        "collections.abc",
        "numpy",
        "dpquant.errors",
    }


def test_the_schedule_can_see_neither_data_nor_a_model():
    assert_imports_nothing_that_sees_data(inspect.getsource(policies))


@pytest.mark.parametrize("planted", ["import torch", "from dpquant.data.dataset import load"])
def test_an_import_that_sees_data_would_be_seen(planted):
    with pytest.raises(AssertionError):
        assert_imports_nothing_that_sees_data(f"{inspect.getsource(policies)}\n{planted}")


def test_the_largest_layers_cover_the_share():
    macs = {"a": 10.0, "b": 60.0, "c": 30.0}
    assert [largest_layers(macs, share) for share in (0.0, 0.6, 0.9, 1.0)] == [(), ("b",), ("b", "c"), ("a", "b", "c")]


@pytest.mark.parametrize("count", [1, 2, 5, 40])
def test_the_noise_that_smoothing_leaves_is_what_smoothed_noise_shows(count):
    draws = np.random.default_rng(0).normal(size=(20_000, count))
    smoothed = {}
    for analysis in range(count):
        smoothed = ema(smoothed, {i: draws[i, analysis] for i in range(len(draws))}, 0.3)
    assert noise_left(count, 0.3) == pytest.approx(np.std(list(smoothed.values())), rel=0.02)
    assert noise_left(count, 1.0) == 1.0
