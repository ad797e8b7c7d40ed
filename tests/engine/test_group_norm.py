# SPDX-License-Identifier: Apache-2.0
"""The fused GroupNorm against float64, one example at a time, and as a part of models that are clipped per example."""

import copy
from collections.abc import Callable

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import default_collate

from dpquant.backends.quantize import native_available
from dpquant.checks.isolation import check_isolation
from dpquant.checks.refusals import check_trainable
from dpquant.checks.synthetic import from_examples
from dpquant.engine.clip import clipped_sum
from dpquant.engine.context import StepContext, twin_of
from dpquant.engine.group_norm import TapedGroupNorm
from dpquant.engine.layers import prepare, running
from dpquant.engine.passes import Objective
from dpquant.native import kernels

EPS = 1e-5
native = pytest.mark.skipif(not native_available(), reason="installed without the native module")
Norm = Callable[..., tuple[Tensor, ...]]


def maps(*shape: int, seed: int = 0, offset: float = 0.0) -> Tensor:
    """Channels-last maps of normal deviates around an offset."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + offset
    return x.contiguous(memory_format=torch.channels_last)


def group_norm(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, ...]:
    """y, mean and rstd by the native loop."""
    y, mean, rstd = torch.empty_like(x), x.new_empty(len(x), groups), x.new_empty(len(x), groups)
    arrays = [None if t is None else t.numpy() for t in (x, weight, bias, y, mean, rstd)]
    kernels.group_norm(*arrays, eps=EPS, **sizes(x, groups))
    return y, mean, rstd


def group_norm_backward(grad, x, mean, rstd, weight) -> tuple[Tensor, ...]:
    """grad_x and each example's grad_weight and grad_bias by the native loop."""
    grad_x, grad_weight, grad_bias = torch.empty_like(x), x.new_empty(x.shape[:2]), x.new_empty(x.shape[:2])
    tensors = (grad, x, weight, mean, rstd, grad_x, grad_weight, grad_bias)
    arrays = [None if t is None else t.numpy() for t in tensors]
    kernels.group_norm_backward(*arrays, **sizes(x, mean.shape[1]))
    return grad_x, grad_weight, grad_bias


def sizes(x: Tensor, groups: int) -> dict[str, int]:
    positions, threads = x.shape[2] * x.shape[3], torch.get_num_threads()
    return {"positions": positions, "channels": x.shape[1], "groups": groups, "threads": threads}


def fused(x, grad, groups, weight, bias) -> tuple[Tensor, ...]:
    """y, grad_x and each example's grad_weight and grad_bias, by the native loops."""
    y, mean, rstd = group_norm(x, groups, weight, bias)
    return y, *group_norm_backward(grad, x, mean, rstd, weight)


def by_autograd(x, grad, groups, weight, bias) -> tuple[Tensor, ...]:
    """The same in float64, one example at a time."""
    channels = x.shape[1]
    rows = []
    for x_i, grad_i in zip(x.double(), grad.double(), strict=True):
        x_i = x_i.unsqueeze(0).requires_grad_()
        gamma = (torch.ones(channels) if weight is None else weight).double().requires_grad_()
        beta = (torch.zeros(channels) if bias is None else bias).double().requires_grad_()
        y = F.group_norm(x_i, groups, gamma, beta, EPS)
        gradients = torch.autograd.grad(y, (x_i, gamma, beta), grad_i.unsqueeze(0))
        rows.append((y[0].detach(), gradients[0][0], *gradients[1:]))
    return tuple(torch.stack(parts) for parts in zip(*rows, strict=True))


def assert_right(norm: Norm, x: Tensor, grad: Tensor, *args, tolerance: float = 2e-6) -> None:
    """All four results within a tolerance, relative to the largest element of each example's."""
    names = ("y", "grad_x", "grad_weight", "grad_bias")
    for name, ours, exact in zip(names, norm(x, grad, *args), by_autograd(x, grad, *args), strict=True):
        assert ours.shape == exact.shape and ours.dtype == torch.float32, name
        sizes = exact.flatten(1).abs().amax(1).clamp(min=1e-2)
        error = (ours - exact).flatten(1).abs().amax(1) / sizes
        assert error.max() < tolerance, (name, error)


