# SPDX-License-Identifier: Apache-2.0
import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import default_collate

from dpquant.backends.doubles import BlocksOfExamples
from dpquant.backends.reference import Reference
from dpquant.checks.isolation import check_at_size, check_isolation, keeps_apart
from dpquant.checks.step import TrialStep
from dpquant.checks.synthetic import candidates
from dpquant.engine.batches import Microbatch
from dpquant.engine.context import StepContext
from dpquant.engine.layers import prepare, set_policy
from dpquant.engine.passes import Objective, losses_of
from dpquant.errors import ModelError
from dpquant.formats import precision
from networks import loss, zoo

VECTOR = (torch.zeros(4), torch.tensor(0))
IMAGE = (torch.zeros(1, 8, 8), torch.tensor(3))


class Net(nn.Module):
    """A convolution and a linear layer, with something between them."""

    def __init__(self, between=lambda net, x: x):
        super().__init__()
        self.conv, self.head, self.between = nn.Conv2d(1, 4, 3), nn.Linear(4, 5), between
        self.register_buffer("kept", torch.zeros(4))

    def forward(self, x):
        return self.head(self.between(self, F.relu(self.conv(x)).mean((2, 3))))


def keep(net, x):
    net.kept += x.detach().mean(0)
    return x


COUPLED = {
    "batch norm inside forward": lambda net, x: F.batch_norm(x, None, None, training=True),
    "difference to the batch's mean": lambda net, x: x - x.mean(0),
    "scale by the batch's maximum": lambda net, x: x / x.abs().max(),
    "a parameter behind its module's back": lambda net, x: x * net.head.weight.mean(),
    "a buffer that follows the data": keep,
    "a shape that does not fit": lambda net, x: x[:, :3],
}


def scaled_in_mode(training):
    return lambda net, x: x / x.abs().max() if net.training == training else x


class PositionsFirst(Net):
    """Its gradients are small, so that a clip by position would not show."""

    def forward(self, x):
        return self.head(1e-3 * F.relu(self.conv(x)).flatten(2).permute(2, 0, 1)).mean(0)


class PositionByPosition(Net):
    """The same in one axis, the rows of a position next to each other."""

    def forward(self, x):
        x_TBC = 1e-3 * F.relu(self.conv(x)).flatten(2).permute(2, 0, 1)
        return self.head(x_TBC.flatten(0, 1)).unflatten(0, x_TBC.shape[:2]).mean(0)


@pytest.mark.parametrize("started_in_training", [True, False])
@pytest.mark.parametrize(
    "between",
    [scaled_in_mode(True), scaled_in_mode(False), lambda net, x: F.dropout(x / x.abs().max(), 0.1)],
    ids=["in training", "in evaluation", "behind dropout"],
)
def test_coupling_is_refused_in_either_mode_and_behind_dropout(between, started_in_training):
    torch.manual_seed(0)
    model = Net(between).train(started_in_training)
    with pytest.raises(ModelError, match="that example alone"):
        checked(model)
    assert model.training == started_in_training


def test_positions_before_examples_are_accepted_and_among_them_refused():
    torch.manual_seed(0)
    assert checked(PositionsFirst())["head"] == 36 * 4 * 5
    with pytest.raises(ModelError, match="examples first"):
        checked(PositionByPosition())


def checked(model, record=IMAGE, loss_fn=loss, collate=default_collate, **settings):
    """The multiply-accumulates of a model that passes."""
    torch.manual_seed(1)
    found = check_isolation(
        Objective(prepare(model), loss_fn), candidates([record], collate, torch.device("cpu")), **settings
    )
    return found.macs


def test_blocks_of_channels_are_accepted_and_blocks_of_examples_refused():
    chosen = precision("mxfp4")
    for backend, refused in ((Reference(), False), (BlocksOfExamples(Reference()), True)):
        torch.manual_seed(0)
        objective = Objective(prepare(Net(), format=chosen, backend=backend), loss)
        specimens = candidates([IMAGE], default_collate, torch.device("cpu"))
        with pytest.raises(ModelError, match="that example alone") if refused else contextlib.nullcontext():
            check_isolation(objective, specimens, quantized=[chosen])


@pytest.mark.parametrize("between", COUPLED.values(), ids=COUPLED)
def test_coupled_examples_and_hidden_uses_are_refused(between):
    torch.manual_seed(0)
    with pytest.raises(ModelError):
        checked(Net(between))


@pytest.mark.parametrize(
    "between",
    [lambda net, x: x, lambda net, x: F.dropout(x, 0.5), lambda net, x: F.layer_norm(x, (4,)), lambda net, x: x / 2],
)
def test_separate_examples_are_accepted_and_counted(between):
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    assert checked(Net(between)) == {"conv": 6 * 6 * 4 * 9, "head": 20}
    assert torch.equal(torch.random.get_rng_state(), before) and not torch.equal(state, before)


def without_gradients(factor):
    """A loss that leaves the parameters to the noise, by a factor of its model's outputs."""
    return lambda model, batch: F.cross_entropy(model(batch[0]) * factor, batch[1], reduction="none")


