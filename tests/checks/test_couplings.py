# SPDX-License-Identifier: Apache-2.0
"""Random small models with one random coupling of their examples each: all are refused, and none without one is.

A coupling sits in an input, an activation, the losses, the gradient alone, the quantizer alone, in what is kept from
call to call, in random numbers that follow places, or in the collate function. It may be weak, and active in one mode
only. Each group is also tried with that part of the check disabled which has to see it: then a coupling goes through.
"""

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import default_collate

from dpquant.backends.reference import Reference
from dpquant.checks.isolation import Findings, check_isolation
from dpquant.checks.probe import Probe
from dpquant.checks.synthetic import Specimens, candidates
from dpquant.engine import layers
from dpquant.engine.batches import leaves, with_leaves
from dpquant.engine.passes import Objective
from dpquant.errors import DataError, ModelError
from dpquant.formats import precision

CLASSES, WORDS, WIDTH = 5, 12, 6
LUQ, INT4 = precision("luq-fp4"), precision("luq")  # INT4: activations in another format than gradients
HONEST = Reference()


class Scale(nn.Module):
    """A factor that begins at zero."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return self.factor * x


class Net(nn.Module):
    """A body for its kind of input, something between, an extra that begins at zero, and a head."""

    def __init__(self, kind, extra="", dropout=0.0):
        super().__init__()
        self.kind, self.extra = kind, extra
        if kind == "vectors":
            self.body, self.table = nn.Linear(5, WIDTH), nn.Embedding(WORDS, WIDTH)
        elif kind == "images":
            self.body, self.norm = nn.Conv2d(1, WIDTH, 3, stride=2), nn.GroupNorm(2, WIDTH)
        else:
            self.table, self.body = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.dropout, self.head = nn.Dropout(dropout), nn.Linear(WIDTH, CLASSES)
        if extra == "gates":
            self.branch, self.gate, self.second = nn.Linear(WIDTH, WIDTH), Scale(), Scale()
        elif extra == "adapter":
            self.down, self.up = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, WIDTH, bias=False)
            nn.init.zeros_(self.up.weight)
        elif extra == "head":
            nn.init.zeros_(self.head.weight)

    def forward(self, of, between=lambda net, h: h):
        if self.kind == "vectors":
            h = self.body(of["x"]) + self.table(of["z"])
        elif self.kind == "images":
            h = self.norm(self.body(of["x"].to(self.head.weight.dtype) / 4)).flatten(2).mean(2)
        else:
            kept = of["mask"].to(self.head.weight.dtype)[..., None]
            h = (self.body(torch.tanh(self.table(of["ids"]))) * kept).sum(1) / (1 + of["length"])[:, None]
        h = self.dropout(torch.tanh(between(self, h)))
        if self.extra == "gates":
            h = h + self.second(self.gate(torch.tanh(self.branch(h))))
        elif self.extra == "adapter":
            h = h + self.up(self.down(h))
        return self.head(h)


RECORDS = {
    "vectors": {"x": torch.zeros(5), "z": torch.tensor(0), "y": torch.tensor(0)},
    "images": {"x": torch.zeros(1, 7, 7), "y": torch.tensor(0)},
    "bytes": {"x": torch.zeros(1, 7, 7, dtype=torch.uint8), "y": torch.tensor(0)},
    "texts": {"ids": torch.zeros(4).long(), "mask": torch.zeros(4).bool(), "length": torch.tensor(1),
              "y": torch.tensor(0)},
    "float masks": {"ids": torch.zeros(4).long(), "mask": torch.zeros(4), "length": torch.tensor(1.0),
                    "y": torch.tensor(0)},
}  # fmt: skip
KINDS = {"bytes": "images", "float masks": "texts"}
SHAPES = {
    "a mapping": dict,
    "a tuple": lambda record: tuple(record.values()),
    "nested": lambda record: ([{"inner": value} for value in list(record.values())[:-1]], (record["y"],)),
}


def unchanged(model, of):
    return of


@dataclasses.dataclass
class Case:
    """A model, a record of its data, its loss and a collate function; a subject of the check."""

    name: str
    model: Net
    record: Any
    loss: Callable = None
    collate: Callable = default_collate

    def __post_init__(self):
        self.loss = self.loss or self.honest

    def honest(self, model, batch):
        return self.losses(model, batch)

    def losses(self, model, batch, *, change=unchanged, between=unchanged, finish=lambda of, logits, losses: losses):
        """The losses with something done to the inputs, to an activation, or to the losses."""
        of = change(model, dict(zip(RECORDS[self.name], (leaf for _, leaf in leaves(batch)), strict=True)))
        logits = model(of, between)
        return finish(of, logits, F.cross_entropy(logits, of["y"], reduction="none"))

    def coupled(self, *, strength=1.0, modes=(True, False), **coupling):
        """The same with a coupling in the losses, of some strength and in some modes only."""

        def loss(model, batch):
            honest = self.losses(model, batch)
            if model.training not in modes:
                return honest
            return (1 - strength) * honest + strength * self.losses(model, batch, **coupling)

        return dataclasses.replace(self, loss=loss)

    def check(self, *quantized, backend=HONEST, probe=Probe, specimens=lambda honest: honest) -> Findings:
        """Check it, with doubles of parts of the check."""
        model = layers.prepare(self.model, backend=backend)
        records = map(specimens, candidates([self.record], self.collate, torch.device("cpu")))
        return check_isolation(Objective(model, self.loss), records, quantized=quantized, probe=probe)


def case_of(name="vectors", shape="a tuple", extra="", dropout=0.0, training=True, seed=0):
    torch.manual_seed(seed)
    return Case(name, Net(KINDS.get(name, name), extra, dropout).train(training), SHAPES[shape](RECORDS[name]))


@st.composite
def cases(draw, dropouts=(0.0, 0.0, 0.3)):
    names, extras = st.sampled_from(list(RECORDS)), st.sampled_from(["", "gates", "adapter", "head"])
    shapes, dropouts = st.sampled_from(list(SHAPES)), st.sampled_from(dropouts)
    return case_of(
        draw(names), draw(shapes), draw(extras), draw(dropouts), draw(st.booleans()), draw(st.integers(0, 3))
    )


def trials(count):
    return settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        database=None,
    )


def assert_refused(case, *quantized, **doubles):
    with pytest.raises((ModelError, DataError)):
        case.check(*quantized, **doubles)


@trials(12)
@given(cases(), st.sampled_from([(LUQ,), (LUQ, INT4)]))
def test_a_model_without_a_coupling_is_accepted(case, quantized):
    assert set(case.check(*quantized).macs) == set(layers.quantizable_layers(case.model))


# Couplings of values: in an input, an activation, the losses.

OF_FLOATS = {
    "the mean": lambda x: x - x.mean(0),
    "the largest": lambda x: x / (1e-3 + x.abs().amax()),
    "the deviation": lambda x: x / (0.1 + x.std(0, correction=0)),
    "the next": lambda x: x.roll(1, 0),
    "the sum so far": lambda x: x.cumsum(0),
    "in order": lambda x: x.sort(0).values,
    "the second": lambda x: x + x[1 % len(x)],
    "softmax": lambda x: x.softmax(0),
    "ranks": lambda x: x * x.detach().argsort(0).argsort(0),
    "no outliers": lambda x: x.clamp(max=x.detach().median()),
}
OF_INTEGERS = {
    "the mean": lambda x: x + x.double().mean(0).round().long(),
    "the largest": lambda x: x.amax(0).expand_as(x),
    "the next": lambda x: x.roll(1, 0),
    "the sum so far": lambda x: x.cumsum(0),
    "in order": lambda x: x.sort(0).values,
    "the third": lambda x: x + x[-1],
}
IN_ACTIVATIONS = OF_FLOATS | {
    "attention over the batch": lambda h: h + (h @ h.T).softmax(1) @ h,
    "batch norm": lambda h: F.batch_norm(h, None, None, training=True),
}
IN_LOSSES = {
    "the mean": lambda of, logits, losses: losses.mean().expand(len(losses)),
    "softmax": lambda of, logits, losses: losses * losses.softmax(0),
    "class weights": lambda of, logits, losses: losses / torch.bincount(of["y"], minlength=CLASSES)[of["y"]],
    "negatives in the batch": lambda of, logits, losses: (logits @ logits.T).softmax(1).diagonal(),
    "the hardest": lambda of, logits, losses: losses * (losses >= losses.detach().median()),
    "the easiest": lambda of, logits, losses: losses * (losses <= losses.detach().median()),
    "a margin to the next": lambda of, logits, losses: F.relu(losses - losses.roll(1) + 1),
}


def mixed(x, how):
    if x.is_floating_point():
        return OF_FLOATS[how](x)
    if x.dtype == torch.bool:
        return OF_INTEGERS[how](x.long()) > 0
    return (OF_INTEGERS[how](x.long()) % CLASSES).to(x.dtype)


STRENGTHS, MODES = st.sampled_from([1.0, 1e-3]), st.sampled_from([(True, False), (True,), (False,)])


def in_leaf(leaf, how):
    return {"change": lambda model, of: {**of, leaf: mixed(of[leaf], how)}}


def in_activation(coupling):
    return {"between": lambda net, h: coupling(h)}


@st.composite
def coupled_by_values(draw):
    """A case with a coupling in an input, an activation or the losses, and what it is."""
    case, place = draw(cases()), draw(st.sampled_from(["input", "input", "activation", "losses"]))
    if place == "input":
        place = draw(st.sampled_from(list(RECORDS[case.name])))
        floats = RECORDS[case.name][place].is_floating_point()
        how = draw(st.sampled_from(list(OF_FLOATS if floats else OF_INTEGERS)))
        coupling = in_leaf(place, how)
    elif place == "activation":
        how = draw(st.sampled_from(list(IN_ACTIVATIONS)))
        coupling = in_activation(IN_ACTIVATIONS[how])
    else:
        how = draw(st.sampled_from(list(IN_LOSSES)))
        coupling = {"finish": IN_LOSSES[how]}
    return case.coupled(strength=draw(STRENGTHS), modes=draw(MODES), **coupling), f"{place}: {how}"


@trials(120)
@given(coupled_by_values())
def test_a_coupling_of_inputs_activations_or_losses_is_refused(drawn):
    assert_refused(drawn[0])


LEADING = {
    "scale by the largest": in_activation(lambda h: h / h.abs().amax()),
    "nothing above the median": in_activation(lambda h: h.clamp(max=h.detach().median())),
    "the hardest alone": {"finish": IN_LOSSES["the hardest"]},
    "the easiest alone": {"finish": IN_LOSSES["the easiest"]},
}


@pytest.mark.parametrize("name", ["images", "bytes"])
@pytest.mark.parametrize("coupling", LEADING.values(), ids=LEADING)
def test_a_coupling_that_one_record_leads_is_refused_though_it_is_not_felt_by_that_one(coupling, name):
    assert_refused(case_of(name, extra="head").coupled(**coupling))


# Couplings of gradients: the losses do not show them.

OF_GRADIENTS = {
    "the mean": lambda g: g - g.mean(0),
    "the norm": lambda g: g / (1e-9 + g.norm()),
    "the largest": lambda g: g / (1e-9 + g.abs().amax()),
    "clipped together": lambda g: g * (1e-4 / g.norm()).clamp(max=1),
    "the next": lambda g: g.roll(1, 0),
    "agreement": lambda g: g * (g * g.sum(0) > 0),
}


class Backward(torch.autograd.Function):
    """The identity, with another gradient."""

    @staticmethod
    def forward(ctx, x, how):
        ctx.how = how
        return x.view_as(x)

    @staticmethod
    def backward(ctx, *grads):
        return OF_GRADIENTS[ctx.how](grads[0]), None


def hooked(h, how):
    if h.requires_grad:
        h.register_hook(OF_GRADIENTS[how])
    return h


def by_hook_or_function(how, hook):
    return in_activation(lambda h: hooked(h, how) if hook else Backward.apply(h, how))


@trials(30)
@given(cases(), st.sampled_from(list(OF_GRADIENTS)), st.booleans(), STRENGTHS, MODES)
def test_a_coupling_of_gradients_alone_is_refused(case, how, hook, strength, modes):
    assert_refused(case.coupled(strength=strength, modes=modes, **by_hook_or_function(how, hook)))


# A scale over the batch, in the quantizer alone.


class OneScale(Reference):
    """A backend that quantizes operands of one role with the batch's largest scale."""

    def __init__(self, role):
        self.role = role

    def quantize(self, x, role, row_keys):
        q = super().quantize(x, role, row_keys)
        return dataclasses.replace(q, scale=q.scale.amax().expand_as(q.scale).clone()) if role == self.role else q


