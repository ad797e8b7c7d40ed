# SPDX-License-Identifier: Apache-2.0
"""Builds plain torch networks for images, tables and texts by name, and the user's own by `module:function`.

Every network here can be trained privately without changes: it normalises by GroupNorm, never over the batch. Nothing
here depends on quantization or privacy. Parameters are initialised as in torch, from torch's global generator, which
the caller seeds. Only the residual branches of ResNets start smaller than in torch: the weight of their last GroupNorm
is 0.25. In full precision that changes little; with four bits the networks do not learn without it.

`lenet` and `cnn` are published for images of 28x28 and keep their form from that size on: larger maps are pooled down
before the first linear layer. Images with a side under 28 pixels (`digits` has 8) get variants whose kernels fit them.

Sources: LeNet-5, LeCun et al. 1998; cnn, Papernot et al. 2020, arXiv:2007.14191; ResNet-18, He et al. 2016,
arXiv:1512.03385; DenseNet-121, Huang et al. 2017, arXiv:1608.06993; GroupNorm, Wu and He 2018, arXiv:1803.08494.
Symbols: B batch, C channels, H height, W width.
"""

import contextlib
import importlib
import inspect
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from torch import Tensor, nn

from dpquant.data.model_names import NAMES, check_module, unknown
from dpquant.data.table_models import mlp, tabular_resnet
from dpquant.data.text_models import EmbeddingMean
from dpquant.errors import ModelError, SettingError, did_you_mean, kind_of, quoted

_FOR_ROWS = ("mlp", "tabular-resnet")

_PUBLISHED_SIDE = 28
_MAX_GROUPS = 32
# smallest number of channels in a group where maps may be 1x1: normalising one or two values leaves only their signs
_DENSE_GROUP = 16
_LAST_STAGE_GROUP = 4
_CHANNEL_MULTIPLE = 8
_BRANCH_SCALE = 0.25  # initial scale of residual branches; results with 0, 0.1 and 1 are in docs/log.md


def build(
    name: str,
    *,
    num_classes: int,
    input_shape: tuple[int, ...],
    width: float = 1.0,
    folder: Path | None = None,
    categories: Sequence[int] = (),
    vocabulary: int | None = None,
) -> nn.Module:
    """Build a network that maps [B, *input_shape] to logits [B, num_classes].

    Args:
      name: One of NAMES, or `module:function`, imported with `folder` on the path and called with those of
        num_classes=, input_shape=, categories= and vocabulary= that there are and that its signature takes.
      num_classes: Number of logits.
      input_shape: (C, H, W); of a row of a table (columns,); of a text (tokens,), its largest length.
      width: Factor on the numbers of channels; 1 for a function of the user's own.
      folder: Of the user's modules; None: the working directory.
      categories: Of a table: numbers of codes of its last columns.
      vocabulary: Of texts: number of tokens; None: inputs are no texts.
    Raises: ModelError: the name is unknown, or the function cannot be imported, called or gives no module.
      SettingError: width is out of range, or the network has none.
    Privacy: sees no data.
    """
    if not (width > 0 and math.isfinite(width)):
        raise SettingError(
            f"Expected width > 0 and finite; got width={width}. It multiplies the numbers of channels. Pass 1.0."
        )
    if width != 1.0 and ":" in name:
        raise SettingError(
            f"Expected width = 1 for model={name}; got width={width}. Your own function decides how wide the network "
            f"is. Leave it out, or choose one of {', '.join(NAMES)}."
        )
    if name in NAMES:
        _check_inputs(name, input_shape, vocabulary)
    channels, *sides = input_shape
    small = min(sides, default=0) < _PUBLISHED_SIDE
    match name:
        case "mlp":
            return mlp(math.prod(input_shape), categories, num_classes, width)
        case "tabular-resnet":
            return tabular_resnet(math.prod(input_shape), categories, num_classes, width)
        case "embedding-mean":
            return EmbeddingMean(vocabulary or 1, num_classes, width)
        case "cnn":
            return _small_cnn(channels, num_classes, width) if small else _cnn(channels, num_classes, width)
        case "lenet":
            return _lenet(channels, num_classes, width, small)
        case "resnet18" | "resnet50":
            return _torchvision_resnet(name, channels, num_classes, width)
        case "resnet18-cifar":
            return _resnet18_cifar(channels, num_classes, width)
        case "densenet121":
            return _densenet121(channels, num_classes, width)
        case _ if ":" in name:
            offered: dict[str, object] = {"num_classes": num_classes, "input_shape": input_shape}
            offered |= {"categories": tuple(categories)} if categories else {}
            offered |= {"vocabulary": vocabulary} if vocabulary is not None else {}
            return _users_own(name, offered, folder or Path.cwd())
    raise unknown(name)


