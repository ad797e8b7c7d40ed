# SPDX-License-Identifier: Apache-2.0
"""Sides of `dpquant bench`: one training step of the same network in PyTorch, Opacus and dpquant; and the networks.

A side is a function that takes a network, a batch and a `StepSettings` and returns a step, a function without
arguments. Every side ends in the same torch.optim.SGD, so the step is defined by its effect on the parameters p, which
`bench` checks:

    plain                p -= lr * (1/B) sum_i g_i                                     ordinary training, not private
    opacus, ghost,       p -= lr * (1/B) (sum_i g_i min(1, C / ||g_i||) + C sigma z)   DP-SGD; z standard normal
    full, most, all

Each side runs under the conditions that are fast for it. PyTorch gets channels-last tensors. Opacus gets physical
batches (its BatchMemoryManager), and a network without in-place operations, which its hooks refuse. The noise of every
private side comes from torch's generator.

Symbols: B examples, g_i gradient of example i, C clipping norm (max_grad_norm), sigma noise_multiplier.
Source: Abadi et al. 2016, arXiv:1607.00133, Algorithm 1; Opacus, arXiv:2109.12298; ghost clipping, Li et al. 2021,
arXiv:2110.05679.
"""

import dataclasses
import functools
import itertools
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpquant.app.synthetic import SyntheticRecords
from dpquant.data import models
from dpquant.engine.batches import take_rows
from dpquant.engine.clip import clipped_sum
from dpquant.engine.layers import count_macs, current_precisions, prepare, set_policy
from dpquant.engine.randomness import seeded
from dpquant.errors import ModelError, SettingError
from dpquant.formats import recipe
from dpquant.training.policies import largest_layers
from dpquant.training.tuning import fastest_microbatch_size

Batch = tuple[Tensor, Tensor, Tensor]  # inputs, labels, record ids
Step = Callable[[], None]

