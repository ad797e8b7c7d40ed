# SPDX-License-Identifier: Apache-2.0
"""Does this model, with this loss, keep its examples apart? Tried on made-up records, before a private one is read.

`check_trainable` refuses by type. Such a list can be evaded (a batch statistic in a forward method, a parameter used
behind its module's back), so `check_isolation` runs the model: the clipped sum of a batch must be the sum of its
examples' own, and without a clip it must be what autograd computes. Made-up records have the shapes and types of the
data set's first record and none of its values.

A gradient jumps where round-off carries a ReLU's input across zero, or another pixel to the top of a maximum: with maps
of 64x64 in half of the ResNets that were tried. So what float32 refuses is tried again in float64, where that does not
happen.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from dpquant.clip import PerExampleLoss, clipped_sum, per_example_losses, take_rows, with_leaves
from dpquant.errors import DataError, DPQuantError, ModelError
from dpquant.layers import quantizable_layers

_NUM_EXAMPLES = 3
_TOLERANCE = 1e-3  # of the clip norm, or of a gradient; float32 rounding is a hundred times smaller
_GROWTH = 4.0  # each made-up example is so many times the one before: a statistic over the batch then moves them all
_NO_CLIP = 1e12
_COUPLED = (
    "Expected each example's gradient to depend on that example alone; got one that depends on the rest of the batch. "
    "Clipping would bound no one's influence. Remove batch statistics and other operations across the first axis."
)


def check_trainable(model: nn.Module) -> None:
    """Refuse, by type and before any data is read, a model whose examples cannot be separated.

    Raises:
      ModelError: names the module's path, what is wrong and what to do.
    Privacy: reads no data.
    """
    for path, module in model.named_modules():
        if problem := _problem(module):
            what, remedy = problem
            raise ModelError(
                f"Expected model to be trainable privately; got {path or 'the model'} ({type(module).__name__}). "
                f"{what}. {remedy}."
            )
    if not any(p.requires_grad for p in model.parameters()):
        raise ModelError(
            "Expected model to have a trainable parameter; got none. There is nothing to train. "
            "Call requires_grad_(True) on what should be trained."
        )


def _problem(module: nn.Module) -> tuple[str, str] | None:
    """(what is wrong, what to do), or None."""
    match module:
        case nn.modules.batchnorm._BatchNorm():
            return (
                "It mixes the examples of a batch, so clipping bounds no single example's influence",
                "Replace it by GroupNorm: dpquant.fix(model), or --fix on the command line",
            )
        case nn.modules.instancenorm._InstanceNorm() if module.track_running_stats:
            return "Its running statistics keep raw data", "Set track_running_stats=False"
        case nn.RNNBase() | nn.MultiheadAttention():
            if not any(p.requires_grad for p in module.parameters()):
                return None
            return (
                "Its parameters have no per-example gradient here",
                "Build it of Linear layers, or freeze it with requires_grad_(False)",
            )
        case nn.Embedding() if module.scale_grad_by_freq:
            return "scale_grad_by_freq weighs by counts over the batch", "Set scale_grad_by_freq=False"
        case nn.Embedding() if module.max_norm is not None:
            return "max_norm changes the table by which records are looked up", "Set max_norm=None"
        case LazyModuleMixin() if module.has_uninitialized_params():
            return "Its parameters have no shape yet", "Run one forward pass on made-up data first"
        case _:
            return None


def made_up_batch(record: Any, collate: Callable[[list], Any]) -> Any:
    """A batch of `_NUM_EXAMPLES` records shaped like `record`: growing normal deviates for floats, zeros for integers.

    Privacy: uses shapes and types only.
    """
    generator = torch.Generator().manual_seed(0)
    sizes = [_GROWTH**i for i in range(_NUM_EXAMPLES)]
    return collate([with_leaves(record, partial(_like, generator=generator, size=size)) for size in sizes])


def _like(value: Any, generator: torch.Generator, size: float) -> Any:
    """Something of the value's shape and type."""
    match value:
        case Tensor() if value.is_floating_point():
            return size * torch.randn(value.shape, generator=generator, dtype=value.dtype)
        case Tensor():
            return torch.zeros_like(value)
        case bool() | int():
            return 0
        case float():
            return size * torch.randn((), generator=generator).item()
    try:
        return _like(torch.as_tensor(value), generator, size)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"Expected records of tensors, numbers, tuples, lists and dicts; got a {type(value).__name__}. "
            "Convert it in the data set's __getitem__."
        ) from error