OF_ROLES = {role: OneScale(getattr(INT4.recipes[0], role)) for role in ("activation", "gradient")}


@trials(16)
@given(cases(), st.sampled_from(list(OF_ROLES)))
def test_a_scale_over_the_batch_in_the_quantizer_is_refused(case, role):
    assert_refused(case, INT4, backend=OF_ROLES[role])


@trials(6)
@given(cases())
def test_a_scale_over_the_batch_of_all_operands_is_refused(case):
    assert_refused(case, LUQ, backend=OneScale(LUQ.recipes[0].activation))  # the gradient's too


# What is kept from call to call.


class Memory:
    """Something between, that remembers; a new one for each trial."""

    def __init__(self, net, what, after):
        self.what, self.after, self.calls, self.kept = what, after, 0, 0.0
        if what in ("a buffer", "a count in a buffer"):
            net.register_buffer("kept", torch.zeros(()))

    def __call__(self, net, h):
        self.calls += 1
        old, late = self.kept, self.calls > self.after
        self.kept = h.detach().mean()
        match self.what:
            case "the last mean":
                return h + 1e-2 * old
            case "the number of calls":
                return h * (1 + 1e-3 * self.calls)
            case "the mean, later" if late:
                return h - h.mean(0)
            case "a buffer" if late:
                net.kept.add_(h.detach().mean())
            case "a count in a buffer":
                net.kept.add_(1)
        return h


