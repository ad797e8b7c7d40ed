# SPDX-License-Identifier: Apache-2.0
"""Draws of user code follow the record, or nothing but the key; and plants that follow a record's place are caught."""

import contextlib
import random
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dpquant.engine.randomness import Drawing, Position, RecordDraws, Watch, reseed, seeded
from dpquant.errors import ModelError

IDS = [5, 3, 9, 7]
ELSEWHERE = [[7, 11, 5, 3], [3, 3, 3, 3], [40, 41, 42, 5, 44, 45, 9]]  # other places, company, copies, another size
VALUES = torch.randn(50, 2, 8, 6, generator=torch.Generator().manual_seed(0))


def own():
    """A generator of a user's, as it stands whenever user code makes one."""
    return torch.Generator().manual_seed(0)


def empty(ids, *shape):
    return torch.empty(len(ids), *shape)


def attention(ids):
    query = VALUES[ids]
    return F.scaled_dot_product_attention(query, query, query, dropout_p=0.5)


def over_positions_first(ids):
    """`(T, B, D)`, as torch's recurrent layers and its transformer have it by default."""
    return F.dropout(torch.ones(3, len(ids), 30)).transpose(0, 1)


# What is drawn for records, examples first; some have several rows an example.
BY_RECORD = {
    "bernoulli_": lambda ids: empty(ids, 60).bernoulli_(0.5),
    "bernoulli_ of probabilities": lambda ids: empty(ids, 60).bernoulli_(torch.full((60,), 0.5)),
    "bernoulli": lambda ids: torch.bernoulli(torch.full((len(ids), 60), 0.5)),
    "rand": lambda ids: torch.rand(len(ids), 6),
    "rand_like": lambda ids: torch.rand_like(VALUES[ids]),
    "randn": lambda ids: torch.randn(len(ids), 6),
    "randn_like": lambda ids: torch.randn_like(VALUES[ids].double()),
    "normal": lambda ids: torch.normal(VALUES[ids], VALUES[ids].abs()),
    "normal of one mean": lambda ids: torch.normal(torch.zeros(6), torch.ones(len(ids), 6)),
    "normal of numbers": lambda ids: torch.normal(0.0, 1.0, (len(ids), 6)),
    "normal_": lambda ids: empty(ids, 6).normal_(),
    "uniform_": lambda ids: empty(ids, 6).uniform_(),
    "randint": lambda ids: torch.randint(0, 10**6, (len(ids), 6)),
    "randint_like": lambda ids: torch.randint_like(VALUES[ids], 10**6),
    "multinomial": lambda ids: torch.multinomial(torch.ones(len(ids), 60), 10),
    "exponential_": lambda ids: empty(ids, 6).exponential_(),
    "poisson": lambda ids: torch.poisson(torch.full((len(ids), 60), 100.0)),
    "Dirichlet": lambda ids: torch.distributions.Dirichlet(torch.ones(len(ids), 6)).sample(),
    "Beta": lambda ids: torch.distributions.Beta(torch.ones(len(ids), 6), 2.0).sample(),
    "dropout": lambda ids: F.dropout(torch.ones(len(ids), 60)),
    "dropout, positions first": over_positions_first,
    "dropout of heads": lambda ids: F.dropout(torch.ones(len(ids) * 3, 6, 6)),
    "dropout2d": lambda ids: F.dropout2d(torch.ones(len(ids), 60, 2, 2)),
    "alpha_dropout": lambda ids: F.alpha_dropout(torch.ones(len(ids), 60), training=True),
    "attention": attention,
    "gumbel_softmax": lambda ids: F.gumbel_softmax(torch.zeros(len(ids), 6)),
    "rrelu": lambda ids: F.rrelu(-torch.ones(len(ids), 6), training=True),
    "rrelu_": lambda ids: F.rrelu_(-torch.ones(len(ids), 6), training=True),
    "out": lambda ids: torch.rand(len(ids), 6, out=empty(ids, 6)),
    "own rand": lambda ids: torch.rand(len(ids), 6, generator=own()),
    "own randn": lambda ids: torch.randn(len(ids), 6, generator=own()),
    "own randint": lambda ids: torch.randint(10**6, (len(ids), 6), generator=own()),
    "own normal": lambda ids: torch.normal(0.0, 1.0, (len(ids), 6), generator=own()),
    "own bernoulli_": lambda ids: empty(ids, 60).bernoulli_(0.5, generator=own()),
    "own multinomial": lambda ids: torch.multinomial(torch.ones(len(ids), 60), 10, generator=own()),
    "own rrelu": lambda ids: torch.ops.aten.rrelu_with_noise(-VALUES[ids].abs(), VALUES[ids], 0.1, 0.3, True, own()),
}
# What belongs to no record: the same in every microbatch.
SHARED = {
    "rand of no axis": lambda ids: torch.rand(()),
    "rand of one": lambda ids: torch.rand(1),
    "rand of positions": lambda ids: torch.rand(5, 13),
    "dropout of positions": lambda ids: F.dropout(torch.ones(5, 13)),
    "randperm": lambda ids: torch.randperm(60),
    "multinomial": lambda ids: torch.multinomial(torch.ones(60), 10),
    "multinomial of as many as examples": lambda ids: torch.multinomial(torch.ones(4), 20, replacement=True),
    "own rand": lambda ids: torch.rand(5, 13, generator=own()),
    "own randperm": lambda ids: torch.randperm(60, generator=own()),
    "random": lambda ids: torch.tensor([random.random() for _ in range(5)]),
    "numpy": lambda ids: torch.tensor(np.random.rand(5)),
}


