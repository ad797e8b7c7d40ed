# SPDX-License-Identifier: Apache-2.0
"""Networks of `dpquant bench` and synthetic batches for them. None of the networks mixes examples.

All but the transformers and MobileNet are the networks that users train (`data.models`). `out_of_place` changes a
network so that Opacus' hooks accept it.
"""

import dataclasses
import functools
import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpquant.app.synthetic import SyntheticRecords
from dpquant.data import models
from dpquant.engine.randomness import seeded
from dpquant.errors import ModelError, SettingError, did_you_mean
from dpquant.runs.size import check_network_fits

Batch = tuple[Tensor, Tensor, Tensor]  # inputs, labels, record ids


class _Attention(nn.Module):
    """Multi-head self-attention built of Linear layers, for which every side has per-example gradients."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.projections = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in self.projections(x).chunk(3, dim=2))
        return self.output(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class _Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), _Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = x_BTD + self.attention(self.norm1(x_BTD))
        return x_BTD + self.mlp(self.norm2(x_BTD))


class _Transformer(nn.Module):
    """Tokens, some blocks, then a classifier of the mean over positions.

    It has no learnt position embedding: Opacus has no per-example gradient for a bare parameter.
    """

    def __init__(self, tokens: nn.Module, width: int, heads: int, depth: int, num_classes: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.blocks = nn.Sequential(*(_Block(width, heads) for _ in range(depth)))
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.tokens(x)).mean(1))


class _Patches(nn.Module):
    """The 4x4 patches of an image as tokens, `(B, T, width)`."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.projection = nn.Conv2d(channels, width, kernel_size=4, stride=4)

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(x).flatten(2).transpose(1, 2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Network:
    """Inputs and default sizes of one network.

    Attributes:
      channels: channels of an image, columns of a table, or tokens of a text.
      image_size: default height and width of the images; None: the network takes rows of a table or texts.
      vocabulary: number of different tokens; None: the network takes no texts.
      smallest: smallest image size that the network can process.
      num_classes: number of outputs.
      batch_size: default number of examples in a logical batch.
      physical_batch_size: default number of examples in a physical batch of Opacus.
    """

    channels: int
    image_size: int | None = 32
    vocabulary: int | None = None
    smallest: int = 8
    num_classes: int = 10
    batch_size: int = 32
    physical_batch_size: int = 32

    def input_shape(self, image_size: int | None) -> tuple[int, ...]:
        """Return the shape of one input."""
        return (self.channels,) if image_size is None else (self.channels, image_size, image_size)


NETWORKS = {
    "resnet18-cifar": Network(channels=3),
    "resnet18": Network(channels=3),
    "resnet50": Network(channels=3),
    "densenet121": Network(channels=3, smallest=32),
    "mobilenet-v2": Network(channels=3, image_size=64, smallest=32),  # its 3x3 convolutions are depthwise
    "cnn": Network(channels=1, image_size=28),
    "transformer": Network(channels=3, smallest=4),
    "mlp": Network(channels=30, image_size=None, num_classes=2, batch_size=4096, physical_batch_size=4096),
    "bert-base": Network(channels=128, image_size=None, vocabulary=30522, num_classes=2),  # without position embeddings
}


def network_named(name: str) -> Network:
    """Return the sizes of a network; raise ModelError if the name is unknown."""
    if name not in NETWORKS:
        raise ModelError(
            f"Expected model to be one of {', '.join(NETWORKS)}; got model={name}. {did_you_mean(name, NETWORKS)}Every "
            "side must be able to run it. Choose one of them."
        )
    return NETWORKS[name]


def build_network(name: str, image_size: int | None) -> nn.Module:
    """Return a network with parameters drawn from a fixed seed. None of the networks mixes examples.

    Args:
      name: one of NETWORKS.
      image_size: height and width of its images; None for rows of a table.
    Raises:
      ModelError: the name is unknown.
      SettingError: the image is too small for the network, or the network takes no images.
    """
    network = network_named(name)
    if (image_size is None) != (network.image_size is None):
        raise SettingError(
            f"Expected image_size for networks of images alone; got model={name}, image_size={image_size}. "
            f"{'This one takes no images. Leave it out' if image_size else 'This one takes images. Give it'}."
        )
    if image_size is not None and image_size < network.smallest:
        raise SettingError(
            f"Expected image_size >= {network.smallest} for model={name}; got image_size={image_size}. The network "
            "halves the sides until nothing is left. Pass a larger one."
        )
    with seeded(0):
        if name == "transformer":
            return _Transformer(_Patches(network.channels, 256), 256, heads=4, depth=1, num_classes=network.num_classes)
        if network.vocabulary is not None:
            tokens = nn.Embedding(network.vocabulary, 768)
            return _Transformer(tokens, 768, heads=12, depth=12, num_classes=network.num_classes)
        if name == "mobilenet-v2":
            from torchvision.models import mobilenet_v2  # slow to import, and only this network needs it

            norm = functools.partial(nn.GroupNorm, 8)
            return mobilenet_v2(num_classes=network.num_classes, norm_layer=norm, dropout=0.0)  # no draws: sides agree
        return models.build(name, num_classes=network.num_classes, input_shape=network.input_shape(image_size))


def check_fits(name: str, image_size: int | None, batch_size: int) -> None:
    """Refuse a network of images, or a batch of them, that does not fit into this machine's memory."""
    network = network_named(name)
    if image_size is not None:
        images = torch.empty(batch_size, *network.input_shape(image_size), device="meta")
        what = f"image_size={image_size} and batch_size={batch_size}"
        check_network_fits(lambda: build_network(name, image_size), images, what)


def synthetic_batch(name: str, image_size: int | None, batch_size: int) -> Batch:
    """Return a batch of standard normal inputs, or uniform tokens, with labels and record ids.

    Equal arguments give equal values.
    """
    network = network_named(name)
    if network.vocabulary is not None:
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(network.vocabulary, (batch_size, network.channels), generator=generator)
        labels = torch.randint(network.num_classes, (batch_size,), generator=generator)
        return tokens, labels, torch.arange(batch_size)
    records = SyntheticRecords(network.input_shape(image_size), network.num_classes, batch_size)
    return *records.first(batch_size), torch.arange(batch_size)


def out_of_place(model: nn.Module) -> nn.Module:
    """Make a network's ReLU and `+=` out-of-place, as Opacus' hooks need, and return it. Changes `model` itself."""
    for module in model.modules():
        if isinstance(module, nn.ReLU | nn.ReLU6):
            module.inplace = False
        if type(module).__name__ in _OUT_OF_PLACE:
            module.forward = types.MethodType(_OUT_OF_PLACE[type(module).__name__], module)
    return model


def _basic_block(self: Any, x: Tensor) -> Tensor:
    shortcut = x if self.downsample is None else self.downsample(x)
    return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + shortcut)


def _bottleneck(self: Any, x: Tensor) -> Tensor:
    shortcut = x if self.downsample is None else self.downsample(x)
    x = F.relu(self.bn1(self.conv1(x)))
    x = F.relu(self.bn2(self.conv2(x)))
    return F.relu(self.bn3(self.conv3(x)) + shortcut)


def _densenet(self: Any, x: Tensor) -> Tensor:
    return self.classifier(F.adaptive_avg_pool2d(F.relu(self.features(x)), 1).flatten(1))


_OUT_OF_PLACE = {"BasicBlock": _basic_block, "Bottleneck": _bottleneck, "DenseNet": _densenet}
