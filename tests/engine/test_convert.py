# SPDX-License-Identifier: Apache-2.0
"""What fix replaces and what it leaves alone, and that restore leaves nothing of ours behind."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

import dpquant
from dpquant.backends.algebra import ROUND_OFF
from dpquant.checks.refusals import check_trainable
from dpquant.engine.clip import clipped_sum
from dpquant.engine.convert import ChannelAffine, FrozenBatchNorm, fix, restore
from dpquant.engine.layers import prepare, quantizable_layers, set_policy
from dpquant.errors import ModelError, SettingError
from dpquant.formats import precision
from dpquant.training.start import make_private
from networks import Residual, images, loss, zoo


def used(model, x):
    """The model after it has learnt some statistics and weights."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
        for _ in range(3):
            model.train()(x)
    return model


# ---------------------------------------------------------------------------------------------------- fix, GroupNorm


def test_batch_norm_becomes_group_norm_in_a_copy():
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8))
    fixed = fix(model)
    assert type(fixed[1]) is nn.GroupNorm and type(model[1]) is nn.BatchNorm2d
    assert torch.equal(fixed[0].weight, model[0].weight) and fixed[0].weight is not model[0].weight


@pytest.mark.parametrize("channels", [1, 7, 8, 24, 32, 48, 64, 100, 2048])
@pytest.mark.parametrize("kind", [nn.BatchNorm2d, nn.BatchNorm3d])
def test_norms_of_images_get_the_groups_that_opacus_gives_them(kind, channels):
    theirs = pytest.importorskip("opacus.validators").ModuleValidator.fix(kind(channels))
    ours = fix(kind(channels))
    assert (ours.num_groups, ours.num_channels, ours.eps) == (theirs.num_groups, channels, theirs.eps)


@pytest.mark.parametrize(
    ("channels", "groups"), [(3, 1), (7, 1), (16, 1), (17, 1), (32, 2), (48, 3), (64, 4), (100, 5), (512, 32)]
)
@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.SyncBatchNorm])
def test_norms_that_may_see_vectors_get_groups_of_several_channels(kind, channels, groups):
    assert fix(kind(channels)).num_groups == groups


def test_a_single_vector_can_be_normalised_whatever_its_length():
    for channels in range(3, 200):
        fixed = fix(nn.BatchNorm1d(channels))
        assert channels % fixed.num_groups == 0 and channels // fixed.num_groups >= min(channels, 16)
        assert fixed(torch.randn(1, channels)).shape == (1, channels)


@pytest.mark.parametrize("channels", [1, 2])
def test_one_and_two_channels_are_scaled_and_shifted_only(channels):
    fixed = fix(nn.BatchNorm1d(channels))
    assert type(fixed) is ChannelAffine
    for shape in ((4, channels), (4, channels, 5)):
        x = torch.randn(shape)
        assert torch.equal(fixed(x), x)
        with torch.no_grad():
            fixed.weight.fill_(3), fixed.bias.fill_(1)
        assert torch.equal(fixed(x), 3 * x + 1)
        with torch.no_grad():
            fixed.weight.fill_(1), fixed.bias.fill_(0)
    x = torch.randn(4, channels)
    assert torch.equal(fix(nn.BatchNorm1d(channels, affine=False))(x), x)


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d])
def test_settings_of_the_norm_are_kept(kind):
    norm = kind(64, dtype=torch.float64).eval()
    norm.weight.requires_grad_(False)
    with torch.no_grad():
        norm.weight.fill_(7)
    fixed = fix(norm)
    assert fixed.weight.dtype == fixed.bias.dtype == torch.float64 and not fixed.training and fixed.affine
    assert not fixed.weight.requires_grad and fixed.bias.requires_grad
    assert torch.equal(fixed.weight, torch.ones_like(norm.weight)) and not fixed.bias.any()
    assert fix(kind(64, device="meta")).weight.device.type == "meta"
    without = fix(kind(64, affine=False))
    assert without.weight is None and without.bias is None and not without.affine and without.training


def test_a_norm_without_a_bias_gets_none():
    norm = nn.BatchNorm2d(8)
    norm.register_parameter("bias", None)
    fixed = fix(norm)
    assert fixed.weight is not None and fixed.bias is None
    assert fixed(torch.randn(2, 8, 3, 3)).shape == (2, 8, 3, 3)