@contextlib.contextmanager
def by_place(key, ids):
    """A plant: torch's own draws under a seed."""
    torch.manual_seed(key)
    yield


@contextlib.contextmanager
def moving_on(key, ids):
    """A plant: a stream that goes on from one microbatch to the next."""
    torch.manual_seed(key + int(ids.sum()))
    random.seed(key + int(ids.sum()))
    np.random.seed(key + int(ids.sum()))
    yield


def drawn(compute, ids, *, key=1, mode=RecordDraws):
    """What is drawn for a microbatch, twice in a row."""
    ids = torch.tensor(ids)
    with seeded(key), mode(key, ids):
        first, second = compute(ids), compute(ids)
    assert first.shape == second.shape == compute(ids).shape and first.dtype == compute(ids).dtype
    return first, second


def assert_follows_the_record(compute, mode=RecordDraws):
    def parts(ids, **settings):
        """{(record id, number of the call): what is drawn}"""
        calls = drawn(compute, ids, mode=mode, **settings)
        return {
            (one, call): part
            for call, whole in enumerate(calls)
            for one, part in zip(ids, whole.unflatten(0, (len(ids), -1)), strict=True)
        }

    here = parts(IDS)
    for ids in ELSEWHERE:
        there = parts(ids)
        assert all(torch.equal(here[one], there[one]) for one in here.keys() & there.keys())
        assert len(there) == 2 * len(set(ids))
    others = parts(IDS, key=2)
    different = [*here.values(), *others.values()]
    assert not any(torch.equal(a, b) for place, a in enumerate(different) for b in different[:place])


@pytest.mark.parametrize("compute", BY_RECORD.values(), ids=BY_RECORD)
def test_a_draw_for_examples_follows_the_record_the_call_and_the_key(compute):
    if compute is attention:  # records differ, and so would what is drawn for nothing
        compute = lambda ids: (attention(ids) / F.scaled_dot_product_attention(*[VALUES[ids]] * 3)).float()  # noqa: E731
    assert_follows_the_record(compute)


@pytest.mark.parametrize("compute", BY_RECORD.values(), ids=BY_RECORD)
def test_a_draw_that_follows_the_place_is_caught(compute):
    with pytest.raises(AssertionError):
        assert_follows_the_record(compute, by_place)


def test_copies_of_a_record_get_its_draws():
    first, _ = drawn(BY_RECORD["rand"], [4, 8, 8, 8])
    assert torch.equal(first[1], first[2]) and torch.equal(first[1], first[3])


def assert_is_shared(compute, mode=RecordDraws):
    first, second = drawn(compute, IDS, mode=mode)
    for ids in ([7, 11, 5, 3], [1, 2, 3, 4]):
        assert all(map(torch.equal, drawn(compute, ids, mode=mode), (first, second)))
    assert not torch.equal(first, second)
    assert not torch.equal(first, drawn(compute, IDS, key=2, mode=mode)[0])


@pytest.mark.parametrize("compute", SHARED.values(), ids=SHARED)
def test_a_draw_for_no_example_is_the_same_in_every_microbatch(compute):
    assert_is_shared(compute)


