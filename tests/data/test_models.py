# SPDX-License-Identifier: Apache-2.0
"""Models: every network takes every image, never mixes examples, and the user's own is found or refused in one line."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from dpquant.data import models
from dpquant.data.models import NAMES as ALL_NAMES
from dpquant.data.models import build
from dpquant.errors import ModelError, SettingError

NAMES = tuple(name for name in ALL_NAMES if name != "embedding-mean")  # which is for texts: see test_texts.py
SHAPES = [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 20, 48), (1, 64, 64), (4, 1, 1)]
OWN = """
from torch import nn
from helper_beside_my_models import layer

def build(num_classes, input_shape):
    return nn.Sequential(nn.Flatten(), layer(input_shape, num_classes))

def anything(**settings):
    return build(**settings)

def nothing():
    return nn.Identity()

def too_much(depth, num_classes):
    return nn.Identity()

def no_module():
    return "a string"

value = 3
"""
EXTENDING = """
import sys
from pathlib import Path
from torch import nn

sys.path.append(str(Path(__file__).parent / "vendored"))
if LISTS_ITS_OWN_FOLDER:
    sys.path.append(str(Path(__file__).parent))

class Lazy(nn.Module):
    def forward(self, x):
        import vendored_layers
        return vendored_layers.double(x)

def build():
    return Lazy()
"""
HELPER = """
import math
from torch import nn

def layer(shape, num_classes):
    return nn.Linear(math.prod(shape), num_classes)
"""


MODULES = {"my_models": OWN, "helper_beside_my_models": HELPER, "broken_models": "1 / 0\n"}
MODULES |= {
    "extending_models": EXTENDING.replace("LISTS_ITS_OWN_FOLDER", "False"),
    "listing_models": EXTENDING.replace("LISTS_ITS_OWN_FOLDER", "True"),
    "vendored/vendored_layers": "def double(x):\n    return 2 * x\n",
}


def forget() -> None:
    for name in MODULES:
        sys.modules.pop(name.removeprefix("vendored/"), None)


@pytest.fixture
def own_models(tmp_path: Path) -> Iterator[Path]:
    """A folder of the user's modules; what is imported from it, and added to the path, is forgotten afterwards."""
    (tmp_path / "vendored").mkdir()
    for name, text in MODULES.items():
        (tmp_path / f"{name}.py").write_text(text)
    path = list(sys.path)
    forget()
    yield tmp_path
    sys.path[:] = path
    forget()


def own(name: str, folder: Path | None = None) -> nn.Module:
    return build(name, num_classes=5, input_shape=(1, 3, 4), folder=folder)


def quantizable(model: nn.Module) -> int:
    return sum(isinstance(module, nn.Conv2d | nn.Linear) for module in model.modules())


