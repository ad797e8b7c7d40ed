# SPDX-License-Identifier: Apache-2.0
"""Sides of `dpquant bench`: one training step of the same network in PyTorch, Opacus and dpquant.

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
import importlib.metadata
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpquant.app.networks import Batch, network_named, out_of_place
from dpquant.backends.precision import tf32_float32
from dpquant.engine.batches import take_rows
from dpquant.engine.clip import clipped_sum
from dpquant.engine.layers import count_macs, current_precisions, prepare, set_policy
from dpquant.engine.passes import Objective
from dpquant.errors import SettingError
from dpquant.formats import recipe
from dpquant.training.policies import largest_layers
from dpquant.training.tuning import fastest_microbatch_size

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
      device: torch's name of the device that the steps run on.
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
    device: str = "cpu"

    def __post_init__(self) -> None:
        network = network_named(self.model)
        for name in ("batch_size", "physical_batch_size", "image_size"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, getattr(network, name))
        for name in ("batch_size", "image_size", "rounds", "threads", "physical_batch_size"):
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


def plain(model: nn.Module, batch: Batch, settings: StepSettings, *, autocast: torch.dtype | None = None) -> Step:
    """Make a step of ordinary training: the mean gradient of the whole batch in one pass. Not private.

    With `autocast` torch computes products in that type where it holds that to be safe.
    """
    model = model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    inputs, labels, _ = batch
    if inputs.dim() == 4:
        inputs = inputs.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=settings.lr)

    def step() -> None:
        with torch.autocast(inputs.device.type, autocast, enabled=autocast is not None):
            loss = example_losses(model, (inputs, labels)).mean()
        loss.backward()
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
        Objective(model, example_losses),
        batch,
        current_precisions(model),
        expected_batch_size=len(batch[1]),
        memory=None,
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


def with_tf32(make: MakeSide) -> MakeSide:
    """Return a side that permits TF32 products on a GPU, while it is set up and in its step."""

    def made(model: nn.Module, batch: Batch, settings: StepSettings) -> Step:
        with tf32_float32():
            step = make(model, batch, settings)

        def permitted() -> None:
            with tf32_float32():
                step()

        return permitted

    return made


SIDES: Mapping[str, MakeSide] = {
    "plain": plain,
    "opacus": opacus_hooks,
    "ghost": opacus_ghost,
    "full": functools.partial(ours, share=0.0),
    "most": functools.partial(ours, share=SHARE_OF_MOST),
    "all": functools.partial(ours, share=1.0),
}

# Sides for a GPU besides. TF32 products round their operands to 10 bits of mantissa, bfloat16 to 7.
GPU_SIDES: Mapping[str, MakeSide] = {
    "plain": plain,
    "plain, TF32": with_tf32(plain),
    "plain, bfloat16": functools.partial(plain, autocast=torch.bfloat16),
    "opacus": opacus_hooks,
    "ghost": opacus_ghost,
    "full": SIDES["full"],
    "full, TF32": with_tf32(SIDES["full"]),
    "most": SIDES["most"],
    "all": SIDES["all"],
}
NOT_PRIVATE = {"plain", "plain, TF32", "plain, bfloat16"}
ROUNDED = {"most", "all", "plain, TF32", "plain, bfloat16", "full, TF32"}  # their gradients are not float32's
DESCRIPTIONS = {
    "plain": "plain PyTorch",
    "opacus": "Opacus, hooks",
    "ghost": "Opacus, ghost",
    "full": "ours, full",
    "most": "ours, 90 %",
    "all": "ours, all",
}


def why_not(failure: Exception) -> str:
    """Return in one line why a side does not run, with what to do where Opacus is missing."""
    if isinstance(failure, ModuleNotFoundError) and (failure.name or "").split(".")[0] == "opacus":
        return "Opacus is not installed: pip install 'dpquant[bench]'"
    return f"{type(failure).__name__}: {(str(failure).strip() or 'no message').splitlines()[0]}"


def opacus_version() -> str:
    """Return the version of Opacus, "" where it is not installed."""
    try:
        return importlib.metadata.version("opacus")
    except importlib.metadata.PackageNotFoundError:
        return ""


def _pieces(batch: Batch, settings: StepSettings) -> Iterator[tuple[Batch, bool]]:
    """Yield each physical batch, and whether it is the last."""
    size = settings.physical_batch_size
    for start in range(0, len(batch[1]), size):
        yield take_rows(batch, slice(start, start + size)), start + size >= len(batch[1])