def _check_inputs(name: str, input_shape: tuple[int, ...], vocabulary: int | None) -> None:
    """Refuse a named network that is for inputs of another kind."""
    kinds = {"embedding-mean": "texts"} | dict.fromkeys(_FOR_ROWS, "rows of a table, or images,")
    fits = vocabulary is not None if name == "embedding-mean" else vocabulary is None
    if name in kinds and fits:
        return
    if name in kinds or not fits or len(input_shape) != 3:
        raise ModelError(
            f"Expected {kinds.get(name, 'images')} for model={name}; got "
            f"{'texts' if vocabulary is not None else f'input_shape={input_shape}'}. It is made for them. Use "
            f"{' or '.join(_FOR_ROWS)} for tables, embedding-mean for texts, or a function of your own."
        )


def _scaled(channels: int, width: float) -> int:
    return max(1, round(channels * width))


def _cnn(channels: int, num_classes: int, width: float) -> nn.Module:
    """Build Papernot et al.'s tanh network; the last pooling is the identity at 28x28, where the map is 4x4 already."""
    first, second, hidden = (_scaled(n, width) for n in (16, 32, 32))
    return nn.Sequential(
        nn.Conv2d(channels, first, kernel_size=8, stride=2, padding=2),
        nn.Tanh(),
        nn.MaxPool2d(kernel_size=2, stride=1),
        nn.Conv2d(first, second, kernel_size=4, stride=2),
        nn.Tanh(),
        nn.MaxPool2d(kernel_size=2, stride=1),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(second * 16, hidden),
        nn.Tanh(),
        nn.Linear(hidden, num_classes),
    )


def _small_cnn(channels: int, num_classes: int, width: float) -> nn.Module:
    """Build a variant of `cnn` for small images: three 3x3 convolutions, the second with stride 2, then a 4x4 map."""
    first, second, hidden = (_scaled(n, width) for n in (16, 32, 32))
    return nn.Sequential(
        nn.Conv2d(channels, first, kernel_size=3, padding=1),
        nn.Tanh(),
        nn.Conv2d(first, second, kernel_size=3, stride=2, padding=1),
        nn.Tanh(),
        nn.Conv2d(second, second, kernel_size=3, padding=1),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(second * 16, hidden),
        nn.Tanh(),
        nn.Linear(hidden, num_classes),
    )


def _lenet(channels: int, num_classes: int, width: float, small: bool) -> nn.Module:
    """Build LeNet-5 with tanh; for small images the second convolution is padded, so that its kernel fits."""
    first, second, hidden, last = (_scaled(n, width) for n in (6, 16, 120, 84))
    return nn.Sequential(
        nn.Conv2d(channels, first, kernel_size=5, padding=2),
        nn.Tanh(),
        nn.AvgPool2d(2, ceil_mode=True),
        nn.Conv2d(first, second, kernel_size=5, padding=2 if small else 0),
        nn.Tanh(),
        nn.AvgPool2d(2, ceil_mode=True),
        nn.AdaptiveAvgPool2d(5),
        nn.Flatten(),
        nn.Linear(second * 25, hidden),
        nn.Tanh(),
        nn.Linear(hidden, last),
        nn.Tanh(),
        nn.Linear(last, num_classes),
    )