@pytest.mark.parametrize("compute", SHARED.values(), ids=SHARED)
def test_a_stream_that_goes_on_from_microbatch_to_microbatch_is_caught(compute):
    with pytest.raises(AssertionError):
        assert_is_shared(compute, moving_on)


# Nothing but the draws is changed


def assert_only_the_draws_change(rrelu, bernoulli_, rand, multinomial):
    """Facts that hold whatever is drawn."""
    x = -torch.ones(4, 6)
    slopes = -rrelu(x, training=True)
    assert (slopes >= 1 / 8).all() and (slopes <= 1 / 3).all() and torch.equal(x, -torch.ones(4, 6))
    certain = torch.tensor([1.0, 0.0, 0.0, 1.0])  # for each of four columns, not of four examples
    target = torch.full((4, 5, 4), 0.5)
    assert bernoulli_(target, certain) is target and torch.equal(target, certain.expand(4, 5, 4))
    out = torch.zeros(4, 6)
    assert rand(4, 6, out=out) is out and (out > 0).all()
    assert multinomial(torch.tensor([0.0, 0.0, 1.0, 0.0]), 3, replacement=True).tolist() == [2, 2, 2]


HONEST = {"rrelu": F.rrelu, "bernoulli_": torch.Tensor.bernoulli_, "rand": torch.rand, "multinomial": torch.multinomial}
PLANTED = {
    "rrelu": lambda x, training: x,
    "bernoulli_": lambda x, p: x.copy_(p[:, None, None].expand_as(x)),
    "rand": lambda *size, out: out.copy_(torch.rand(*size)).clone(),
    "multinomial": lambda p, n, replacement: torch.cat([torch.multinomial(one, n, True) for one in p[p > 0].split(1)]),
}


def test_nothing_but_the_draws_is_changed():
    with seeded(0), RecordDraws(0, torch.arange(4)):
        assert_only_the_draws_change(**HONEST)


@pytest.mark.parametrize("name", PLANTED)
def test_operators_that_are_divided_wrongly_are_caught(name):
    with pytest.raises(AssertionError):
        assert_only_the_draws_change(**{**HONEST, name: PLANTED[name]})


def test_a_user_s_generator_is_replaced_and_left_alone():
    generator = own()
    with seeded(0), RecordDraws(0, torch.arange(4)):
        found = torch.rand(4, 3, generator=generator)
    assert torch.equal(generator.get_state(), own().get_state())
    assert not torch.equal(found, torch.rand(4, 3, generator=own()))


@pytest.mark.parametrize(
    "compute",
    [
        lambda: F.scaled_dot_product_attention(*[VALUES[:4]] * 3),
        lambda: F.dropout(VALUES[:4], training=False),
        lambda: F.rrelu(VALUES[:4], training=False),
        lambda: VALUES[:4] + 1,
    ],
    ids=["attention", "dropout", "rrelu", "sum"],
)
def test_what_drops_nothing_is_computed_at_once_and_counts_as_no_draw(compute):
    """Nothing is seeded for it: the generator stands where it stood."""
    with seeded(0):
        position = Position()
        with RecordDraws(0, torch.arange(4)), Watch() as watch:
            found = compute()
        assert not watch.drew and not position.moved() and torch.equal(found, compute())
        with RecordDraws(0, torch.arange(4)), Watch() as watch:  # had it drawn, it would be seen
            F.dropout(compute())
        assert watch.drew and position.moved()


def test_a_kernel_that_draws_by_itself_is_refused():
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with seeded(0), RecordDraws(0, torch.arange(4)):
        fused(*[VALUES[:4]] * 3, 0.0)
        with pytest.raises(ModelError, match="by place"):
            fused(*[VALUES[:4]] * 3, 0.5)


def untagged(tag):
    """Operators that take a generator and are not tagged."""
    for schema in torch._C._jit_get_all_schemas():
        if schema.name.startswith("aten::") and any("Generator" in str(one.type) for one in schema.arguments):
            overloads = getattr(torch.ops.aten, schema.name.removeprefix("aten::"), None)
            operator = getattr(overloads, schema.overload_name or "default", None)
            if operator is not None and tag not in operator.tags:
                yield schema.name.removeprefix("aten::")