@trials(20)
@given(
    cases(),
    st.sampled_from(["the last mean", "the number of calls", "the mean, later", "a buffer", "a count in a buffer"]),
    st.integers(0, 5),
)
def test_a_model_that_keeps_something_from_call_to_call_is_refused(case, what, after):
    assert_refused(case.coupled(between=Memory(case.model, what, after)))


# Random numbers that follow places, or that mix examples.

AT_RANDOM = {
    "flipped": lambda h: h + torch.randn(len(h)).flip(0)[:, None],
    "transposed": lambda h: h + torch.randn(5 * len(h)).view(5, len(h)).T[:, :1],
    "shuffled": lambda h: h[torch.randperm(len(h))],
    "mixup": lambda h: h + 0.3 * h[torch.randperm(len(h))],
    "ranks": lambda h: h + torch.rand(len(h)).argsort()[:, None],
    "the sum so far": lambda h: h + torch.rand(len(h)).cumsum(0)[:, None],
    "the largest": lambda h: h * torch.rand(len(h), 1).amax(),
    "python's": lambda h: h + torch.tensor([random.random() for _ in h])[:, None],
    "numpy's": lambda h: h + torch.from_numpy(np.random.rand(len(h), 1)).to(h),
}


@trials(24)
@given(cases(), st.sampled_from(list(AT_RANDOM)))
def test_random_numbers_that_follow_places_or_mix_examples_are_refused(case, how):
    assert_refused(case.coupled(**in_activation(AT_RANDOM[how])))