def test_a_norm_in_two_places_stays_one():
    norm = nn.BatchNorm2d(4)
    fixed = fix(nn.Sequential(nn.Conv2d(4, 4, 1), norm, nn.Sequential(nn.ReLU(), norm)))
    assert type(fixed[1]) is nn.GroupNorm and fixed[1] is fixed[2][1]


def test_frozen_and_plain_norms_are_replaced_too():
    model = nn.Sequential(nn.BatchNorm2d(4).requires_grad_(False), nn.BatchNorm2d(4, affine=False), nn.Conv2d(4, 4, 1))
    check_trainable(fix(model))


class Renamed(nn.BatchNorm2d):
    """Another constructor, the same function."""

    def __init__(self, channels):
        super().__init__(channels, momentum=0.01)


class Activated(nn.BatchNorm2d):
    """Another function: what it does besides would be lost with it."""

    def forward(self, input):
        return F.relu(super().forward(input))


def test_a_subclass_is_replaced_only_if_it_computes_the_same():
    assert type(fix(Renamed(8))) is nn.GroupNorm
    with pytest.raises(ModelError, match=r"got 0\.1 \(Activated\).*forward method of its own"):
        fix(nn.Sequential(nn.Sequential(nn.ReLU(), Activated(8))))


def vectors():
    torch.manual_seed(0)
    hidden = 32
    return nn.Sequential(
        nn.Linear(6, hidden), nn.BatchNorm1d(hidden), nn.ReLU(),
        nn.Linear(hidden, 1), nn.BatchNorm1d(1), nn.Linear(1, 5),
    )  # fmt: skip


def privately_trained(model):
    """The largest change of each parameter in a short private run."""
    generator = torch.Generator().manual_seed(0)
    records = TensorDataset(torch.randn(100, 6, generator=generator), torch.randint(0, 5, (100,), generator=generator))
    plan = dpquant.PrivacyPlan(
        noise_multiplier=1.0, delta=1e-5, max_grad_norm=1.0, sample_rate=0.1, expected_batch_size=10, steps=10
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    run = make_private(
        model, torch.optim.SGD(model.parameters(), lr=0.1), records, plan=plan, loss_fn=loss, policy=dpquant.AllPolicy()
    )
    for epoch in run.epochs():
        for batch in epoch:
            run.step(batch)
    return {name: float((p.detach() - before[name]).abs().max()) for name, p in run.model.named_parameters()}


def test_a_network_of_vectors_trains_privately():
    moved = privately_trained(fix(vectors()))
    assert set(moved) == set(dict(vectors().named_parameters())) and all(moved.values())


def passed_on(norm):
    """What is left of a gradient behind the norm, for the usual one of some vectors."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 32, generator=generator, requires_grad=True)
    (grad,) = torch.autograd.grad(norm(x), x, torch.randn(64, 32, generator=generator))
    return float(grad.abs().median())


def test_a_gradient_passes_the_replacement_of_a_norm_of_vectors():
    assert passed_on(fix(nn.BatchNorm1d(32))) > 0.1


def test_none_passes_where_groups_have_two_channels():
    assert passed_on(nn.GroupNorm(16, 32)) < 1e-4


# ------------------------------------------------------------------------------------------ fix, what stays as it was


@pytest.mark.parametrize("name", sorted(zoo()))
def test_a_model_without_batch_norm_computes_the_same_bits(name):
    model, batch = zoo()[name]
    fixed = fix(model)
    assert fixed is not model and torch.equal(fixed(batch[0]), model(batch[0]))
    assert [type(m) for m in fixed.modules()] == [type(m) for m in model.modules()]
    ours = {p.data_ptr() for p in fixed.parameters()}
    assert ours.isdisjoint(p.data_ptr() for p in model.parameters()) and len(ours) == len(list(model.parameters()))


class Attentive(nn.Module):
    """Attention of the kind that Opacus' fixer changes, and a recurrent layer, both frozen."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True).requires_grad_(False)
        self.recurrent = nn.LSTM(8, 8, batch_first=True).requires_grad_(False)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x, _ = self.attention(x, x, x)
        return self.head(self.recurrent(x)[0].mean(1))


def test_frozen_attention_and_recurrent_layers_are_left_alone():
    torch.manual_seed(0)
    model, x = Attentive(), torch.randn(3, 5, 8)
    fixed = fix(model)
    assert type(fixed.attention) is nn.MultiheadAttention and type(fixed.recurrent) is nn.LSTM
    assert torch.equal(fixed(x), model(x))


@pytest.mark.parametrize("part", [nn.LSTM(2, 2), nn.GRU(2, 2), nn.RNN(2, 2), nn.MultiheadAttention(2, 1)])
def test_trainable_ones_need_no_fixing(part):
    fixed = fix(nn.Sequential(nn.Linear(2, 2), nn.ModuleDict({"inner": part})))
    assert type(fixed[1]["inner"]) is type(part)


def test_instance_norm_forgets_its_statistics():
    x = torch.randn(3, 4, 5, 5)
    model = nn.Sequential(nn.InstanceNorm2d(4, affine=True, track_running_stats=True), nn.Conv2d(4, 2, 1))
    fixed = fix(model)
    assert torch.equal(fixed(x), model.train()(x))
    assert model[0].track_running_stats and not fixed[0].track_running_stats
    assert torch.equal(fixed.eval()(x), fixed.train()(x))
    assert not list(fixed.buffers())
    check_trainable(fixed)


def test_statistics_that_stay_would_follow_the_data():
    """Switching the attribute off is not enough: torch goes on updating buffers that are there."""
    norm = nn.InstanceNorm2d(4, track_running_stats=True)
    norm.track_running_stats = False
    norm(torch.randn(3, 4, 5, 5) + 7)
    assert norm.running_mean.abs().min() > 0.1


# ------------------------------------------------------------------------------------------------------- fix, freeze


def resnet18():
    from torchvision.models import resnet18

    torch.manual_seed(0)
    return resnet18(num_classes=5)


def test_frozen_statistics_compute_what_evaluation_does():
    x = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    model = used(resnet18(), x)
    expected = model.eval()(x)
    frozen = fix(model.train(), batch_norm="freeze")
    for training in (True, False):
        torch.testing.assert_close(frozen.train(training)(x), expected, rtol=1e-5, atol=1e-5)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in frozen.modules())
    check_trainable(frozen)
    assert {"bn1.scale", "bn1.shift"} < frozen.state_dict().keys() and "bn1.weight" not in frozen.state_dict()
    assert {name for name, _ in frozen.named_parameters()} == {
        name for name, _ in model.named_parameters() if "bn" not in name and "downsample.1" not in name
    }