def test_every_operator_that_takes_a_generator_is_tagged_as_drawing():
    of_generators = {"manual_seed", "seed", "initial_seed"}
    of_torchscript = {"_no_grad_uniform_", "_no_grad_normal_"}  # which calls the operators that are tagged
    assert set(untagged(torch.Tag.nondeterministic_seeded)) <= of_generators | of_torchscript
    assert "bernoulli_" in set(untagged(torch.Tag.pointwise))  # another tag would be seen


# Statistics of what is drawn

KEPT, RECORDS, WIDTH, MICROBATCH = 0.7, 4096, 64, 64
Z = 5.5  # a normal deviate lies farther out with probability 4e-8; four statistics, the skewed ones below 1e-7 each


def masks(function=F.dropout, mode=RecordDraws):
    """0 or 1 for each entry that dropout kept, of records by id `(RECORDS, WIDTH)`."""
    found = []
    with seeded(0):
        for ids in torch.arange(RECORDS).split(MICROBATCH):
            with mode(7, ids):
                found.append(function(torch.ones(MICROBATCH, WIDTH), 1 - KEPT) > 0)
    return torch.cat(found).double()


def assert_independent_bernoulli(masks_RW):
    """False alarms, over random keys: less than one in a million."""
    centred, variance = masks_RW - KEPT, KEPT * (1 - KEPT)
    assert abs(centred.mean().item()) / (variance / centred.numel()) ** 0.5 < Z
    for axis in (0, 1):  # means of positions, then of records, spread as those of independent entries do
        squares = centred.mean(axis).square() / (variance / centred.shape[axis])
        assert abs(squares.mean().item() - 1) / (2 / len(squares)) ** 0.5 < Z
    neighbours = (centred[1:] * centred[:-1]).mean().item() / variance
    assert abs(neighbours) * centred[1:].numel() ** 0.5 < Z


def test_dropout_keeps_what_it_should_of_every_record_and_position():
    assert_independent_bernoulli(masks())


@contextlib.contextmanager
def once_for_all(key, ids):
    """A plant: all microbatches get the same masks."""
    torch.manual_seed(key)
    yield


class OneByteOfSeed(RecordDraws):
    """A plant: records share 256 seeds."""

    def __init__(self, key, ids):
        super().__init__(key, ids % 256)


@pytest.mark.parametrize(
    "planted",
    [
        {"mode": once_for_all},
        {"mode": OneByteOfSeed},
        {"function": lambda x, p: F.dropout(x, p + 0.01)},
        {"function": lambda x, p: F.dropout(x[:, :1], p).expand_as(x)},
        {"function": lambda x, p: F.dropout(x[:1], p).expand_as(x)},
    ],
    ids=["same in every microbatch", "few seeds", "another rate", "same for all positions", "same for all records"],
)
def test_masks_that_are_not_independent_or_of_another_rate_are_caught(planted):
    with pytest.raises(AssertionError):
        assert_independent_bernoulli(masks(**planted))


# The global generators


def draw_from_all():
    return random.random(), np.random.rand(), torch.rand(()).item()


GLOBAL = {"random": random.random, "numpy": np.random.rand, "numpy, normal": np.random.randn, "torch": torch.randn}
STREAMS = {
    "random": (random.getstate, random.setstate),
    "numpy": (np.random.get_state, np.random.set_state),
    "torch": (torch.random.get_rng_state, torch.random.set_rng_state),
}


@contextlib.contextmanager
def all_but(name, key):
    """A plant: `seeded`, but one stream stays where it was left."""
    get, put = STREAMS[name]
    with seeded(key):
        yield
        left = get()
    put(left)


def assert_streams_go_on_as_if_nothing_had_been(*, raises, seeded=seeded):
    reseed(3)
    np.random.randn()  # of which numpy keeps a second one
    states = random.getstate(), torch.random.get_rng_state()
    arrays = np.random.get_state()
    with contextlib.suppress(ZeroDivisionError), seeded(5):
        draw_from_all()
        np.random.randn()
        if raises:
            raise ZeroDivisionError
    assert random.getstate() == states[0] and torch.equal(torch.random.get_rng_state(), states[1])
    for before, after in zip(arrays, np.random.get_state(), strict=True):
        assert np.array_equal(before, after)


@pytest.fixture
def unmoved():
    """Tests that seed the global generators give them back."""
    with seeded(0):
        yield