def parameters(channels: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    return maps(1, channels, 1, 1, seed=seed).flatten(), maps(1, channels, 1, 1, seed=seed + 1).flatten()


# The loops


@native
@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
    batch=st.integers(1, 4),
    groups=st.integers(1, 5),
    per_group=st.integers(1, 9),
    size=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    affine=st.booleans(),
    seed=st.integers(0, 99),
)
def test_forward_and_backward_are_those_of_float64(batch, groups, per_group, size, affine, seed):
    hypothesis.assume(per_group * size[0] * size[1] > 4)  # fewer elements can be so alike that eps decides
    channels = groups * per_group
    weight, bias = parameters(channels, seed) if affine else (None, None)
    x, grad = maps(batch, channels, *size, seed=seed), maps(batch, channels, *size, seed=seed + 1)
    assert_right(fused, x, grad, groups, weight, bias, tolerance=2e-5)


@native
@pytest.mark.parametrize("shape", [(2, 64, 32, 32), (2, 100, 9, 5), (3, 512, 4, 4), (2, 64, 1, 1), (1, 12, 1, 30)])
def test_usual_maps(shape):
    weight, bias = parameters(shape[1])
    assert_right(fused, maps(*shape), maps(*shape, seed=3), 4, weight, bias)


def in_one_pass(x, grad, groups, weight, bias) -> tuple[Tensor, ...]:
    """The variance as mean of squares less square of mean, in float32."""
    split = x.contiguous().reshape(len(x), groups, -1)
    variance = split.square().mean(2) - split.mean(2).square()
    y, mean, _ = group_norm(x, groups, weight, bias)
    return y, *group_norm_backward(grad, x, mean, (variance.clamp(min=0) + EPS).rsqrt(), weight)


def with_neighbours_sums(*args) -> tuple[Tensor, ...]:
    """Each example's parameter gradients given to the next."""
    y, grad_x, grad_weight, grad_bias = fused(*args)
    return y, grad_x, grad_weight.roll(1, 0), grad_bias.roll(1, 0)


@native
def test_a_large_mean_costs_no_more_than_the_rounding_of_x():
    weight, bias = parameters(16)
    x, grad = maps(2, 16, 12, 12, offset=300.0), maps(2, 16, 12, 12, seed=3)
    assert_right(fused, x, grad, 4, weight, bias, tolerance=1e-4)
    with pytest.raises(AssertionError, match="grad_x"):
        assert_right(in_one_pass, x, grad, 4, weight, bias, tolerance=1e-4)


@native
def test_gradients_of_another_example_would_be_seen():
    weight, bias = parameters(16)
    x, grad = maps(3, 16, 6, 6), maps(3, 16, 6, 6, seed=3)
    assert_right(fused, x, grad, 4, weight, bias)
    with pytest.raises(AssertionError, match="grad_weight"):
        assert_right(with_neighbours_sums, x, grad, 4, weight, bias)


@native
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 3e38])
@pytest.mark.parametrize("where", ["x", "grad"])
def test_an_example_changes_no_bit_of_another(where, poison):
    weight, bias = parameters(12)
    x, grad = maps(5, 12, 7, 3), maps(5, 12, 7, 3, seed=3)
    clean = fused(x, grad, 3, weight, bias)
    (x if where == "x" else grad)[2, 4] = poison
    poisoned, others = fused(x, grad, 3, weight, bias), [0, 1, 3, 4]
    for before, after in zip(clean, poisoned, strict=True):
        assert torch.equal(before[others], after[others])
    assert not torch.equal(clean[1][2], poisoned[1][2])


@native
def test_a_batch_is_its_examples_bit_for_bit_on_any_number_of_threads():
    weight, bias = parameters(24)
    x, grad = maps(6, 24, 5, 5), maps(6, 24, 5, 5, seed=3)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        together = fused(x, grad, 4, weight, bias)
        torch.set_num_threads(1)
        apart = [fused(x[i : i + 1], grad[i : i + 1], 4, weight, bias) for i in range(6)]
    finally:
        torch.set_num_threads(before)
    for whole, *singles in zip(together, *apart, strict=True):
        assert torch.equal(whole, torch.cat(singles))