def check_isolation(model: nn.Module, loss_fn: PerExampleLoss, batch: Any) -> dict[str, float]:
    """Run the model on a made-up batch, refuse it if its examples are coupled, and count its multiply-accumulates.

    Args:
      model: a prepared model, in full precision. Its parameters, modes and the global random stream are left as they
        were; it must not change its own buffers.
      loss_fn: `(model, batch) -> Tensor (B,)`.
      batch: `_NUM_EXAMPLES` made-up records.
    Returns: {quantizable layer: multiply-accumulates of its forward product, for one example}.
    Raises:
      ModelError: the model does not run on such a batch; a parameter has no per-example gradient, or one that is not
        what autograd computes; one example's gradient depends on another; a buffer changes.
    Privacy: reads no data.
    """
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices, key=str)):
        try:
            macs = _count_macs(model, loss_fn, batch)
            try:
                _compare(model, loss_fn, batch)
            except ModelError as refusal:
                _compare_in_float64(model, loss_fn, batch, refusal)
        except DPQuantError:
            raise
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            raise ModelError(
                f"Expected model and loss_fn to run on a batch shaped like the data set's; got a "
                f"{type(error).__name__}: {error}. The batch was made up. Make the model's input and output fit the "
                "records."
            ) from error
    return macs


def _compare(model: nn.Module, loss_fn: PerExampleLoss, batch: Any) -> None:
    _compare_with_autograd(model, loss_fn, batch)
    _compare_with_singletons(model, loss_fn, batch)
    _compare_with_other_company(model, loss_fn, batch)


def _compare_in_float64(model: nn.Module, loss_fn: PerExampleLoss, batch: Any, refusal: ModelError) -> None:
    """The last word on what float32 refused; a model that cannot run in float64 stays refused."""
    try:
        with _in_float64(model):
            _compare(model, loss_fn, with_leaves(batch, _as_float64))
    except DPQuantError:
        raise
    except (RuntimeError, ValueError, IndexError, TypeError):
        raise refusal from None


@contextlib.contextmanager
def _in_float64(model: nn.Module) -> Iterator[None]:
    """The model's parameters and buffers in float64 until the block ends, then what they were, in the same memory."""
    kept = [(t, t.data) for t in (*model.parameters(), *model.buffers()) if t.dtype == torch.float32]
    for tensor, data in kept:
        tensor.data = data.double()
    try:
        yield
    finally:
        for tensor, data in kept:
            tensor.data = data


def _as_float64(leaf: Any) -> Any:
    return leaf.double() if isinstance(leaf, Tensor) and leaf.dtype == torch.float32 else leaf


def _gradients(
    model: nn.Module, loss_fn: PerExampleLoss, batch: Any, rows: Sequence[int], clip: float
) -> dict[str, Tensor]:
    """The clipped sum over some rows, with the global random stream at its start."""
    torch.manual_seed(0)
    ids = torch.tensor(rows)
    part = take_rows(batch, ids)
    return clipped_sum(
        model, loss_fn, part, max_grad_norm=clip, record_ids=ids, step=0, seed=0, microbatch_size=len(ids)
    ).grads