def test_statistics_of_the_batch_would_be_seen():
    x = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    model = used(resnet18(), x)
    expected = model.eval()(x)
    assert (model.train()(x) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        (nn.BatchNorm1d, (4, 3)),
        (nn.BatchNorm1d, (4, 3, 5)),
        (nn.BatchNorm2d, (4, 3, 5, 5)),
        (nn.BatchNorm3d, (4, 3, 2, 5, 5)),
    ],
)
def test_every_norm_can_be_frozen(kind, shape, affine):
    x = 3 * torch.randn(shape) + 1
    norm = used(kind(3, affine=affine, eps=0.1), x).eval()
    frozen = fix(norm, batch_norm="freeze")
    assert type(frozen) is FrozenBatchNorm and not list(frozen.parameters()) and not frozen.training
    torch.testing.assert_close(frozen(x), norm(x), rtol=1e-5, atol=1e-5)
    assert sorted(frozen.state_dict()) == ["scale", "shift"]


def test_a_frozen_network_trains_privately():
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5))
    frozen = fix(used(model, torch.randn(20, 6)), batch_norm="freeze")
    before = copy.deepcopy(dict(frozen.named_buffers()))
    assert all(privately_trained(frozen).values())
    assert all(torch.equal(buffer, before[name]) for name, buffer in frozen.named_buffers())


def test_norms_without_statistics_cannot_be_frozen():
    model = nn.Sequential(nn.BatchNorm2d(4, track_running_stats=False))
    with pytest.raises(ModelError, match=r"got 0 \(BatchNorm2d\).*no running statistics.*batch_norm='group'"):
        fix(model, batch_norm="freeze")
    assert type(fix(model)[0]) is nn.GroupNorm


# ------------------------------------------------------------------------------------------------------ fix, refusals


def test_an_unknown_word_is_refused():
    with pytest.raises(SettingError, match="group, freeze; got batch_norm='layer'"):
        fix(nn.Linear(2, 2), batch_norm="layer")


@pytest.mark.parametrize("function", [fix, restore])
def test_only_modules_are_taken(function):
    with pytest.raises(ModelError, match=r"torch\.nn\.Module; got a function"):
        function(lambda x: x)


