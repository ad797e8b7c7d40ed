# SPDX-License-Identifier: Apache-2.0
import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dpquant.backends.doubles import SharedScale, Wrapped
from dpquant.backends.quantize import quantize_rows
from dpquant.backends.reference import Reference
from dpquant.engine.context import StepContext
from dpquant.engine.layers import (
    QuantConv2d,
    QuantLinear,
    current_precisions,
    prepare,
    quantizable_layers,
    running,
    set_policy,
    set_precisions,
)
from dpquant.errors import FormatError, ModelError, SettingError
from dpquant.formats import precision
from dpquant.rounding import derive_key, row_keys
from networks import Reused, images, loss, zoo
from processor import REFUSAL, backends_of

CONVOLUTIONS = [
    {"stride": 2, "padding": 1},
    {"dilation": 2, "groups": 2},
    {"padding": "same", "kernel_size": (3, 5)},
    {"padding": 2, "padding_mode": "reflect", "bias": False},
    {"padding": (0, 1), "padding_mode": "circular"},
    {"padding": 1, "padding_mode": "replicate", "stride": (2, 1)},
]


def assert_same_layer(original, twin, x):
    """Values and all gradients, to float32 rounding."""
    results = []
    for layer in (original, twin):
        inputs = x.clone().requires_grad_()
        y = layer(inputs)
        results.append((y, *torch.autograd.grad(y.square().sum(), (inputs, *layer.parameters()))))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
def test_a_convolution_in_full_precision_is_the_original(options):
    torch.manual_seed(0)
    original = nn.Conv2d(4, 6, **{"kernel_size": 3, **options})
    twin = prepare(copy.deepcopy(original))
    assert isinstance(twin, QuantConv2d)
    assert_same_layer(original, twin, torch.randn(3, 4, 9, 8))


@pytest.mark.parametrize("shape", [(5, 6), (5, 3, 6), (2, 3, 4, 6), (0, 6)])
def test_a_linear_layer_in_full_precision_is_the_original(shape):
    original = nn.Linear(6, 4)
    twin = prepare(copy.deepcopy(original))
    assert isinstance(twin, QuantLinear)
    assert_same_layer(original, twin, torch.randn(shape))


def test_a_linear_layer_says_what_input_it_wants():
    with pytest.raises(ModelError, match=r"\(B, \.\.\., 6\)"):
        prepare(nn.Linear(6, 4))(torch.randn(5, 7))