@pytest.mark.parametrize("quantized", [(), [precision("luq-fp4")]], ids=["full", "quantized"])
@pytest.mark.parametrize("factor", [0.0, 0])
def test_what_a_factor_of_zero_hides_is_seen_without_it(factor, quantized):
    torch.manual_seed(0)
    checked(Net(), loss_fn=without_gradients(factor), quantized=quantized)
    with pytest.raises(ModelError, match="that example alone"):
        checked(Net(COUPLED["difference to the batch's mean"]), loss_fn=without_gradients(factor), quantized=quantized)


def test_what_hides_all_without_being_a_number_is_refused():
    torch.manual_seed(0)
    with pytest.raises(ModelError, match="could not see"):
        checked(Net(), loss_fn=without_gradients(torch.zeros(())))


def test_a_factor_of_zero_stays_in_the_objective_that_is_trained():
    torch.manual_seed(0)
    model, batch = prepare(Net()), tuple(leaf[None] for leaf in IMAGE)
    found = check_isolation(
        Objective(model, without_gradients(0.0)), candidates([IMAGE], default_collate, torch.device("cpu"))
    )
    trained, compared = (one.loss_fn(model, batch) for one in (found.objective, found.compared))
    assert torch.equal(trained, torch.full((1,), 5.0).log()) and not torch.equal(compared, trained)


def test_a_coupling_at_one_size_is_seen_behind_a_factor_of_zero():
    with pytest.raises(ModelError, match="that example alone"):
        at_size(AT_EIGHT["the mean"], 8, without_gradients(0.0))
    at_size(AT_EIGHT["the mean"], 4, without_gradients(0.0))


@pytest.mark.parametrize("name", list(zoo()))
def test_every_network_of_the_zoo_is_accepted(name):
    model, batch = zoo()[name]
    record = (batch[0][0], torch.tensor(0))
    assert sum(checked(model, record).values()) > 0


class OnAnEdge(nn.Module):
    """ReLUs whose inputs are zero but for what round-off makes of the batch's size."""

    def __init__(self, round_off):
        super().__init__()
        self.inner, self.head = nn.Linear(4, 3), nn.Linear(3, 2)
        self.round_off = round_off

    def forward(self, x):
        y = self.inner(x)
        gate = F.relu(torch.sign(1e-9 + (len(x) - 2) * self.round_off(y) * torch.ones_like(y)))
        return self.head(y * gate)


def eps_of(y):
    return -torch.finfo(y.dtype).eps


def test_a_gradient_that_jumps_where_float32_rounds_is_no_coupling():
    torch.manual_seed(0)
    model = OnAnEdge(eps_of)
    memory, values = [p.data_ptr() for p in model.parameters()], [p.clone() for p in model.parameters()]
    assert sum(checked(model, VECTOR).values()) == 18
    assert [p.data_ptr() for p in model.parameters()] == memory and model.head.weight.dtype == torch.float32
    assert all(map(torch.equal, values, model.parameters()))


@pytest.mark.parametrize("share", [1e-2, 1e-5])
def test_a_weak_coupling_is_seen_where_float64_runs(share):
    torch.manual_seed(0)
    with pytest.raises(ModelError, match="that example alone"):
        checked(Net(lambda net, x: x + share * x.mean(0)))


class InFloat32(Net):
    """Of two types in float64, an error there."""

    def forward(self, x):
        return super().forward(x.float())


def test_a_model_that_float64_cannot_run_is_tried_in_float32():
    torch.manual_seed(0)
    model = InFloat32()
    assert checked(model) == {"conv": 6 * 6 * 4 * 9, "head": 20}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    with pytest.raises(ModelError, match="that example alone"):
        checked(InFloat32(lambda net, x: x + 1e-2 * x.mean(0)))


# What is compared bit for bit in float32, and what float64 decides.


class Types(nn.Module):
    """Notes the types that it is called in; its rows differ by round-off if they are told to."""

    def __init__(self, between=lambda x: x):
        super().__init__()
        self.head, self.between, self.seen = nn.Linear(4, 3), between, []

    def forward(self, x):
        if torch.is_grad_enabled():
            self.seen.append(x.dtype)
        return self.head(self.between(x))


def by_place(x):
    """Rows that differ in their last bit: round-off, and no coupling."""
    return x * (1 + torch.finfo(x.dtype).eps * torch.arange(len(x), dtype=x.dtype)[:, None])


@pytest.mark.parametrize(("between", "passes"), [(lambda x: x, 2), (by_place, 2 + 6)], ids=["equal bits", "round-off"])
def test_float64_is_asked_where_bits_differ_and_for_autograd(between, passes):
    torch.manual_seed(0)
    model = Types(between)
    checked(model, VECTOR)
    of_values = VECTOR[0].dtype
    first = model.seen[: model.seen.index(torch.float64) + passes + 6 + 1]
    assert first.count(torch.float64) == passes and of_values in first