SHARE_OF_MOST = 0.9  # share of the multiply-accumulates that side `most` quantizes, largest layers first


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepSettings:
    """Settings of one side's step.

    Attributes:
      format: recipe of the quantized sides.
      physical_batch_size: examples in a physical batch of Opacus. dpquant chooses its microbatch size by timing.
      max_grad_norm: clipping norm C of the private sides.
      noise_multiplier: sigma of the private sides.
      lr: learning rate of SGD.
    """

    format: str
    physical_batch_size: int
    max_grad_norm: float = 1.0
    noise_multiplier: float = 1.0
    lr: float = 1e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """Settings of a benchmark. None: the network's default, unless stated otherwise.

    Attributes:
      model: one of `NETWORKS`.
      batch_size: examples in the logical batch of a step.
      image_size: height and width of the images in pixels; None for a network that takes rows of a table.
      format: recipe of the quantized sides.
      threads: number of threads; None: as torch is set.
      rounds: number of timed rounds.
      physical_batch_size: examples in a physical batch of Opacus. dpquant chooses its microbatch size by timing.
      memory: also measure peak memory.
    Raises:
      ModelError, SettingError, FormatError: an unknown network, a number out of range, an unknown format.
    """

    model: str = "resnet18-cifar"
    batch_size: int | None = None
    image_size: int | None = None
    format: str = "luq-fp4"
    threads: int | None = None
    rounds: int = 3
    physical_batch_size: int | None = None
    memory: bool = False

    def __post_init__(self) -> None:
        network = _network(self.model)
        for name in ("batch_size", "physical_batch_size", "image_size"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, getattr(network, name))
        for name in ("batch_size", "rounds", "threads", "physical_batch_size"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= 4096:
                raise SettingError(
                    f"Expected {name} in 1 .. 4096; got {name}={value}. It counts what is run. Pass a number in range."
                )
        recipe(self.format)

    @property
    def num_examples(self) -> int:
        """Return the batch size, which is never None after construction."""
        assert self.batch_size is not None
        return self.batch_size

    @property
    def of_step(self) -> StepSettings:
        """Return the settings of each side's step."""
        assert self.physical_batch_size is not None
        return StepSettings(format=self.format, physical_batch_size=self.physical_batch_size)


MakeSide = Callable[[nn.Module, Batch, StepSettings], Step]


def example_losses(model: nn.Module, batch: Any) -> Tensor:
    """Return the cross-entropy of each example, `(B,)`."""
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def plain(model: nn.Module, batch: Batch, settings: StepSettings) -> Step:
    """Make a step of ordinary training: the mean gradient of the whole batch in one pass. Not private."""
    model = model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    inputs, labels, _ = batch
    if inputs.dim() == 4:
        inputs = inputs.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=settings.lr)

    def step() -> None:
        example_losses(model, (inputs, labels)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def opacus_hooks(model: nn.Module, batch: Batch, settings: StepSettings) -> Step:
    """Make a step of Opacus as its `make_private` sets it up: materialises all per-example gradients, then sums."""
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    wrapped = GradSampleModule(out_of_place(model))
    optimizer = DPOptimizer(
        torch.optim.SGD(wrapped.parameters(), lr=settings.lr),
        noise_multiplier=settings.noise_multiplier,
        max_grad_norm=settings.max_grad_norm,
        expected_batch_size=len(batch[1]),
    )

    def step() -> None:
        for piece, last in _pieces(batch, settings):
            optimizer.zero_grad()
            optimizer.signal_skip_step(do_skip=not last)
            example_losses(wrapped, piece).mean().backward()
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def opacus_ghost(model: nn.Module, batch: Batch, settings: StepSettings) -> Step:
    """Make a step of Opacus with `grad_sample_mode="ghost"`: norms, then a second backward pass of weighted losses."""
    from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import GradSampleModuleFastGradientClipping
    from opacus.optimizers.optimizer_fast_gradient_clipping import DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

    wrapped = GradSampleModuleFastGradientClipping(
        out_of_place(model),
        max_grad_norm=settings.max_grad_norm,  # pyright: ignore[reportArgumentType] - any number will do
        use_ghost_clipping=True,
    )
    optimizer = DPOptimizerFastGradientClipping(
        torch.optim.SGD(wrapped.parameters(), lr=settings.lr),
        noise_multiplier=settings.noise_multiplier,
        max_grad_norm=settings.max_grad_norm,
        expected_batch_size=len(batch[1]),
    )
    loss = DPLossFastGradientClipping(wrapped, optimizer, nn.CrossEntropyLoss())

    def step() -> None:
        for (inputs, labels, _), last in _pieces(batch, settings):
            optimizer.zero_grad()
            optimizer.signal_skip_step(do_skip=not last)
            loss(wrapped(inputs), labels).backward()
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def ours(model: nn.Module, batch: Batch, settings: StepSettings, *, share: float) -> Step:
    """Make a step of dpquant's DP-SGD that quantizes the largest layers up to `share` of the multiply-accumulates."""
    model = prepare(model, format=settings.format, backend="auto")
    macs = count_macs(model, lambda: model(take_rows(batch, slice(1))[0]))
    set_policy(model, largest_layers(macs, share))
    optimizer = torch.optim.SGD(model.parameters(), lr=settings.lr)
    parameters = dict(model.named_parameters())
    numbers = itertools.count()
    size = fastest_microbatch_size(
        model, example_losses, batch, current_precisions(model), expected_batch_size=len(batch[1]), memory=None
    )
    size = min(size, len(batch[1]))

    def step() -> None:
        total = clipped_sum(
            model,
            example_losses,
            batch,
            max_grad_norm=settings.max_grad_norm,
            record_ids=batch[2],
            step=next(numbers),
            seed=0,
            microbatch_size=size,
        )
        std = settings.noise_multiplier * total.sensitivity
        for name, parameter in parameters.items():
            noise = torch.randn_like(parameter).mul_(std)
            parameter.grad = noise.add_(total.grads[name]).div_(len(batch[1]))
        optimizer.step()
        optimizer.zero_grad()

    return step


SIDES: Mapping[str, MakeSide] = {
    "plain": plain,
    "opacus": opacus_hooks,
    "ghost": opacus_ghost,
    "full": functools.partial(ours, share=0.0),
    "most": functools.partial(ours, share=SHARE_OF_MOST),
    "all": functools.partial(ours, share=1.0),
}
DESCRIPTIONS = {
    "plain": "plain PyTorch",
    "opacus": "Opacus, hooks",
    "ghost": "Opacus, ghost",
    "full": "ours, full",
    "most": "ours, 90 %",
    "all": "ours, all",
}


def _pieces(batch: Batch, settings: StepSettings) -> Iterator[tuple[Batch, bool]]:
    """Yield each physical batch, and whether it is the last."""
    size = settings.physical_batch_size
    for start in range(0, len(batch[1]), size):
        yield take_rows(batch, slice(start, start + size)), start + size >= len(batch[1])


# Networks


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


class _Transformer(nn.Module):
    """One pre-norm transformer block over the 4x4 patches of an image, then the mean over positions.

    It has no learnt position embedding: Opacus has no per-example gradient for a bare parameter.
    """

    def __init__(self, channels: int, num_classes: int, width: int = 256, heads: int = 4, patch: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, width, kernel_size=patch, stride=patch)
        self.norm1, self.attention = nn.LayerNorm(width), _Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens_BTD = self.patches(x).flatten(2).transpose(1, 2)
        tokens_BTD = tokens_BTD + self.attention(self.norm1(tokens_BTD))
        tokens_BTD = tokens_BTD + self.mlp(self.norm2(tokens_BTD))
        return self.head(tokens_BTD.mean(1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Network:
    """Inputs and default sizes of one network.

    Attributes:
      channels: channels of an image, or columns of a table.
      image_size: default height and width of the images; None: the network takes rows of a table.
      smallest: smallest image size that the network can process.
      num_classes: number of outputs.
      batch_size: default number of examples in a logical batch.
      physical_batch_size: default number of examples in a physical batch of Opacus.
    """

    channels: int
    image_size: int | None = 32
    smallest: int = 8
    num_classes: int = 10
    batch_size: int = 32
    physical_batch_size: int = 32

    def input_shape(self, image_size: int | None) -> tuple[int, ...]:
        """Return the shape of one input."""
        return (self.channels,) if image_size is None else (self.channels, image_size, image_size)


NETWORKS = {
    "resnet18-cifar": _Network(channels=3),
    "resnet18": _Network(channels=3),
    "resnet50": _Network(channels=3),
    "densenet121": _Network(channels=3, smallest=32),
    "cnn": _Network(channels=1, image_size=28),
    "transformer": _Network(channels=3, smallest=4),
    "mlp": _Network(channels=30, image_size=None, num_classes=2, batch_size=4096, physical_batch_size=4096),
}


def _network(name: str) -> _Network:
    if name not in NETWORKS:
        raise ModelError(
            f"Expected model to be one of {', '.join(NETWORKS)}; got model={name}. Every side must be able to run it. "
            "Choose one of them."
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
    network = _network(name)
    if (image_size is None) != (network.image_size is None):
        raise SettingError(
            f"Expected image_size for networks of images alone; got model={name}, image_size={image_size}. "
            f"{'This one takes rows of a table. Leave it out' if image_size else 'This one takes images. Give it'}."
        )
    if image_size is not None and image_size < network.smallest:
        raise SettingError(
            f"Expected image_size >= {network.smallest} for model={name}; got image_size={image_size}. The network "
            "halves the sides until nothing is left. Pass a larger one."
        )
    with seeded(0):
        if name == "transformer":
            return _Transformer(network.channels, network.num_classes)
        return models.build(name, num_classes=network.num_classes, input_shape=network.input_shape(image_size))


def synthetic_batch(name: str, image_size: int | None, batch_size: int) -> Batch:
    """Return a batch of standard normal inputs with labels and record ids; equal arguments give equal values."""
    network = _network(name)
    records = SyntheticRecords(network.input_shape(image_size), network.num_classes, batch_size)
    return *records.first(batch_size), torch.arange(batch_size)


def out_of_place(model: nn.Module) -> nn.Module:
    """Make a network's ReLU and `+=` out-of-place, as Opacus' hooks need, and return it. Changes `model` itself."""
    for module in model.modules():
        if isinstance(module, nn.ReLU):
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