@native
def test_sizes_that_do_not_agree_are_refused():
    x = maps(2, 8, 3, 3)
    for weight, groups in ((torch.ones(7), 2), (None, 3)):
        with pytest.raises(ValueError, match="sizes"):
            group_norm(x, groups, weight, None)
    y, mean, rstd = group_norm(x, 2, None, None)
    arrays = [None if t is None else t.numpy() for t in (x, None, None, y, mean, rstd)]
    for size in ("positions", "channels", "groups"):  # a division by zero would end the process
        with pytest.raises(ValueError, match="sizes"):
            kernels.group_norm(*arrays, eps=EPS, **(sizes(x, 2) | {size: 0}))
    with pytest.raises(ValueError, match="sizes"):
        group_norm_backward(maps(2, 8, 3, 4), x, mean, rstd, None)
    with pytest.raises(ValueError, match="sizes"):
        group_norm_backward(y, x, mean, rstd[:1].contiguous(), None)


@native
def test_a_constant_map_becomes_its_bias():
    x, grad, beta = torch.full_like(maps(2, 48, 7, 5), 3.0), maps(2, 48, 7, 5, seed=3), torch.full((48,), 0.5)
    y, _, grad_weight, grad_bias = fused(x, grad, 3, None, beta)
    assert torch.allclose(y, torch.full_like(y, 0.5), atol=1e-4) and not grad_weight.any()
    assert torch.allclose(grad_bias, grad.sum((2, 3)), atol=1e-5)


# The module