def assert_examples_do_not_mix(model: nn.Module, shape: tuple[int, int, int]) -> None:
    """In training mode, changing one example leaves the outputs of the others as they are."""
    torch.manual_seed(0)
    inputs = torch.randn(3, *shape)
    changed = torch.cat([inputs[:2], 5 * inputs[2:] + 1])
    torch.testing.assert_close(model.train()(inputs)[:2], model(changed)[:2])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_network_gives_logits_for_every_image_shape(name: str, shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    model = build(name, num_classes=7, input_shape=shape)
    assert model(torch.randn(2, *shape)).shape == (2, 7)
    assert quantizable(model) >= (3 if name == "mlp" else 4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_no_network_mixes_examples(name: str, shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    model = build(name, num_classes=10, input_shape=shape)
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    assert_examples_do_not_mix(model, shape)


def test_the_network_for_tables_takes_rows_and_the_others_refuse_them() -> None:
    model = build("mlp", num_classes=2, input_shape=(30,))
    assert [tuple(p.shape) for p in model.parameters() if p.dim() == 2] == [(128, 30), (128, 128), (2, 128)]
    assert model(torch.randn(5, 30)).shape == (5, 2)
    for name in set(NAMES) - {"mlp", "tabular-resnet"}:
        with pytest.raises(ModelError, match=rf"images for model={name}; got input_shape=\(30,\)"):
            build(name, num_classes=2, input_shape=(30,))


def test_batch_norm_would_be_noticed() -> None:
    with pytest.raises(AssertionError):
        assert_examples_do_not_mix(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)), (1, 8, 8))


def test_the_same_seed_gives_the_same_parameters() -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(build("cnn", num_classes=10, input_shape=(1, 8, 8)).state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_cnn_is_the_published_network_at_28_pixels() -> None:
    model = build("cnn", num_classes=10, input_shape=(1, 28, 28))
    assert sum(p.numel() for p in model.parameters()) == 26_010  # Papernot et al. 2020
    assert isinstance(model, nn.Sequential)
    assert model[:6](torch.randn(1, 1, 28, 28)).shape == (1, 32, 4, 4)  # so that the adaptive pooling changes nothing


def test_lenet_is_the_published_size_at_28_pixels() -> None:
    model = build("lenet", num_classes=10, input_shape=(1, 28, 28))
    assert sum(p.numel() for p in model.parameters()) == 61_706


@pytest.mark.parametrize(("width", "stem"), [(1.0, 64), (0.5, 32), (0.3, 16), (0.01, 8), (2.0, 128)])
def test_the_width_of_a_resnet_scales_its_channels(width: float, stem: int) -> None:
    model = build("resnet18-cifar", num_classes=10, input_shape=(3, 32, 32), width=width)
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert convolutions[0].out_channels == stem and len(convolutions) == 20
    assert all(c.out_channels % 8 == 0 for c in convolutions)


def test_a_resnet_for_small_images_keeps_their_resolution_at_first() -> None:
    model = build("resnet18-cifar", num_classes=10, input_shape=(3, 32, 32), width=0.125)
    assert isinstance(model, nn.Sequential)
    assert model[:5](torch.randn(1, 3, 32, 32)).shape == (1, 8, 32, 32)


@pytest.mark.parametrize("width", [0.0, -1.0, float("nan"), float("inf")])
def test_a_width_that_is_no_width_is_refused(width: float) -> None:
    with pytest.raises(SettingError, match="Expected width > 0 and finite"):
        build("cnn", num_classes=10, input_shape=(1, 8, 8), width=width)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "densenet121"])
def test_torchvisions_networks_scale_whole(name: str) -> None:
    """Every layer is narrower, and the same network comes out where the width is 1."""
    wide, narrow = (build(name, num_classes=7, input_shape=(3, 32, 32), width=width) for width in (1.0, 0.25))
    theirs = getattr(torchvision.models, name)(num_classes=7)
    assert [p.shape for p in wide.parameters()] == [p.shape for p in theirs.parameters()]
    assert len(list(narrow.parameters())) == len(list(wide.parameters()))
    inner = [p.shape for p in narrow.parameters() if p.ndim == 4]
    outer = [p.shape for p in wide.parameters() if p.ndim == 4]
    assert all(a[0] < b[0] for a, b in zip(inner, outer, strict=True))
    for model, channels in ((narrow, 3), (build(name, num_classes=7, input_shape=(1, 32, 32), width=0.25), 1)):
        assert model(torch.randn(2, channels, 32, 32)).shape == (2, 7)
        assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@pytest.mark.parametrize(("name", "branches"), [("resnet18", 8), ("resnet18-cifar", 8), ("resnet50", 16)])
def test_residual_branches_begin_quietly_and_nothing_else_does(name: str, branches: int) -> None:
    model = build(name, num_classes=7, input_shape=(3, 32, 32), width=0.25)
    firsts = [float(m.weight.detach().unique().item()) for m in model.modules() if isinstance(m, nn.GroupNorm)]
    assert firsts.count(0.25) == branches
    assert firsts.count(1.0) == len(firsts) - branches


def round_off(make: Callable[[], nn.Module]) -> float:
    """By how much a narrow network's gradient in float32 differs from float64's, relative to its norm."""
    torch.manual_seed(0)
    model, x = make(), torch.randn(3, 3, 32, 32)
    gradients = []
    for dtype in (torch.float32, torch.float64):
        model = model.to(dtype)
        loss = F.cross_entropy(model(x.to(dtype)), torch.tensor([0, 1, 2]), reduction="sum")
        found = torch.autograd.grad(loss, list(model.parameters()))
        gradients.append(torch.cat([grad.flatten().double() for grad in found]))
    return float((gradients[0] - gradients[1]).norm() / gradients[1].norm())