def _group_norm(channels: int, smallest: int = 1) -> nn.GroupNorm:
    """Build a GroupNorm of 32 groups, or of the most that divide the channels into groups of at least `smallest`."""
    return nn.GroupNorm(math.gcd(_MAX_GROUPS, channels, max(channels // smallest, 1)), channels)


def _begin_quietly(last_norm: nn.Module) -> None:
    """Scale a residual branch down at the start: quantization disturbs the sum with the shortcut most."""
    assert isinstance(last_norm, nn.GroupNorm)
    nn.init.constant_(last_norm.weight, _BRANCH_SCALE)


def _in_eights(channels: int, width: float) -> int:
    """Return the number of channels times the width, rounded to a multiple of 8, which GroupNorm can divide."""
    return max(1, round(channels * width / _CHANNEL_MULTIPLE)) * _CHANNEL_MULTIPLE


def _torchvision_resnet(
    name: str, channels: int, num_classes: int, width: float, last_stage_group: int = _LAST_STAGE_GROUP
) -> nn.Module:
    """Build torchvision's ResNet with GroupNorm; stem, stages and head are scaled, the stem takes the images' channels.

    `last_stage_group` is the smallest number of channels in a group of the last stage.
    """
    from torchvision.models import resnet  # slow to import, and only these networks need it

    block, depths = {
        "resnet18": (resnet.BasicBlock, [2, 2, 2, 2]),
        "resnet50": (resnet.Bottleneck, [3, 4, 6, 3]),
    }[name]
    stem, last_stage = _in_eights(64, width), _in_eights(512, width)

    def norm(channels: int) -> nn.GroupNorm:
        return _group_norm(channels, last_stage_group if channels >= last_stage else 1)

    class Scaled(resnet.ResNet):
        def _make_layer(self, block, planes, *args, **kwargs):  # at the first call inplanes is the stem's at width 1
            self.inplanes = stem if planes == 64 else self.inplanes
            return super()._make_layer(block, _in_eights(planes, width), *args, **kwargs)

    model = Scaled(block, depths, num_classes=num_classes, norm_layer=norm)
    for module in model.modules():
        if isinstance(module, resnet.BasicBlock):
            _begin_quietly(module.bn2)
        elif isinstance(module, resnet.Bottleneck):
            _begin_quietly(module.bn3)
    if width != 1.0 or channels != 3:
        model.conv1 = nn.Conv2d(channels, stem, kernel_size=7, stride=2, padding=3, bias=False)
        model.bn1 = _group_norm(stem)
        model.fc = nn.Linear(last_stage * block.expansion, num_classes)
    return model


def _densenet121(channels: int, num_classes: int, width: float, group: int = _DENSE_GROUP) -> nn.Module:
    """Build torchvision's DenseNet with GroupNorm; growth and stem are scaled, the stem takes the images' channels.

    `group` is the smallest number of channels in a group.
    """
    from torchvision.models import DenseNet

    stem = _in_eights(64, width)
    model = DenseNet(_in_eights(32, width), (6, 12, 24, 16), stem, num_classes=num_classes)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, _group_norm(child.num_features, group))
            elif isinstance(child, nn.AvgPool2d):
                child.ceil_mode = True  # images below 32x32 are one pixel before the last pooling
    if channels != 3:
        model.features.conv0 = nn.Conv2d(channels, stem, kernel_size=7, stride=2, padding=3, bias=False)
    return model


class _Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, kernel_size=3, stride=stride, padding=1, bias=False)
        self.norm1 = _group_norm(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, kernel_size=3, padding=1, bias=False)
        self.norm2 = _group_norm(outputs)
        _begin_quietly(self.norm2)
        self.shortcut = (
            nn.Identity()
            if stride == 1 and inputs == outputs
            else nn.Sequential(
                nn.Conv2d(inputs, outputs, kernel_size=1, stride=stride, bias=False), _group_norm(outputs)
            )
        )
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.norm1(self.conv1(x)))
        return self.relu2(self.norm2(self.conv2(y)) + self.shortcut(x))