# Collate functions.


def over(change):
    """The usual collation with something done to the batch."""
    return lambda records: change(default_collate(records))


def of_first(batch, change):
    numbers = iter(range(99))
    return with_leaves(batch, lambda leaf: change(leaf) if next(numbers) == 0 else leaf)


def value(record):
    return float(next(leaf for _, leaf in leaves(record)).float().sum())


COLLATES = {
    "mixes": over(lambda batch: of_first(batch, lambda x: ((x + x.roll(1, 0)) / 2).to(x.dtype))),
    "standardises": over(lambda batch: of_first(batch, lambda x: (x - x.double().mean(0)).to(x.dtype))),
    "moves one leaf": over(lambda batch: of_first(batch, lambda x: x.roll(1, 0))),
    "sorts": lambda records: default_collate(sorted(records, key=value)),
    "reverses": lambda records: default_collate(records[::-1]),
    "shuffles": lambda records: default_collate(random.sample(records, len(records))),
    "drops the last": lambda records: default_collate(records[: max(len(records) - 1, 1)]),
    "drops repetitions": lambda records: default_collate(list({value(r): r for r in records}.values())),
    "repeats the first": lambda records: default_collate([records[0]] * len(records)),
    "adds one": lambda records: default_collate([*records, records[0]]),
    "two views each": lambda records: default_collate([r for record in records for r in (record, record)]),
}


@trials(24)
@given(cases(), st.sampled_from(list(COLLATES)))
def test_a_collate_function_that_mixes_or_moves_records_is_refused(case, how):
    assert_refused(dataclasses.replace(case, collate=COLLATES[how]))