NARROW = {  # networks, and the same with groups of one or two values
    "densenet121": (0.25, lambda width: models._densenet121(3, 7, width, group=1)),
    "resnet18": (0.0625, lambda width: models._torchvision_resnet("resnet18", 3, 7, width, last_stage_group=1)),
}


@pytest.mark.parametrize("name", NARROW)
def test_a_narrow_networks_gradient_is_more_than_round_off(name: str) -> None:
    width, in_small_groups = NARROW[name]
    assert round_off(lambda: build(name, num_classes=7, input_shape=(3, 32, 32), width=width)) < 1e-3
    assert round_off(lambda: in_small_groups(width)) > 1e-2  # it would be seen


def test_a_width_for_a_users_own_network_is_refused() -> None:
    with pytest.raises(SettingError, match=r"Expected width = 1 for model=my_models:build; got width=0.5"):
        build("my_models:build", num_classes=10, input_shape=(3, 32, 32), width=0.5)


def test_an_unknown_name_gets_the_known_ones_and_the_nearest() -> None:
    with pytest.raises(ModelError, match=r"one of cnn, lenet, resnet18, resnet18-cifar.*Did you mean resnet18"):
        own("resnet-18")


@pytest.mark.parametrize("function", ["build", "anything"])
def test_a_users_own_function_is_called_with_what_it_takes(function: str, own_models: Path) -> None:
    before = list(sys.path)
    assert own(f"my_models:{function}", own_models)(torch.randn(2, 1, 3, 4)).shape == (2, 5)
    assert sys.path == before


IN_THE_WORKING_DIRECTORY = """
from dpquant.data.models import build
model = build("my_models:build", num_classes=5, input_shape=(1, 3, 4))
assert type(model).__name__ == "Sequential"
"""


def test_a_users_own_function_is_looked_for_in_the_working_directory(own_models: Path) -> None:
    subprocess.run([sys.executable, "-P", "-c", IN_THE_WORKING_DIRECTORY], check=True, cwd=own_models)


@pytest.mark.parametrize("name", ["extending_models", "listing_models"])
def test_what_a_users_own_module_adds_to_the_path_stays(own_models: Path, name: str) -> None:
    before = list(sys.path)
    model = own(f"{name}:build", own_models)
    listed = [str(own_models)] if name == "listing_models" else []
    assert sys.path == [*before, str(own_models / "vendored"), *listed]
    assert torch.equal(model(torch.ones(2)), torch.full((2,), 2.0))


def test_a_path_that_is_put_back_as_it_was_is_seen(own_models: Path) -> None:
    before = list(sys.path)
    model = own("extending_models:build", own_models)
    sys.path[:] = before
    with pytest.raises(ModuleNotFoundError, match="vendored_layers"):
        model(torch.ones(2))


def test_a_folder_that_is_on_the_path_already_stays_there(own_models: Path) -> None:
    sys.path.append(str(own_models))
    before = list(sys.path)
    own("my_models:build", own_models)
    assert sys.path == before


def test_a_users_own_function_may_take_nothing(own_models: Path) -> None:
    assert isinstance(own("my_models:nothing", own_models), nn.Identity)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("no_such_file:build", "can be imported; got ModuleNotFoundError"),
        ("broken_models:build", "can be imported; got ZeroDivisionError"),
        ("my_models:bild", "can be imported; got AttributeError"),
        ("my_models:", "can be imported; got AttributeError"),
        (":build", "can be imported; got ValueError"),
        ("my_models:value", "to name a function; got an int"),
        ("my_models:too_much", "to be callable with num_classes and input_shape or less; got TypeError"),
        ("my_models:no_module", "to return a torch.nn.Module; got a str"),
    ],
)
def test_a_users_own_model_that_cannot_be_had_is_one_error(name: str, reason: str, own_models: Path) -> None:
    with pytest.raises(ModelError, match=f"Expected model={name} .*{reason}"):
        own(name, own_models)