def test_wrapped_models_are_refused_with_a_way_out():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    with pytest.raises(ModelError, match=r"got the model \(OptimizedModule\).*model\._orig_mod"):
        fix(torch.compile(model))
    with pytest.raises(ModelError, match=r"got the model \(DataParallel\).*model\.module"):
        fix(nn.DataParallel(model))
    parallel = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(parallel)  # the rest needs other processes
    parallel.module = model
    with pytest.raises(ModelError, match=r"got the model \(DistributedDataParallel\).*model\.module"):
        fix(parallel)
    with pytest.raises(ModelError, match=r"got 0 \(OptimizedModule\)"):
        fix(nn.Sequential(torch.compile(model)))


def test_a_norm_without_a_shape_is_refused():
    model = nn.Sequential(nn.Linear(2, 2), nn.LazyBatchNorm1d())
    with pytest.raises(ModelError, match=r"got 1 \(LazyBatchNorm1d\).*no shape yet"):
        fix(model)
    model(torch.randn(4, 2))
    fix(model)


def test_a_model_that_cannot_be_copied_is_refused():
    model = Residual()
    model.last = model(torch.randn(1, 1, 8, 8))  # not a leaf
    with pytest.raises(ModelError, match="can be copied"):
        fix(model)


# ------------------------------------------------------------------------------------------------------------ restore


def prepared(model):
    """Prepared, with all layers quantized."""
    model = prepare(model)
    set_policy(model, quantizable_layers(model))
    return model


@pytest.mark.parametrize("name", sorted(zoo()))
def test_a_restored_model_is_what_it_was(name):
    model, batch = zoo()[name]
    kinds, state = [type(m) for m in model.modules()], [set(vars(m)) for m in model.modules()]
    parameters, expected = list(model.parameters()), model(batch[0])
    restored = restore(prepared(model))
    assert [type(m) for m in restored.modules()] == kinds
    assert [set(vars(m)) for m in restored.modules()] == state
    assert all(a is b for a, b in zip(restored.parameters(), parameters, strict=True))
    assert torch.equal(restored(batch[0]), expected)
    assert b"dpquant" not in pickle.dumps([m for m in restored.modules() if type(m).__module__.startswith("torch")])


def test_what_is_not_taken_away_would_be_seen():
    restored, state = restore(prepare(nn.Linear(2, 2))), set(vars(nn.Linear(2, 2)))
    assert set(vars(restored)) == state and b"dpquant" not in pickle.dumps(restored)
    restored.precision = precision("luq-fp4")
    assert set(vars(restored)) != state and b"dpquant" in pickle.dumps(restored)


@pytest.mark.parametrize("plain", [nn.Conv2d(2, 4, 3), nn.Linear(2, 4), nn.GroupNorm(2, 4)])
def test_a_model_that_is_a_layer_comes_back_as_a_layer(plain):
    twin = prepare(plain)
    assert type(twin) is not type(plain)
    assert type(restore(twin)) is type(plain)


def test_shared_modules_stay_shared():
    model = zoo()["shared"][0]
    restored = restore(prepare(model))
    assert restored[0] is restored[2] and type(restored[0]) is nn.Linear


def test_hooks_and_settings_stay():
    seen = []
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding_mode="reflect", padding="same"), nn.GroupNorm(2, 2)).eval()
    model[0].register_forward_hook(lambda *_: seen.append("hook"))
    model[0].note = "mine"
    restored = restore(prepared(model))
    restored(torch.randn(1, 1, 6, 6))
    assert seen == ["hook"] and restored[0].note == "mine" and not restored[0].training
    assert restored[0].padding_mode == "reflect" and restored[0].padding == "same"


def test_a_copy_made_within_an_epoch_is_restored_alone():
    model, batch = zoo()["residual"]
    expected = model(batch[0])
    model = prepared(model)
    quantized = quantizable_layers(model)
    assert torch.equal(restore(copy.deepcopy(model))(batch[0]), expected)
    assert quantizable_layers(model) == quantized and all(layer.quantized for layer in quantized.values())


def test_a_plain_model_is_left_alone():
    model = Residual()
    kinds = [type(m) for m in model.modules()]
    assert restore(model) is model and [type(m) for m in model.modules()] == kinds


def image_network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 5)
    )  # fmt: skip


def traced(model, x):
    return torch.jit.trace(model, x)(x)