def to_the_longest(records):
    ids = nn.utils.rnn.pad_sequence([record["ids"] for record in records], batch_first=True)
    mask = nn.utils.rnn.pad_sequence([record["mask"] for record in records], batch_first=True)
    return {
        "ids": ids,
        "mask": mask,
        **default_collate([{k: record[k] for k in ("length", "y")} for record in records]),
    }


def test_padding_to_the_longest_is_refused_where_layers_run_quantized():
    case = dataclasses.replace(case_of("texts", "a mapping"), collate=to_the_longest)
    case.check()
    assert_refused(case, LUQ)


# The trials can fail: each group with that part disabled which has to see it.


class Equal(Specimens):
    """Batches hold copies of one record only."""

    def batch(self, order):
        return super().batch([0] * len(order))


def equal(honest):
    fields = {field.name: getattr(honest, field.name) for field in dataclasses.fields(honest)}
    return Equal(**{**fields, "variations": lambda: map(equal, honest.variations())})


class AnythingIsClose(Probe):
    tolerances = dict.fromkeys(Probe.tolerances, 1e9)


class LossesAlone(Probe):
    """Gradients are not compared."""

    def alike(self, one, other):
        return self.close(one.losses[0], other.losses[0])

    def compare_with_autograd(self):
        pass


class WithoutBuffers(Probe):
    def compare_buffers(self):
        pass


class Unshaken(Probe):
    """Parameters are probed as they are."""

    share = 0.0


def unplanted(kind):
    """A probe that does not ask whether it can see."""
    return type(f"Unplanted{kind.__name__}", (kind,), {"plant": lambda probe: None})


EQUAL, CLOSE = {"specimens": equal}, {"probe": AnythingIsClose}
MEAN = in_activation(lambda h: h - h.mean(0))
CALLS_BEFORE = 8  # of the loss before the comparisons: buffers are compared around a call of its own there
COUPLED = {
    "equal records": (EQUAL, lambda case: case.coupled(**MEAN)),
    "equal records, collated": (EQUAL, lambda case: dataclasses.replace(case, collate=COLLATES["mixes"])),
    "anything is close": (CLOSE, lambda case: case.coupled(**MEAN)),
    "anything is close, at random": (CLOSE, lambda case: case.coupled(**in_activation(AT_RANDOM["flipped"]))),
    "gradients without norm": (
        {"probe": LossesAlone},
        lambda case: case.coupled(**by_hook_or_function("the norm", True)),
    ),
    "buffers not compared": (
        {"probe": WithoutBuffers},
        lambda case: case.coupled(between=Memory(case.model, "a buffer", CALLS_BEFORE)),
    ),
}


@pytest.mark.parametrize(("disabled", "coupled"), COUPLED.values(), ids=COUPLED)
def test_without_its_part_of_the_check_a_coupling_goes_through(disabled, coupled):
    blind = {**disabled, "probe": unplanted(disabled.get("probe", Probe))}
    assert_refused(coupled(case_of()))
    assert_refused(coupled(case_of()), probe=unplanted(Probe))
    coupled(case_of()).check(**blind)


def test_a_buffer_that_changes_at_the_first_call_is_seen_where_products_are_counted():
    case = case_of()
    with pytest.raises(ModelError, match="leave the model's buffers alone; got a change of kept"):
        case.coupled(between=Memory(case.model, "a buffer", 0)).check(probe=WithoutBuffers)


@pytest.mark.parametrize("disabled", [EQUAL, CLOSE], ids=["equal records", "anything is close"])
def test_a_check_that_cannot_see_says_so(disabled):
    with pytest.raises(ModelError, match="could not see"):
        case_of().check(**disabled)


def test_a_scale_over_the_batch_goes_through_where_codes_are_not_compared():
    case_of().check(backend=OneScale(LUQ.recipes[0].activation))


def tiny(case, size=1e-4):
    """The case with matrices of this size, as of a network whose beginning is scaled down."""
    with torch.no_grad():
        for parameter in case.model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(size / parameter.abs().max())
    return case


def test_couplings_are_seen_through_tiny_matrices():
    tiny(case_of("texts")).check()
    assert_refused(tiny(case_of("texts")).coupled(**MEAN))


def test_through_tiny_matrices_as_they_are_the_check_could_not_see():
    with pytest.raises(ModelError, match="could not see"):
        tiny(case_of("texts")).check(probe=Unshaken)


def test_gates_that_begin_at_zero_are_opened():
    case_of(extra="gates").check()
    with pytest.raises(ModelError, match="could not see"):
        case_of(extra="gates").check(probe=Unshaken)