LAYERS = {
    "vectors": (lambda: nn.Linear(6, 4), (3, 6)),
    "positions": (lambda: nn.Linear(6, 4), (3, 5, 6)),
    "1x1": (lambda: nn.Conv2d(6, 4, 1), (3, 6, 5, 4)),
    "3x3": (lambda: nn.Conv2d(6, 4, 3), (3, 6, 5, 4)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", LAYERS)
def test_an_output_may_be_overwritten(name, dtype):
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    original, x = make().to(dtype), torch.randn(shape, dtype=dtype)
    twin = prepare(copy.deepcopy(original).float()).to(dtype)
    results = []
    for layer in (original, twin):
        inputs = x.clone().requires_grad_()
        y = F.relu(layer(inputs), inplace=True)
        results.append((y, *torch.autograd.grad(y.square().sum(), (inputs, *layer.parameters()))))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


class Viewing(Wrapped):
    """A backend whose products are views."""

    def pack(self, weight, geometry, *, max_code):
        packed = self.inner.pack(weight, geometry, max_code=max_code)
        honest = packed.forward
        packed.forward = lambda x, bias: honest(x, bias)[:]
        return packed


def test_an_output_may_be_overwritten_whatever_a_backend_gives():
    layer = prepare(nn.Conv2d(1, 4, 3), backend=Viewing(Reference()))
    set_policy(layer, [""])
    y = F.relu(layer(torch.randn(3, 1, 3, 3)), inplace=True)
    assert bool((y >= 0).all())


def prepared_or_refused(format, backend):
    """A layer `4 -> 6, 3x3`; None where this processor does not run the format's codes: then it has been refused."""
    layer = nn.Conv2d(4, 6, 3, padding=1)
    if backend in backends_of(format):
        return prepare(layer, format=format, backend=backend)
    with pytest.raises(FormatError, match=f"{REFUSAL}|scales per block"):
        prepare(layer, format=format, backend=backend)
    return None


@pytest.mark.parametrize("backend", ["simulate", "int8"])
@pytest.mark.parametrize("recipe", ["luq-fp4", "luq", "int4,int4@4+,e3m0~", "int8"])
def test_a_quantized_layer_multiplies_dequantized_operands(recipe, backend):
    torch.manual_seed(0)
    if (layer := prepared_or_refused(recipe, backend)) is None:
        return
    set_policy(layer, [""])
    x = torch.randn(3, 4, 7, 7, requires_grad=True)
    run = StepContext(key=5, record_ids=torch.tensor([7, 8, 9]))
    with running(layer, run):
        y = layer(x)
        grad = torch.randn_like(y)
        grad_x, grad_weight, grad_bias = torch.autograd.grad(y, (x, layer.weight, layer.bias), grad)
    codes_x = layer.backend.quantize(
        x.detach(), layer.chosen.forward.activation, run.draw_keys(layer, "activation", 0, 3)
    )
    codes_g = layer.backend.quantize(grad, layer.chosen.forward.gradient, run.draw_keys(layer, "gradient", 0, 3))
    xd, gd = codes_x.dequantize().double().requires_grad_(), codes_g.dequantize().double()
    wd = _quantized_weight(layer, run).double().requires_grad_()
    reference = F.conv2d(xd, wd, layer.bias.double().detach(), padding=1)
    expected_x, expected_weight = torch.autograd.grad(reference, (xd, wd), gd)
    for ours, theirs in ((y, reference), (grad_x, expected_x), (grad_weight, expected_weight)):
        torch.testing.assert_close(ours.double(), theirs.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad_bias, grad.sum((0, 2, 3)))
    assert not torch.allclose(y, F.conv2d(x, layer.weight, layer.bias, padding=1), rtol=1e-3)


def _quantized_weight(layer, run, recipe=None, dim=0):
    """The weight's values, with a scale for each channel of `dim` where the recipe wants that."""
    role = (recipe or layer.chosen.forward).weight
    weight = layer.weight.detach().transpose(0, dim)
    rows = weight.flatten(1) if role.per_channel else weight.reshape(1, -1)
    rows = weight if role.blocks else rows
    keys = row_keys(derive_key(run.key, layer.name, "weight"), torch.arange(len(rows)))
    if not role.per_channel:
        rows = layer.weight.detach().reshape(1, -1)
    values = quantize_rows(rows, role, keys).dequantize()
    return values.view(weight.shape).transpose(0, dim) if role.per_channel else values.view(layer.weight.shape)


MIXED = [
    "full/luq-fp4/luq-fp4",
    "luq/full/full",
    "full/full/luq-fp4",
    "full/luq-fp4/full",
    "luq-fp4/int8/luq",
    "int4@2.5#,int4@2.5,e3m0~",
    "int4-clip",
    "e3m0~#,e3m0~,e3m0~",
    "mxfp4",
    "nvfp4",
    "luq/nvfp4/full",
]


def products_of(layer, x, grad):
    """Forward, dgrad and wgrad of a layer `4 -> 6, 3x3` as it computes them."""
    run = StepContext(key=5, record_ids=torch.tensor([7, 8, 9]))
    with running(layer, run):
        y = layer(x)
        return run, (y, *torch.autograd.grad(y, (x, layer.weight), grad))


def expected_products(layer, run, x, grad):
    """The same in float64, each from operands in its own recipe."""

    def operand(role, value, recipe, dim=0):
        if recipe is None:
            return value.detach().double()
        if role == "weight":
            return _quantized_weight(layer, run, recipe, dim).double()
        keys = run.draw_keys(layer, role, 0, 3)
        return layer.backend.quantize(value.detach(), getattr(recipe, role), keys).dequantize().double()

    results = []
    for number, recipe in enumerate(layer.precision.recipes):
        xd = operand("activation", x, recipe).requires_grad_()
        wd = operand("weight", layer.weight, recipe, dim=number % 2).requires_grad_()
        y = F.conv2d(xd, wd, layer.bias.double().detach(), padding=1)
        results.append((y, *torch.autograd.grad(y, (xd, wd), operand("gradient", grad, recipe)))[number].detach())
    return results


@pytest.mark.parametrize("backend", ["simulate", "int8"])
@pytest.mark.parametrize("text", MIXED)
def test_every_product_runs_in_its_own_recipe(text, backend):
    torch.manual_seed(0)
    if (layer := prepared_or_refused(text, backend)) is None:
        return
    set_policy(layer, [""])
    x, grad = torch.randn(3, 4, 7, 7, requires_grad=True), torch.randn(3, 6, 7, 7)
    run, found = products_of(layer, x, grad)
    for ours, theirs in zip(found, expected_products(layer, run, x, grad), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    # had a product run in another recipe, it would be seen
    layer.precision = precision("int8/full/int8" if text == "full/luq-fp4/full" else "full/full/full")
    others = expected_products(layer, run, x, grad)
    assert not all(torch.allclose(a.double(), b, rtol=1e-3) for a, b in zip(found, others, strict=True))


def test_a_precision_that_the_backend_cannot_run_is_refused():
    layer = prepare(nn.Conv2d(4, 6, 3), format="luq-fp4", backend="int8")
    with pytest.raises(FormatError, match="int8"):
        set_precisions(layer, {"": precision("fp8")})
    assert not layer.quantized
    with pytest.raises(SettingError, match="body"):
        set_precisions(layer, {"body": precision("luq-fp4")})


def output(model, x, ids, key=3):
    with running(model, StepContext(key=key, record_ids=torch.as_tensor(ids, dtype=torch.int64))), torch.no_grad():
        return model(x)


def all_quantized(name, backend="auto"):
    model, (x, _) = zoo()[name]
    model = prepare(model, backend=backend)
    set_policy(model, quantizable_layers(model))
    return model, x


def assert_each_output_is_its_examples_own(model, x):
    """Neither the company of other examples, nor their order, size or layout in memory, changes an output."""
    whole = output(model, x, range(len(x)))
    torch.testing.assert_close(output(model, x[[4, 1]], [4, 1]), whole[[4, 1]])
    torch.testing.assert_close(output(model, x.contiguous(memory_format=torch.channels_last), range(len(x))), whole)
    for size in (1e3, 1e6):
        louder = torch.cat([x[:1] * size, x[1:]])
        torch.testing.assert_close(output(model, louder, range(len(x)))[1:], whole[1:])


@pytest.mark.parametrize("backend", ["simulate", "int8"])
@pytest.mark.parametrize("name", ["strided", "residual"])
def test_an_examples_output_depends_on_its_record_and_on_nothing_else(name, backend):
    assert_each_output_is_its_examples_own(*all_quantized(name, backend))


def test_a_scale_over_the_batch_is_caught():
    with pytest.raises(AssertionError):
        assert_each_output_is_its_examples_own(*all_quantized("strided", SharedScale(Reference())))


def test_draws_follow_the_step_and_the_record():
    model, x = all_quantized("strided")
    first = output(model, x, range(6))
    assert torch.equal(output(model, x, range(6)), first)
    for other in (output(model, x, range(6), key=4), output(model, x, range(10, 16))):
        assert (other != first).flatten(1).any(1).all()


@pytest.mark.parametrize("shape", [(5, 6), (5, 3, 6), (2, 3, 4, 6), (0, 6)])
def test_a_quantized_linear_layer_is_a_convolution_over_its_positions(shape):
    torch.manual_seed(0)
    layer = prepare(nn.Linear(6, 4))
    twin = prepare(nn.Conv2d(6, 4, 1))
    twin.load_state_dict({"weight": layer.weight[:, :, None, None], "bias": layer.bias})
    for each in (layer, twin):
        set_policy(each, [""])
    x = torch.randn(shape)
    as_image = x.reshape(shape[0], -1, 6).transpose(1, 2)[..., None] if shape[0] else x[:, :, None, None]
    ours, theirs = output(layer, x, range(shape[0])), output(twin, as_image, range(shape[0]))
    torch.testing.assert_close(ours, theirs[..., 0].transpose(1, 2).reshape(*shape[:-1], 4))


def test_each_call_of_a_reused_layer_draws_anew():
    layer = prepare(nn.Linear(64, 3))
    set_policy(layer, [""])
    x = torch.randn(2, 64)
    with running(layer, StepContext(key=0, record_ids=torch.arange(2))) as run, torch.no_grad():
        first, second = layer(x), layer(x)
        run.begin(torch.arange(2))
        again = layer(x)
    assert torch.equal(first, again) and not torch.equal(first, second)


def test_preparing_keeps_parameters_state_hooks_and_sharing():
    torch.manual_seed(0)
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.Conv2d(1, 2, 3))
    state, parameters = copy.deepcopy(model.state_dict()), list(model.parameters())
    heard = []
    shared.register_forward_hook(lambda *a: heard.append(1))
    prepared = prepare(model)
    assert prepared is model and model[0] is model[2] and list(quantizable_layers(model)) == ["0", "3"]
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
    model[0](torch.randn(1, 4))
    assert heard == [1]


def test_a_prepared_model_can_be_copied_pickled_and_prepared_again():
    model = prepare(Reused())
    set_policy(model, ["head"])
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert tuple(current_precisions(other)) == ("head",)
    prepare(model, format="int8", backend="simulate")
    layers = quantizable_layers(model).values()
    assert {(layer.chosen.forward.name, layer.backend.name) for layer in layers} == {("int8", "simulate")}


def test_subclasses_of_layers_are_left_alone():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    assert not quantizable_layers(prepare(nn.Sequential(Scaled(3, 3))))


def test_what_cannot_be_prepared_is_refused():
    with pytest.raises(ModelError, match=r"torch\.nn\.Module"):
        prepare(lambda x: x)
    with pytest.raises(ModelError, match="float32"):
        prepare(nn.Linear(2, 2).double())
    with pytest.raises(FormatError, match="format"):
        prepare(nn.Linear(2, 2), format="fp3")
    with pytest.raises(FormatError, match="int8"):
        prepare(nn.Linear(2, 2), format="fp8", backend="int8")


def test_a_policy_names_known_layers():
    model = prepare(Reused())
    set_policy(model, ["layer"])
    assert tuple(current_precisions(model)) == ("layer",)
    set_policy(model, ())
    assert tuple(current_precisions(model)) == ()
    with pytest.raises(SettingError, match=r"'body'.*layer, head"):
        set_policy(model, ["body"])


def test_a_policy_of_a_model_that_was_not_prepared_is_refused():
    with pytest.raises(SettingError, match=r"call dpquant\.prepare"):
        set_policy(nn.Sequential(nn.Linear(2, 2)), ["0"])


def test_layers_leave_their_pass_even_after_an_error():
    model = prepare(Reused())
    with pytest.raises(RuntimeError, match="planted"), running(model, StepContext(key=0)):
        raise RuntimeError("planted")
    assert all(layer.current is None for layer in quantizable_layers(model).values())


def test_fp8_runs_simulated():
    model, batch = zoo()["strided"]
    model = prepare(model, format="fp8")
    set_policy(model, quantizable_layers(model))
    loss(model, batch).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_a_layer_that_is_not_finite_for_one_example_is_so_for_that_one():
    model = prepare(nn.Conv2d(1, 2, 3))
    set_policy(model, [""])
    x, _ = images(3)
    x[1, 0, 0, 0] = float("nan")
    y = model(x)
    assert y[1].isnan().all() and y[[0, 2]].isfinite().all()


def test_draws_follow_key_layer_role_call_and_record_and_nothing_else():
    model = prepare(zoo()["strided"][0], backend="simulate")
    first, last = list(quantizable_layers(model).values())

    def keys(key=1, layer=first, role="activation", call=0, ids=(4, 7, 9)):
        return StepContext(key=key, record_ids=torch.tensor(ids)).draw_keys(layer, role, call, len(ids)).tolist()

    others = [keys(key=2), keys(layer=last), keys(role="gradient"), keys(call=1)]
    assert len({one for found in (keys(), *others) for one in found}) == 15
    assert keys(ids=(9, 4, 3))[:2] == [keys()[2], keys()[0]]  # wherever a record stands


@pytest.mark.parametrize("share", [0, 1])
def test_features_of_a_sequence_stay_adjacent(share):
    """Otherwise torch's fused attention refuses what comes out of a layer, and other operators copy it."""
    model = prepare(nn.Sequential(nn.Linear(8, 6)), format="luq-fp4", backend="simulate")
    set_policy(model, list(quantizable_layers(model))[:share])
    x = torch.randn(3, 5, 8, requires_grad=True)
    y = model(x)
    (grad,) = torch.autograd.grad(y, x, torch.randn(3, 5, 6))
    assert (y.stride(), grad.stride()) == ((30, 6, 1), (40, 8, 1))


def test_a_convolution_would_make_positions_adjacent():
    x = torch.randn(3, 5, 8).transpose(1, 2).unsqueeze(3).contiguous(memory_format=torch.channels_last)
    y = F.conv2d(x, torch.randn(6, 8, 1, 1)).squeeze(3).transpose(1, 2)
    assert y.shape == (3, 5, 6) and y.stride() == (30, 1, 5)
