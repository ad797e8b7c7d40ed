# SPDX-License-Identifier: Apache-2.0
"""A frozen layer quantizes its weight once for a run, keeps no codes for a weight gradient, and ends the backward pass.

Fine-tuning a part of a network is to cost what that part costs.
"""

import copy
import pickle

import pytest
import torch
from torch import nn

from dpquant.backends.doubles import Wrapped
from dpquant.backends.reference import Reference
from dpquant.engine import products
from dpquant.engine.clip import clipped_sum
from dpquant.engine.context import SharedCodes, StepContext
from dpquant.engine.layers import prepare, quantizable_layers, running, set_policy
from dpquant.engine.weight_cache import WeightCache
from dpquant.formats import RECIPES
from networks import Residual, images, loss

BATCH = images(6)
IDS = torch.arange(6)


class Counting(Wrapped):
    """Counts what is packed and quantized."""

    def __init__(self, inner):
        super().__init__(inner)
        self.packed = self.quantized = 0

    def pack(self, weight, geometry, *, max_code):
        self.packed += 1
        return super().pack(weight, geometry, max_code=max_code)

    def quantize(self, x, role, row_keys):
        self.quantized += 1
        return super().quantize(x, role, row_keys)


def network(*frozen, backend=None):
    """A prepared network, all of whose layers are quantized; parameters whose names begin so are frozen."""
    torch.manual_seed(0)
    model = Residual()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen or "none"))
    model = prepare(model, format="int8", backend=backend or Counting(Reference()))
    step(model, 0)  # the first call on a model has passes of its own
    set_policy(model, list(quantizable_layers(model)))
    return model


def step(model, number, batch=BATCH, ids=IDS):
    return clipped_sum(model, loss, batch, max_grad_norm=0.5, record_ids=ids, step=number, seed=0, microbatch_size=2)


def counted(model, number):
    """(operands packed, operands quantized) in a step of three microbatches."""
    backend = model.first.backend
    backend.packed = backend.quantized = 0
    step(model, number)
    return backend.packed, backend.quantized


def test_a_frozen_weight_is_packed_once_for_the_run():
    model = network("first", "inner")
    assert [counted(model, number)[0] for number in range(3)] == [3, 1, 1]
    model = network()
    assert [counted(model, number)[0] for number in range(3)] == [3, 3, 3]


def test_no_code_is_made_for_what_is_not_formed():
    """Three microbatches, x of three layers; g of the head alone, for its weight gradient."""
    assert counted(network("first", "inner", "norm"), 0)[1] == 3 * (3 + 1)
    assert counted(network(), 0)[1] == 3 * (3 + 3)


@pytest.mark.parametrize(("frozen", "reached"), [((), 3), (("first",), 2), (("first", "inner", "norm"), 1)])
def test_the_backward_pass_ends_at_the_lowest_trained_layer(frozen, reached):
    model, outputs = network(*frozen), []
    for layer in quantizable_layers(model).values():
        layer.register_forward_hook(lambda module, args, output: outputs.append(output.requires_grad))
    clipped_sum(model, loss, BATCH, max_grad_norm=0.5, record_ids=IDS, step=0, seed=0)
    assert sum(outputs) == reached


@pytest.mark.parametrize("frozen", [("first",), ("first", "inner"), ("inner.weight", "head.weight"), ("head",)])
@pytest.mark.parametrize("quantized", [False, True])
def test_what_is_trained_gets_the_gradients_that_it_gets_beside_trained_layers(frozen, quantized):
    """With a clipping norm that clips nothing, freezing a part changes nothing for the others, but for rounding."""
    models = network(*frozen, backend="simulate"), network(backend="simulate")
    grads = []
    for model in models:
        if not quantized:
            set_policy(model, ())
        grads.append(
            clipped_sum(model, loss, BATCH, max_grad_norm=1e6, record_ids=IDS, step=0, seed=0, microbatch_size=2).grads
        )
    assert grads[0].keys() == {name for name, p in models[0].named_parameters() if p.requires_grad} < grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-5 if not quantized else 0.2, atol=0.05 * quantized)


def test_a_frozen_layer_keeps_no_input():
    model = network("inner")
    kept = []

    class Watched(products.Convolution):
        @staticmethod
        def forward(ctx, *args):
            y = products.Convolution.forward(ctx, *args)
            kept.append((ctx.layer.name, ctx.x is not None))
            return y

    model.first.backend = model.inner.backend = model.head.backend = Reference()
    with running(model, StepContext(key=0)):
        for layer, x in ((model.first, BATCH[0]), (model.inner, torch.randn(6, 8, 8, 8))):
            layer.computed(Watched, x, layer.weight)
    assert kept == [("first", True), ("inner", False)]


# When a frozen weight changes.


def output(model, x, key=0):
    with running(model, StepContext(key=key)), torch.no_grad():
        return model(x)