def _resnet18_cifar(channels: int, num_classes: int, width: float) -> nn.Module:
    """Build ResNet-18 for small images: a 3x3 stem of stride 1 and no max-pooling; channels are multiples of 8."""
    stages = [_in_eights(n, width) for n in (64, 128, 256, 512)]
    layers: list[nn.Module] = [
        nn.Conv2d(channels, stages[0], kernel_size=3, padding=1, bias=False),
        _group_norm(stages[0]),
        nn.ReLU(),
    ]
    inputs = stages[0]
    for stage, outputs in enumerate(stages):
        layers += [_Block(inputs, outputs, stride=1 if stage == 0 else 2), _Block(outputs, outputs, stride=1)]
        inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, num_classes))


def _users_own(name: str, offered: dict[str, object], folder: Path) -> nn.Module:
    """Call the function that `module:function` names, with what it takes of the offered, and return its module."""
    module_name, _, function_name = name.partition(":")
    with _on_path(folder):
        function = _imported(name, module_name, function_name)
        arguments = _accepted(name, function, offered)
        try:
            model = function(**arguments)
        except (Exception, SystemExit) as error:  # the user's code may raise anything; it has seen no data
            raise ModelError(
                f"Expected model={name} to build a model of {offered['num_classes']} classes for inputs of shape "
                f"{offered['input_shape']}; got {quoted(error)}. Nothing can be trained. Mend it there."
            ) from error
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"Expected model={name} to return a torch.nn.Module; got {kind_of(model)}. Only a module can be "
            "trained. Name a function that builds the model."
        )
    return model


@contextlib.contextmanager
def _on_path(folder: Path) -> Iterator[None]:
    """Put a folder first on Python's path until the block ends; entries that the block adds stay."""
    added = os.fsdecode(os.fsencode(folder))  # a new string: str(folder) may be on the path already
    sys.path.insert(0, added)
    try:
        yield
    finally:
        # by identity: the user's own code may have added an equal entry, to import from later
        sys.path[:] = [entry for entry in sys.path if entry is not added]


def _imported(name: str, module_name: str, function_name: str) -> Callable[..., object]:
    """Import the function; any exception of the user's module is a ModelError."""
    check_module(name)
    try:
        module = importlib.import_module(module_name)
        function = getattr(module, function_name)
    except (Exception, SystemExit) as error:
        names = vars(sys.modules[module_name]) if module_name in sys.modules else {}
        raise ModelError(
            f"Expected model={name} to name a function that can be imported; got {quoted(error)}. Known names are "
            f"{', '.join(NAMES)}. {did_you_mean(function_name, names)}Check the spelling, and that {module_name} "
            "imports by itself."
        ) from error
    if not callable(function):
        raise ModelError(
            f"Expected model={name} to name a function; got {kind_of(function)}. It is called to build the "
            "model. Wrap it in a function."
        )
    return function


def _accepted(name: str, function: Callable[..., object], offered: dict[str, object]) -> dict[str, object]:
    """Return those of the offered arguments that the function's signature takes.

    Raises: ModelError: the function needs others.
    """
    try:
        signature = inspect.signature(function)
        takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in signature.parameters.values())
        arguments = {key: value for key, value in offered.items() if takes_any or key in signature.parameters}
        signature.bind(**arguments)
    except (TypeError, ValueError) as error:
        raise ModelError(
            f"Expected model={name} to be callable with {' and '.join(offered)} or less; got {quoted(error)}. "
            f"Nothing else is known when it is called. Give its other parameters default values."
        ) from error
    return arguments