def _compare_with_autograd(model: nn.Module, loss_fn: PerExampleLoss, batch: Any) -> None:
    """Catches a parameter whose use is not seen, and so not clipped for: tied by hand, or used outside its module."""
    ours = _gradients(model, loss_fn, batch, range(_NUM_EXAMPLES), _NO_CLIP)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    torch.manual_seed(0)
    found = torch.autograd.grad(loss_fn(model, batch).sum(), list(trainable.values()), allow_unused=True)
    theirs = [torch.zeros_like(p) if g is None else g for p, g in zip(trainable.values(), found, strict=True)]
    # a gradient that is zero but for round-off, as of a bias before a normalization, is held to the others' size
    smallest = 1e-6 * max(1.0, *(float(reference.norm()) for reference in theirs))
    for (name, mine), reference in zip(ours.items(), theirs, strict=True):
        if (mine - reference).norm() > max(_TOLERANCE * float(reference.norm()), smallest):
            raise ModelError(
                f"Expected {name} to be used only by the module that owns it; got a gradient that its per-example "
                "gradients do not add up to. Clipping would miss a part of it. Call the module instead of using its "
                "parameter, or make the examples the first axis of every input."
            )


def _compare_with_singletons(model: nn.Module, loss_fn: PerExampleLoss, batch: Any) -> None:
    """Catches gradients that see other examples. A model that draws random numbers has no single answer to compare."""
    rows = range(_NUM_EXAMPLES)
    whole = _gradients(model, loss_fn, batch, rows, 1.0)
    singles = [_gradients(model, loss_fn, batch, [row], 1.0) for row in rows]
    gap = sum((sum(single[name] for single in singles) - whole[name]).double().square().sum() for name in whole)
    if float(gap) ** 0.5 > _TOLERANCE and not _draws_random_numbers(model, loss_fn, batch):
        raise ModelError(_COUPLED)


def _compare_with_other_company(model: nn.Module, loss_fn: PerExampleLoss, batch: Any) -> None:
    """Catches losses that see other examples, with dropout too (its draws are repeated), and in both modes."""
    rows = list(range(_NUM_EXAMPLES))
    modes = {module: module.training for module in model.modules()}
    try:
        for training in (True, False):
            model.train(training)
            before = _losses(model, loss_fn, batch)
            for row, other in itertools.permutations(rows, 2):
                company = [other if i == row else i for i in rows]
                kept = [i for i in rows if i != row]
                after = _losses(model, loss_fn, take_rows(batch, torch.tensor(company)))
                if (after - before)[kept].abs().max() > _TOLERANCE * before.abs().max():
                    raise ModelError(_COUPLED)
    finally:
        for module, training in modes.items():
            module.training = training


def _losses(model: nn.Module, loss_fn: PerExampleLoss, batch: Any) -> Tensor:
    """The losses, with the global random stream at its start."""
    torch.manual_seed(0)
    with torch.no_grad():
        return per_example_losses(loss_fn, model, batch, _NUM_EXAMPLES)


def _draws_random_numbers(model: nn.Module, loss_fn: PerExampleLoss, batch: Any) -> bool:
    """Whether the losses move the global random stream, as dropout does."""
    before = torch.random.get_rng_state()
    with torch.no_grad():
        loss_fn(model, batch)
    return not torch.equal(before, torch.random.get_rng_state())


def _count_macs(model: nn.Module, loss_fn: PerExampleLoss, batch: Any) -> dict[str, float]:
    """One forward pass, counting; and the check that it leaves the buffers alone."""
    layers = quantizable_layers(model)
    macs = dict.fromkeys(layers, 0.0)

    def counter(name: str) -> Callable[..., None]:
        def count(module: nn.Module, inputs: Any, output: Tensor) -> None:
            macs[name] += output[0].numel() * layers[name].weight[0].numel()

        return count

    handles = [layer.register_forward_hook(counter(name)) for name, layer in layers.items()]
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        with torch.no_grad():
            loss_fn(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    for name, buffer in model.named_buffers():
        if name not in buffers or not torch.equal(buffer.nan_to_num(), buffers[name].nan_to_num()):
            raise ModelError(
                f"Expected a forward pass to leave the model's buffers alone; got a change of {name}. A buffer that "
                "follows the data is released with the model, without noise. Remove it, or freeze it in evaluation."
            )
    return macs
