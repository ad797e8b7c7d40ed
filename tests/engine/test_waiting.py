# SPDX-License-Identifier: Apache-2.0
"""A step keeps a GPU busy: Python does not wait for the device in between, and the device computes what a CPU does."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_map

import dpquant
from dpquant.backends.doubles import Wrapped
from dpquant.backends.quantize import quantize_rows
from dpquant.backends.reference import Reference
from dpquant.engine.batches import microbatches
from dpquant.engine.clip import clipped_sum
from dpquant.engine.contributions import Lookup, distinct_and_more
from dpquant.engine.passes import Objective
from dpquant.formats import precision
from dpquant.rounding import row_keys
from dpquant.training.impact import analysis_keys, impact_sum
from elsewhere import DEVICE, Device, Elsewhere, TwoDevices, Waits
from networks import NAMES, loss, zoo

FORMATS = ("full", "int4-clip")
WITHOUT_FORMULA = ("generic",)  # whether an example alone gives its own output is read at the end of a step
STEP = {"max_grad_norm": 1.0, "step": 0, "seed": 0, "microbatch_size": 2}


def prepared(network, format, backend="simulate"):
    network = dpquant.prepare(network, format="luq-fp4" if format == "full" else format, backend=backend)
    dpquant.set_policy(network, () if format == "full" else dpquant.quantizable_layers(network))
    return network


def moved(device, network, batch):
    """Network and batch on `DEVICE`; moving them may wait."""
    network = copy.deepcopy(network)
    tied = [(module, module.weight) for module in network.modules() if isinstance(module, nn.Linear | nn.Embedding)]
    shared = [(one, other) for one, weight in tied for other, its in tied if its is weight and one is not other]
    with device.waits("set up"):
        network, batch = network.to(DEVICE), tree_map(lambda leaf: leaf.to(DEVICE), batch)
    for one, other in shared:  # a real device changes parameters in place, and leaves tied ones tied
        other.weight = one.weight
    device.waited.clear()
    return network, batch


def sums(network, batch, rows=None):
    ids = torch.arange(len(batch[1]) if rows is None else rows)
    return clipped_sum(network, loss, batch, record_ids=ids, **STEP).grads


def held(sums_there):
    assert all(type(one) is Elsewhere for one in sums_there.values())
    return {name: one.held for name, one in sums_there.items()}


def assert_close(here, there):
    assert here.keys() == there.keys()
    for name in here:
        torch.testing.assert_close(here[name], there[name], rtol=1e-5, atol=1e-6)


def of(name):
    torch.manual_seed(0)
    return zoo()[name]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", NAMES)
def test_a_step_does_not_wait(name, format):
    network, batch = of(name)
    network = prepared(network, format)
    expected = sums(network, batch)
    with Device() as device:
        network, batch = moved(device, network, batch)
        with device.waits("end of the step"):
            found = sums(network, batch)
    assert device.waited == ["end of the step"] * (name in WITHOUT_FORMULA)
    assert_close(expected, held(found))


def test_dropout_does_not_wait():
    network = prepared(nn.Sequential(nn.Linear(6, 8), nn.Dropout(), nn.Linear(8, 5)), "luq-fp4")
    batch = torch.randn(5, 6), torch.randint(0, 5, (5,))
    expected = sums(network, batch)
    with Device() as device:
        found = sums(*moved(device, network, batch))
    assert_close(expected, held(found))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", ["residual", "tokens", "generic", "norm of vectors"])
@pytest.mark.parametrize("row", [3])
def test_an_example_that_is_not_finite_contributes_zero_without_waiting(name, format, row):
    """Its loss is infinite: as on the CPU, its rows are zero and all others stay."""

    def infinite(model, batch):
        return loss(model, batch[:2]) * torch.where(batch[2], torch.inf, 1.0)

    network, batch = of(name)
    batch = (*batch, torch.arange(len(batch[1])) == row)
    network = prepared(network, format)
    ids = torch.arange(len(batch[1]))
    expected = clipped_sum(network, infinite, batch, record_ids=ids, **STEP).grads
    kept = ids != row
    without = clipped_sum(network, loss, tree_map(lambda leaf: leaf[kept], batch[:2]), record_ids=ids[kept], **STEP)
    with Device() as device:
        network, batch = moved(device, network, batch)
        with device.waits("end of the step"):
            found = clipped_sum(network, infinite, batch, record_ids=ids, **STEP).grads
    assert_close(expected, held(found))
    if format == "full":
        assert_close(without.grads, held(found))


@pytest.mark.parametrize("score", ["loss", "gradient"])
@pytest.mark.parametrize("name", ["residual", "tokens", "shared"])
def test_an_analysis_waits_once(name, score):
    network, batch = of(name)
    network = prepared(network, "full")
    ids = torch.arange(len(batch[1]))
    names = list(dpquant.quantizable_layers(network))
    settings = {"names": names, "max_norm": 0.1, "keys": analysis_keys(0, 0), "score": score}
    expected = impact_sum(Objective(network, loss), microbatches(batch, ids, 2), **settings).impacts
    with Device() as device:
        network, batch = moved(device, network, batch)
        pieces = list(microbatches(batch, ids, 2))
        with device.waits("end of the analysis"):
            found = impact_sum(Objective(network, loss), pieces, **settings).impacts
    assert device.waited == ["end of the analysis"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("clipped", ["int4-clip", "int4,int4@3+,int4~"])
def test_rows_with_and_without_negative_values_get_their_own_codes(clipped):
    role = precision(clipped).forward.activation
    x = torch.randn(6, 4, 3, 3)
    x[::2].abs_()
    keys = row_keys(1, torch.arange(6))
    here = quantize_rows(x, role, keys, kernel="torch")
    with Device() as device:
        with device.waits("set up"):
            there_x, there_keys = x.to(DEVICE), keys.to(DEVICE)
        there = quantize_rows(there_x, role, there_keys)
    assert torch.equal(here.codes, there.codes.held) and torch.equal(here.scale, there.scale.held)


def test_distinct_keys_are_found_without_their_number():
    keys = torch.randint(0, 9, (4, 7))
    found, places = distinct_and_more(keys)
    distinct = keys.unique()
    assert torch.equal(found[places], keys) and torch.equal(found[: len(distinct)], distinct)
    assert len(found) == keys.numel()
    values = torch.randn(keys.numel())
    summed = torch.zeros(len(found)).index_add_(0, places.flatten(), values)
    assert torch.equal(summed[len(distinct) :], torch.zeros(len(found) - len(distinct)))


def test_what_is_masked_is_what_was_normed():
    """The row sums of a table are not summed again: another order of additions would give other ones."""
    ids, g = torch.randint(0, 4, (3, 9)), torch.randn(3, 9, 2)
    g[1] = torch.nan
    lookup, keep = Lookup(ids, g, 4), torch.tensor([True, False, True])
    lookup.squared_norms()
    total, expected = lookup.begin_sum(), lookup.begin_sum()
    total.add(lookup.masked(keep), torch.tensor([0.5, 0.0, 2.0]))
    expected.add(lookup.take(keep.nonzero().flatten()), torch.tensor([0.5, 2.0]))
    torch.testing.assert_close(total.value(), expected.value())


# plants: each waits for the device in its own way, in the middle of a step


class Asks(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else x.neg()


class Picks(nn.Module):
    def forward(self, x):
        return x.clone().masked_fill(x == x[x > 0].sum(), 0.0)


class Fetches(nn.Module):
    def forward(self, x):
        return x + x.detach().cpu().mean().to(x.device, non_blocking=True)


class Brings(nn.Module):
    def forward(self, x):
        return x + torch.ones(3).to(x.device).sum()


class Counts(nn.Module):
    def forward(self, x):
        return x + 0 * len((x > 0).nonzero())


class Asking(Wrapped):
    """A backend that looks at the operands before it quantizes them."""

    def quantize(self, x, role, row_keys):
        assert x.isfinite().all()
        return super().quantize(x, role, row_keys)


@pytest.mark.parametrize("plant", [Asks, Picks, Fetches, Brings, Counts])
def test_a_plant_that_waits_is_caught(plant):
    network = prepared(nn.Sequential(nn.Linear(6, 8), plant(), nn.Linear(8, 5)), "full")
    batch = torch.randn(4, 6), torch.randint(0, 5, (4,))
    with Device() as device:
        network, batch = moved(device, network, batch)
        with pytest.raises(Waits):
            sums(network, batch)
        with device.waits("plant"):
            sums(network, batch)
    assert "plant" in device.waited


def test_a_backend_that_waits_is_caught():
    batch = torch.randn(4, 6), torch.randint(0, 5, (4,))
    for backend, waits in ((Wrapped(Reference()), False), (Asking(Reference()), True)):
        backend.name = "simulate"
        network = prepared(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5)), "luq-fp4", backend)
        with Device() as device:
            network, there = moved(device, network, batch)
            if waits:
                with pytest.raises(Waits):
                    sums(network, there)
            else:
                sums(network, there)


def test_operands_on_two_devices_are_caught():
    class Two(nn.Module):
        def forward(self, x):
            return x + torch.ones(8)

    network = prepared(nn.Sequential(nn.Linear(6, 8), Two(), nn.Linear(8, 5)), "full")
    with Device() as device:
        network, batch = moved(device, network, (torch.randn(4, 6), torch.randint(0, 5, (4,))))
        with pytest.raises(TwoDevices):
            sums(network, batch)


def test_the_former_ways_are_caught():
    """What steps did before on every microbatch: ask whether all norms are finite, and which rows of a table occur."""
    with Device() as device:
        with device.waits("set up"):
            norms_B, keys = torch.rand(4).to(DEVICE), torch.arange(4).to(DEVICE)
        for former in (lambda: bool(norms_B.isfinite().all()), lambda: keys.unique(return_inverse=True)):
            with pytest.raises(Waits):
                former()
        assert F.relu(norms_B).device == DEVICE