@pytest.mark.usefixtures("unmoved")
@pytest.mark.parametrize("raises", [False, True])
def test_seeding_gives_all_streams_back_even_after_an_error(raises):
    assert_streams_go_on_as_if_nothing_had_been(raises=raises)


@pytest.mark.usefixtures("unmoved")
@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_that_is_not_given_back_is_caught(name):
    with pytest.raises(AssertionError):
        assert_streams_go_on_as_if_nothing_had_been(raises=False, seeded=partial(all_but, name))


def test_all_streams_follow_the_key():
    found = []
    for key in (1, 2, 1, 2**64 - 1):
        with seeded(key):
            found.append(draw_from_all())
    assert found[0] == found[2]
    assert all(len({found[place][stream] for place in (0, 1, 3)}) == 3 for stream in range(3))


def assert_every_move_is_seen(name, position):
    assert not position.moved() and not position.torch_moved()
    GLOBAL[name](*[1] * (name == "torch"))
    assert position.moved() and position.torch_moved() == (name == "torch")


@pytest.mark.usefixtures("unmoved")
@pytest.mark.parametrize("name", GLOBAL)
def test_a_position_sees_every_global_generator_move(name):
    assert_every_move_is_seen(name, Position())


class NotLooking(Position):
    """A plant: for it, one stream is always where it was."""

    def __init__(self, name):
        super().__init__()
        self._put, self._state = STREAMS[name][1], STREAMS[name][0]()

    def moved(self):
        self._put(self._state)
        return super().moved()


@pytest.mark.usefixtures("unmoved")
@pytest.mark.parametrize("name", STREAMS)
def test_a_position_that_does_not_look_at_a_generator_is_caught(name):
    with pytest.raises(AssertionError):
        assert_every_move_is_seen(name, NotLooking(name))


class Devices:
    """What torch.cuda says of two devices, or of devices that nobody has used yet."""

    def __init__(self, used):
        self.used, self.states = used, [torch.zeros(16), torch.zeros(16)]

    def is_initialized(self):
        return self.used

    def get_rng_state_all(self):
        assert self.used  # asking would start the devices
        return [state.clone() for state in self.states]


@pytest.mark.parametrize("used", [True, False])
def test_a_position_sees_the_generators_of_cuda_devices_move_if_they_are_in_use(used):
    devices = Devices(used)
    position = Position(devices)
    assert not position.torch_moved()
    devices.states[1][3] = 1
    assert position.torch_moved() == position.moved() == used


def test_a_position_sees_that_cuda_devices_came_into_use():
    devices = Devices(False)
    position = Position(devices)
    devices.used = True
    assert position.torch_moved()


# Draws are noticed


def noisy(generator=None):
    return torch.rand(4, 3, generator=generator)


@pytest.mark.parametrize(("by_operator", "generator"), [(False, None), (True, None), (True, own())])
def test_draws_are_noticed_once_and_made_by_record_from_then_on(by_operator, generator):
    calls, drawing = [], Drawing(by_operator=by_operator)

    def compute():
        calls.append(None)
        return noisy(generator)

    expected, _ = drawn(lambda ids: noisy(), IDS)
    for expected_calls in (2, 3):
        with seeded(1):
            assert torch.equal(drawing.by_record(compute, 1, torch.tensor(IDS)), expected)
        assert drawing.seen and not drawing.by_operator and len(calls) == expected_calls


def test_without_looking_at_operators_a_user_s_generator_would_not_be_noticed():
    drawing, generator = Drawing(), own()
    with seeded(1):
        found = drawing.by_record(lambda: noisy(generator), 1, torch.tensor(IDS))
    assert not drawing.seen and torch.equal(found, noisy(own()))


def test_what_draws_nothing_is_computed_once():
    calls = []
    for by_operator in (True, False):
        drawing = Drawing(by_operator=by_operator)
        with seeded(1):
            drawing.by_record(lambda: calls.append(None) or VALUES + 1, 1, torch.tensor(IDS))
        assert not drawing.seen and not drawing.by_operator
    assert len(calls) == 2


def test_numbers_that_were_drawn_before_it_was_noticed_do_not_count():
    """The first and the second computation start from the same place of Python's and numpy's streams."""
    drawing, seen = Drawing(), []
    with seeded(1):
        drawing.by_record(lambda: seen.append(draw_from_all()[:2]) or noisy(), 1, torch.tensor(IDS))
    assert len(seen) == 2 and seen[0] == seen[1]