@pytest.mark.parametrize("share", [1e-5, 1e-7])
def test_a_coupling_that_changes_bits_alone_reaches_float64(share):
    """1e-7 is below the tolerance of float64, 1e-5 above it."""
    torch.manual_seed(0)
    model = Types(lambda x: x + share * x.mean(0))
    if share > 1e-6:
        with pytest.raises(ModelError, match="that example alone"):
            checked(model, VECTOR)
    else:
        checked(model, VECTOR)
    assert model.seen.count(torch.float64) > 2


# A weight that follows the batch.


def written(how):
    """A network whose head's weight is made of its input."""

    def between(net, x):
        with torch.no_grad():
            how(net.head.weight, 1 + x.mean())
        return x

    return between


SETS_ITS_WEIGHT = {
    "in place": lambda weight, factor: weight.copy_(torch.ones_like(weight) * factor),
    "through data": lambda weight, factor: weight.data.copy_(torch.ones_like(weight) * factor),
    "another tensor": lambda weight, factor: setattr(weight, "data", torch.ones_like(weight) * factor),
}


@pytest.mark.parametrize("how", SETS_ITS_WEIGHT.values(), ids=SETS_ITS_WEIGHT)
@pytest.mark.parametrize("settings", [{}, {"quantized": [precision("luq-fp4")]}], ids=["full", "quantized"])
def test_a_model_that_sets_its_weight_from_the_batch_is_refused(how, settings):
    torch.manual_seed(0)
    with pytest.raises(ModelError):
        checked(Net(written(how)), **settings)


def losses_before_and_after(step, how):
    """The losses of a batch in one step before and after the weight is doubled."""
    torch.manual_seed(0)
    model = prepare(nn.Linear(4, 3), backend="simulate")
    set_policy(model, [""])
    objective = Objective(model, lambda model, x: model(x).sum(1))
    piece = Microbatch(torch.randn(3, 4), torch.arange(3), 3)
    before = losses_of(objective, piece, step)
    with torch.no_grad():
        how(model.weight)
    return before, losses_of(objective, piece, step)


@pytest.mark.parametrize("how", [lambda w: w.mul_(2), lambda w: setattr(w, "data", 2 * w)], ids=["written", "replaced"])
def test_a_trial_packs_a_weight_anew_once_it_has_changed(how):
    before, after = losses_before_and_after(TrialStep(key=0), how)
    assert not torch.equal(before, after)
    assert torch.equal(*losses_before_and_after(StepContext(key=0), how))  # which a step of a run does not


def test_a_trial_packs_a_weight_once_while_it_stays():
    step = TrialStep(key=0)
    assert torch.equal(*losses_before_and_after(step, lambda weight: None))
    assert [len(cache.packed) for cache in step._weights.values()] == [1]


# At the run's own size.


def at_size(between, size, loss_fn=loss):
    torch.manual_seed(0)
    model = prepare(Net())
    candidate = candidates([IMAGE], default_collate, torch.device("cpu"))
    found = check_isolation(Objective(model, loss_fn), candidate)
    model.between = between
    check_at_size(found, size)


AT_EIGHT = {
    "the mean": lambda net, x: x - x.mean(0) if len(x) == 8 else x,
    "the largest": lambda net, x: x / x.abs().max() if len(x) == 8 else x,
    "above the median": lambda net, x: x.clamp(max=x.detach().median()) if len(x) == 8 else x,
    "the last row": lambda net, x: x * (1 + (torch.arange(len(x)) == 7)[:, None]),
    "the middle rows": lambda net, x: x * (1 + (torch.arange(len(x)) == 4)[:, None]),
}


@pytest.mark.parametrize("between", AT_EIGHT.values(), ids=AT_EIGHT)
def test_a_coupling_at_one_size_is_refused_at_that_size(between):
    with pytest.raises(ModelError, match="that example alone"):
        at_size(between, 8)
    at_size(between, 4)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_separate_examples_are_accepted_at_any_size(size):
    at_size(lambda net, x: x, size)


def test_losses_that_follow_the_size_alone_are_compared_within_that_size():
    at_size(lambda net, x: x * (1 + 0.01 * (len(x) == 8)), 8)


class MixedGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad + grad.mean(0)


class MixesGradients(nn.Module):
    """Couples examples in the backward pass alone: losses show nothing."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x):
        return MixedGradients.apply(self.layer(x))


@pytest.mark.parametrize(("model", "apart"), [(MixesGradients(), False), (nn.Sequential(nn.Linear(6, 3)), True)])
def test_the_probe_of_an_epoch_sees_a_coupling_of_gradients_alone(model, apart):
    generator = torch.Generator().manual_seed(0)
    x, labels, ids = torch.randn(5, 6, generator=generator), torch.arange(5) % 3, torch.arange(3)
    objective = Objective(prepare(model, backend="simulate"), loss)
    piece, elsewhere = (
        Microbatch((x[rows], labels[rows]), ids, 3) for rows in (torch.tensor([0, 1, 2]), torch.tensor([0, 3, 4]))
    )
    assert keeps_apart(objective, piece, elsewhere, key=0) == apart