class Net(nn.Module):
    """Convolutions around a norm that is used twice."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.again, self.head = norm, norm, nn.Linear(8, 4)

    def forward(self, x):
        x = F.relu_(self.norm(self.first(x)))
        return self.head(F.relu(self.again(self.second(x))).mean((2, 3)))


def loss_fn(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = make()
    for name, p in model.named_parameters():
        if "norm" in name:
            nn.init.normal_(p)
    return model


def gradients(model: nn.Module, x: Tensor, bound: float = 0.5) -> dict[str, Tensor]:
    batch = [x, torch.arange(len(x)) % 4]
    ids = torch.arange(len(x))
    return clipped_sum(model, loss_fn, batch, max_grad_norm=bound, record_ids=ids, step=0, seed=0).grads


MODELS = {
    "affine": lambda: Net(nn.GroupNorm(2, 8)),
    "not affine": lambda: Net(nn.GroupNorm(2, 8, affine=False)),
    "frozen": lambda: Net(nn.GroupNorm(2, 8).requires_grad_(False)),
    "first of all": lambda: nn.Sequential(
        nn.GroupNorm(1, 3), nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ),
    "without bias": lambda: Net(_without_bias(nn.GroupNorm(2, 8))),
}


def _without_bias(norm: nn.GroupNorm) -> nn.GroupNorm:
    norm.register_parameter("bias", None)
    return norm


class Kernels:
    """The native module, whose norms are counted."""

    def __init__(self):
        self.calls = 0

    def group_norm(self, *args, **kwargs):
        self.calls += 1
        kernels.group_norm(*args, **kwargs)

    def group_norm_backward(self, *args, **kwargs):
        kernels.group_norm_backward(*args, **kwargs)


def with_kernels(model: nn.Module, own: Kernels | None) -> nn.Module:
    """The model, whose norms run on these."""
    for module in model.modules():
        if isinstance(module, TapedGroupNorm):
            module.kernels = own
    return model


@native
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_clipped_gradients_are_those_of_torch_s_norm(name, layout):
    model, x = prepare(seeded(MODELS[name])), maps(5, 3, 6, 6).contiguous(memory_format=layout)
    counted = Kernels()
    ours = gradients(with_kernels(model, counted), x)
    assert counted.calls or name == "first of all"  # before any convolution a contiguous map stays contiguous
    theirs = gradients(with_kernels(model, None), x)
    assert ours.keys() == theirs.keys()
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-4, atol=1e-6)


@native
def test_a_backward_pass_that_forgets_a_use_would_be_seen():
    class Forgetful(Kernels):
        backward_calls = 0

        def group_norm_backward(self, *args, **kwargs):
            super().group_norm_backward(*args, **kwargs)
            self.backward_calls += 1
            args[6][:] *= self.backward_calls % 2  # the gradients of the weight

    model, x = prepare(seeded(MODELS["affine"])), maps(5, 3, 6, 6)
    right = gradients(model, x)["norm.weight"]
    assert torch.allclose(gradients(with_kernels(model, Kernels()), x)["norm.weight"], right)
    assert not torch.allclose(gradients(with_kernels(model, Forgetful()), x)["norm.weight"], right, rtol=1e-2)


@pytest.mark.parametrize("name", MODELS)
def test_models_with_twins_pass_the_checks_of_isolation(name):
    model = prepare(seeded(MODELS[name]))
    assert any(isinstance(module, TapedGroupNorm) for module in model.modules())
    check_trainable(model)
    records = list(zip(maps(3, 3, 6, 6), torch.arange(3), strict=True))
    check_isolation(Objective(model, loss_fn), [from_examples(records, default_collate, torch.device("cpu"))])


@native
def test_an_example_that_is_not_finite_adds_nothing():
    counted = Kernels()
    model, x = with_kernels(prepare(seeded(MODELS["affine"])), counted), maps(4, 3, 6, 6)
    x[3, 0, 0, 0] = float("nan")
    ours, rest = gradients(model, x), gradients(model, x[:3])
    assert counted.calls
    for key in ours:
        torch.testing.assert_close(ours[key], rest[key], rtol=1e-4, atol=1e-6)


class Scaled(nn.Module):
    """A module with a parameter of its own around a norm: its gradient comes from a second evaluation."""

    def __init__(self):
        super().__init__()
        self.norm, self.factor = nn.GroupNorm(2, 8), nn.Parameter(torch.tensor([1.5]))

    def forward(self, x):
        return self.norm(x * self.factor) * self.factor


@native
def test_a_module_around_a_norm_may_be_evaluated_again():
    model, x = prepare(seeded(lambda: Net(Scaled()))), maps(4, 3, 6, 6)
    ours = gradients(model, x)
    for key, theirs in gradients(with_kernels(model, None), x).items():
        torch.testing.assert_close(ours[key], theirs, rtol=1e-4, atol=1e-6)


class ByName(Net):
    """The norm is called with its input's name the first time, as torch's own GroupNorm can be."""

    def forward(self, x):
        x = F.relu_(self.norm(input=self.first(x)))
        return self.head(F.relu(self.again(self.second(x))).mean((2, 3)))


class AroundByName(Scaled):
    """The same inside of a module with a parameter of its own."""

    def forward(self, x):
        return self.norm(input=x * self.factor)


def assert_not_clipped_it_is_autograd_s(
    make: Callable[[], nn.Module], x: Tensor, own: Kernels | None = kernels
) -> None:
    model = with_kernels(prepare(seeded(make)), own)
    ours = gradients(model, x, bound=1e9)
    loss_fn(model, [x, torch.arange(len(x)) % 4]).sum().backward()
    for name, p in model.named_parameters():
        assert torch.allclose(ours[name], p.grad, rtol=1e-4, atol=1e-5), name


BY_NAME = {"alone": lambda: ByName(nn.GroupNorm(2, 8)), "inside of another": lambda: Net(AroundByName())}


@pytest.mark.parametrize("make", BY_NAME.values(), ids=BY_NAME)
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_a_norm_called_by_keyword_is_clipped_as_any_other(make, layout):
    assert_not_clipped_it_is_autograd_s(make, maps(3, 3, 6, 6).contiguous(memory_format=layout))


@native
def test_a_norm_that_is_counted_twice_would_be_seen():
    class Doubling(Kernels):
        def group_norm_backward(self, *args, **kwargs):
            super().group_norm_backward(*args, **kwargs)
            for gradients in args[6:8]:
                gradients *= 2

    with pytest.raises(AssertionError, match=r"norm\."):
        assert_not_clipped_it_is_autograd_s(BY_NAME["alone"], maps(3, 3, 6, 6), Doubling())


def test_a_wrong_number_of_channels_is_torch_s_error():
    with torch.no_grad(), pytest.raises(RuntimeError, match="weight"):
        prepare(nn.GroupNorm(2, 8))(maps(3, 6, 4, 4))


@pytest.mark.parametrize("shape", [(4, 8), (4, 8, 5), (4, 8, 5, 3), (4, 8, 2, 3, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_outside_a_pass_it_is_torch_s_group_norm(shape, dtype):
    norm = seeded(lambda: nn.ModuleDict({"norm": nn.GroupNorm(2, 8)}))["norm"].to(dtype)
    twin = twin_of(TapedGroupNorm, copy.deepcopy(norm), tape=None)
    x = torch.randn(shape, dtype=dtype)
    if len(shape) == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    results = []
    for module in (norm, twin):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        y.square().sum().backward()
        results.append((y, leaf.grad, module.weight.grad, module.bias.grad))
    for theirs, ours in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 5)])
def test_vectors_and_sequences_are_clipped_by_torch_s_norm(shape):
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.head = nn.GroupNorm(2, 6), nn.Linear(6, 4)

        def forward(self, x):
            x = self.norm(x)
            return self.head(x.flatten(2).mean(2) if x.ndim > 2 else x)

    model, x = prepare(seeded(Other)), torch.randn(shape, generator=torch.Generator().manual_seed(0))
    ours = gradients(model, x, bound=1e9)
    model.zero_grad()
    loss_fn(model, [x, torch.arange(len(x)) % 4]).sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(ours[name], p.grad, rtol=1e-4, atol=1e-6)


def test_a_layer_norm_without_bias_is_clipped():
    model = prepare(nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4, bias=False)))
    assert gradients(model, torch.randn(3, 6))["1.weight"].any()


@native
def test_without_a_gradient_the_loops_give_the_same():
    model, x = seeded(MODELS["affine"]), maps(3, 3, 6, 6)
    expected = model(x)
    with torch.no_grad():
        torch.testing.assert_close(prepare(model)(x), expected)


@native
def test_a_gradient_may_have_any_layout_and_a_parameter_any_strides():
    counted = Kernels()
    model, x = with_kernels(prepare(seeded(MODELS["affine"])), counted), maps(3, 3, 6, 6)
    for p in model.norm.parameters():
        p.data = torch.stack([p.data, -p.data], 1)[:, 0]
    ours = gradients(model, x, bound=1e9)
    assert counted.calls
    loss_fn(model, [x, torch.arange(3)]).sum().backward()  # behind the mean over positions
    for name, p in model.named_parameters():
        torch.testing.assert_close(ours[name], p.grad, rtol=1e-4, atol=1e-6)


def test_without_a_tape_a_pass_leaves_it_to_torch():
    model, x = prepare(seeded(MODELS["affine"])), maps(3, 3, 6, 6)
    expected = model(x)
    with running(model, StepContext(key=0)):
        assert torch.equal(model(x), expected)


def test_prepare_keeps_parameters_hooks_and_state():
    model = seeded(MODELS["affine"])
    norm, state = model.norm, model.state_dict()
    seen = []
    norm.register_forward_hook(lambda *_: seen.append(None))
    assert prepare(model) is model
    assert type(model.norm) is TapedGroupNorm and model.norm is model.again
    assert model.norm.weight is norm.weight and model.norm.eps == norm.eps
    assert model.state_dict().keys() == state.keys()
    twin = model.norm
    prepare(model)
    assert model.norm is twin
    model(maps(2, 3, 6, 6))
    assert len(seen) == 2
    copied = copy.deepcopy(model)
    assert type(copied.norm) is TapedGroupNorm and copied.norm.weight is not twin.weight


def test_a_model_that_is_a_norm_and_a_norm_of_the_user_s_own():
    class Own(nn.GroupNorm):
        def forward(self, input):
            return 2 * super().forward(input)

    assert type(prepare(nn.GroupNorm(2, 4))) is TapedGroupNorm
    assert type(prepare(nn.Sequential(Own(2, 4)))[0]) is Own