def scripted(model, x):
    return torch.jit.script(model)(x)


def exported(model, x):
    return torch.export.export(model, (x,)).module()(x)


def unpickled(model, x):
    written = pickle.dumps(model)
    assert b"dpquant" not in written
    return pickle.loads(written)(x)


def reloaded(model, x):
    file = io.BytesIO()
    torch.save(model, file)
    assert b"dpquant" not in file.getvalue()
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)(x)


def vectorised(model, x):
    parameters = dict(model.named_parameters())

    def one(parameters, row):
        return torch.func.functional_call(model, parameters, (row.unsqueeze(0),)).squeeze(0)

    return torch.func.vmap(one, (None, 0))(parameters, x)


def per_example(model, x):
    """Outputs, once the per-example gradients of torch.func agree with autograd's."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def one(parameters, row):
        return torch.func.functional_call(model, parameters, (row.unsqueeze(0),)).square().sum()

    gradients = torch.func.vmap(torch.func.grad(one), (None, 0))(parameters, x)
    model.zero_grad()
    model(x).square().sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(gradients[name].sum(0), p.grad, rtol=1e-4, atol=1e-4)
    return model(x)


USES = [traced, scripted, exported, unpickled, reloaded, vectorised, per_example]


@pytest.mark.filterwarnings("ignore")  # torch deprecates TorchScript
@pytest.mark.parametrize("use", USES)
def test_a_restored_model_can_be_used_like_any_other(use):
    x = images(3)[0]
    model = image_network().eval()
    expected = model(x)
    torch.testing.assert_close(use(restore(prepared(model)), x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("use", [scripted, unpickled, reloaded, per_example])
def test_a_prepared_one_cannot(use):
    with pytest.raises(Exception):  # noqa: B017 - whatever torch raises
        use(prepared(image_network().eval()), images(3)[0])


def test_a_trained_model_is_restored():
    model = nn.Sequential(nn.Linear(6, 8), nn.GroupNorm(2, 8), nn.Linear(8, 5))
    privately_trained(model)
    restored = restore(model)
    assert [type(m) for m in restored] == [nn.Linear, nn.GroupNorm, nn.Linear]
    assert b"dpquant" not in pickle.dumps(restored)


# --------------------------------------------------------------------------------- a fixed network's gradients, whole


def shuffled():
    """Channel shuffles, depthwise and strided convolutions; maps of one pixel in the end, and some images for it.

    There, normalising three values with hardly a spread multiplies round-off, and ReLUs whose input is almost zero
    jump: in float32, torch's own gradients of one example change with the memory format by 0.01 % to all of their size.
    """
    from torchvision.models import shufflenet_v2_x0_5

    torch.manual_seed(0)
    return fix(shufflenet_v2_x0_5(num_classes=5)), images(3, channels=3, side=32)


def gap_to_a_loop(disturb=lambda model: None):
    """How far the clipped sum is from a loop of autograd over the examples, both in float64, beside its size."""
    model, (x, y) = shuffled()
    x = x.double()
    reference = copy.deepcopy(model).double()
    expected = dict.fromkeys(dict(reference.named_parameters()), 0.0)
    for row in range(len(x)):
        one = loss(reference, (x[row : row + 1], y[row : row + 1])).sum()
        grads = torch.autograd.grad(one, list(reference.parameters()))
        norm = torch.stack([g.norm() for g in grads]).norm()
        for name, g in zip(expected, grads, strict=True):
            expected[name] = expected[name] + g / norm.clamp(min=1)
    model = prepare(model)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.double() if tensor.is_floating_point() else tensor.data
    disturb(model)
    ids = torch.arange(len(x))
    found = clipped_sum(
        model, loss, (x, y), max_grad_norm=1.0, record_ids=ids, step=0, seed=0, microbatch_size=len(ids)
    ).grads
    return max(float((found[name] - g).norm() / g.norm()) for name, g in expected.items())


def test_a_network_that_multiplies_round_off_is_exact_in_float64():
    assert gap_to_a_loop() < 10 * ROUND_OFF  # factors are rounded down, norms up


def test_a_gradient_that_is_off_by_little_in_one_layer_is_seen():
    def disturb(model):
        depthwise = model.stage4[0].branch1[0]
        depthwise.register_forward_hook(lambda module, inputs, y: y.register_hook(lambda grad: 1.01 * grad) and None)

    assert gap_to_a_loop(disturb) > 100 * ROUND_OFF