@pytest.mark.parametrize("how", [lambda w: w.mul_(2), lambda w: setattr(w, "data", 2 * w)], ids=["written", "replaced"])
def test_a_frozen_weight_that_changes_is_packed_anew(how):
    model = prepare(nn.Linear(4, 3).requires_grad_(False), format="int8", backend="simulate")
    set_policy(model, [""])
    x = torch.randn(2, 4)
    before = output(model, x)
    with torch.no_grad():
        how(model.weight)
    fresh = prepare(copy.deepcopy(model), format="int8", backend="simulate")
    set_policy(fresh, [""])
    assert torch.equal(output(model, x), output(fresh, x)) and not torch.equal(output(model, x), before)


def test_a_weight_that_is_frozen_later_or_trained_again_is_rounded_as_such():
    model = prepare(nn.Linear(4, 3, bias=False), format="luq-fp4", backend="simulate")
    set_policy(model, [""])

    def codes(key):
        run = StepContext(key=key)
        output(model, torch.ones(1, 4), key)
        return model.quantize_weight(run, model.precision.forward.weight).codes

    with torch.no_grad():
        model.weight.copy_(torch.rand(3, 4))
    assert any(not torch.equal(codes(0), codes(key)) for key in range(1, 9)), "drawn anew for every step"
    model.requires_grad_(False)
    assert all(torch.equal(codes(0), codes(key)) for key in range(1, 9)), "drawn once"


def test_another_backend_packs_the_parts_of_a_frozen_attention_again():
    x = torch.randn(2, 3, 8)
    model = nn.MultiheadAttention(8, 2, batch_first=True).requires_grad_(False)
    for _ in range(2):
        model = prepare(model, format="int8", backend=Counting(Reference()))
        set_policy(model, list(quantizable_layers(model)))
        with running(model, StepContext(key=0)), torch.no_grad():
            model(x, x, x)
        assert model.backend.packed == 2, "the projections of the inputs, and that of the output"


def test_copies_and_pickles_carry_no_packed_weight():
    model = network("first")
    step(model, 0)
    assert model.first.frozen.packed and not model.head.frozen.packed
    model.first.backend = model.inner.backend = model.head.backend = Reference()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(other.first.frozen, WeightCache) and not other.first.frozen.packed


class Projections(nn.Module):
    """Three products of one input, as of an attention, or of three copies of it."""

    def __init__(self, *, copies=False):
        super().__init__()
        self.copies = copies
        self.first, self.second, self.third = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x):
        h = torch.tanh(x)
        inputs = [h.clone() for _ in range(3)] if self.copies else [h, h, h]
        return sum(layer(x) for layer, x in zip((self.first, self.second, self.third), inputs, strict=True)).mean(1)


SEQUENCES = (torch.randn(6, 4, 6, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 6)


def projected(format, **form):
    """(the sum of a step, operands quantized in it)"""
    torch.manual_seed(0)
    model = prepare(Projections(**form), format=format, backend=Counting(Reference()))
    given = {"max_grad_norm": 0.5, "record_ids": IDS, "step": 0, "seed": 0, "microbatch_size": 6}
    clipped_sum(model, loss, SEQUENCES, **given)  # the first call on a model has passes of its own
    set_policy(model, list(quantizable_layers(model)))
    return clipped_sum(model, loss, SEQUENCES, **given).grads, model.first.backend.quantized


def test_one_input_of_several_layers_is_quantized_once_where_nothing_is_drawn():
    shared, count = projected("int8")
    alone, count_of_copies = projected("int8", copies=True)
    assert (count, count_of_copies) == (1 + 3, 3 + 3)  # inputs, and the output gradients, which are rounded at random
    assert all(torch.equal(shared[name], alone[name]) for name in alone)
    assert projected("luq-fp4")[1] == 3 + 3


class ByShape(SharedCodes):
    """Takes a tensor for the last one that looked like it."""

    def of(self, source, x, role, backend, ids):
        known = [codes for _, _, codes in self._last if codes.codes.shape == x.shape]
        return known[0] if known else super().of(source, x, role, backend, ids)


def codes_are_those_of_the_tensor(shared):
    """Whether codes stay right where a tensor is written to, dies, or is read in another way or to another format."""
    backend, (int8, int4) = Reference(), (RECIPES[name].activation for name in ("int8", "luq"))

    def right(x, role=int8):
        return torch.equal(shared.of(x, x, role, backend, IDS).codes, backend.quantize(x, role, IDS).codes)

    x = torch.randn(6, 4, 3, 3)
    fine = right(x) and right(x) and right(x, int4)
    x.mul_(torch.rand(3))
    fine = fine and right(x)
    for seed in range(4):  # in memory that was just freed
        del x
        x = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(seed))
        fine = fine and right(x)
    return fine


def test_codes_are_shared_by_one_tensor_alone():
    assert codes_are_those_of_the_tensor(SharedCodes())
    assert not codes_are_those_of_the_tensor(ByShape())
