# SPDX-License-Identifier: Apache-2.0
"""Refuses models by the types of their modules, and turns an exception of a user's code into an error with its cause.

Each error says what was found, why that is not private, and what to do.
"""

import dataclasses
import traceback

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from dpquant.engine.attention import has_product
from dpquant.engine.layers import quantizable_twin
from dpquant.engine.quantizable import QuantizableLayer
from dpquant.errors import DPQuantError, ModelError, quoted

COUPLED = (
    "Expected each example's gradient to depend on that example alone; got one that depends on the rest of the batch. "
    "Clipping would bound no one's influence. Remove batch statistics and other operations across the first axis."
)
MIXED = (
    "Expected collate_fn to make each row of one record alone, in the records' order; got rows that change with the "
    "other records. Clipping rows would bound no one's influence. Collate without mixing or sorting records."
)
PADDED = (
    "Expected a record's row to have a shape that the record alone decides; got one that is padded to the longest "
    "record of the batch. Quantized, what one record contributes would depend on how long another is. Pad to a length "
    "that the record alone decides (a fixed one, such as padding='max_length'), or run in full precision."
)
BY_PLACE = (
    "Expected the random numbers that the model draws to belong to an example each or to all of them; got some that "
    "follow an example's place in the batch. A record that is removed moves the places of all others. Let the axis of "
    "examples come first where random numbers are drawn, or choose another microbatch_size if another axis has as many."
)
BUFFERS = "Expected a forward pass to leave the model's buffers alone"
FOLLOWS = (
    "A buffer that follows the data is released with the model, without noise. Remove it, or freeze it in evaluation."
)
COUNTS = (
    "It changes at every pass, whatever the data, so that it tells how many passes were made, which follows how many "
    "records were drawn. Put its module in evaluation mode (spectral_norm stops there), or remove it."
)
KEEPS_STATE = (
    "Expected what the model computes to depend on its parameters and its input; got a model that remembers what it "
    "was given before. What it remembers of records is never noised. Keep nothing from one call to the next."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refusal:
    """What is wrong with a module, seen from its type and settings alone.

    Attributes:
      module: its path in the model; empty for the model itself.
      kind: name of its class.
      problem: why it cannot be trained privately.
      remedy: what to do.
      expected: what the model lacks, as an error begins.
    """

    module: str
    kind: str
    problem: str
    remedy: str
    expected: str = "to be trainable privately"

    def __str__(self) -> str:
        return (
            f"Expected model {self.expected}; got {self.module or 'the model'} ({self.kind}). {self.problem}. "
            f"{self.remedy}."
        )


def check_trainable(model: nn.Module) -> None:
    """Refuse a model with a module of a type whose examples cannot be separated, before any data is read.

    Raises:
      ModelError: the first of `refusals`, with the module's path, what is wrong and what to do.
    Privacy: reads no data.
    """
    if found := refusals(model):
        alike = sum((one.kind, one.problem) == (found[0].kind, found[0].problem) for one in found) - 1
        raise ModelError(f"{found[0]}{f' There are {alike} more of its kind.' if alike else ''}")


def refusals(model: nn.Module) -> list[Refusal]:
    """Return every module of a type whose examples cannot be separated, and whether nothing at all is trainable.

    Privacy: reads no data.
    """
    found = [
        Refusal(module=path, kind=type(module).__name__, problem=problem[0], remedy=problem[1])
        for path, module in model.named_modules()
        if (problem := _problem(module))
    ]
    if not any(p.requires_grad for p in model.parameters()):
        found.append(
            Refusal(
                module="",
                kind=type(model).__name__,
                problem="No parameter requires a gradient, so there is nothing to train",
                remedy="Call requires_grad_(True) on what should be trained",
                expected="to have a trainable parameter",
            )
        )
    return found


_SHARDED = ("FullyShardedDataParallel", "FSDPModule")  # by name: importing them takes seconds


def _recomputes(module: nn.Module) -> bool:
    """Return whether a model of transformers checkpoints activations. The older name for that warns: it comes last."""
    names = ("is_activation_checkpointing", "is_gradient_checkpointing")
    known = next((name for name in names if hasattr(type(module), name) or name in vars(module)), None)
    return known is not None and getattr(module, known) is True


def _problem(module: nn.Module) -> tuple[str, str] | None:
    """Return (what is wrong with a module, what to do), or None."""
    match module:
        case _ if type(module).__name__ == "OptimizedModule":  # naming its class would load torch's compiler
            return "torch.compile hides the layers", "Pass the module that was compiled, model._orig_mod"
        case _ if module._compiled_call_impl is not None:
            return "torch.compile hides the layers", "Build it without calling compile(), which cannot be undone"
        case nn.DataParallel() | nn.parallel.DistributedDataParallel():
            return "It splits batches by itself", "Pass the module inside, model.module"
        case _ if any(kind.__name__ in _SHARDED for kind in type(module).__mro__):
            return "It holds only a part of its parameters", "Pass the model before it is sharded"
        case _ if _recomputes(module):
            return (
                "Activation checkpointing computes layers again in the backward pass, with other roundings",
                "Call model.gradient_checkpointing_disable(): a smaller microbatch_size saves as much memory",
            )
        case nn.modules.batchnorm._BatchNorm() if not module.training:
            return (
                "In evaluation it keeps examples apart, but training mode, which can be set any time, would mix them",
                'Make its statistics part of the network: dpquant.fix(model, batch_norm="freeze")',
            )
        case nn.modules.batchnorm._BatchNorm():
            return (
                "It mixes the examples of a batch, so clipping bounds no single example's influence",
                "Replace it by GroupNorm: dpquant.fix(model), or --fix on the command line. Of a pretrained network "
                'keep its statistics: dpquant.fix(model, batch_norm="freeze")',
            )
        case _ if _computed_weight(module) and any(p.requires_grad for p in module.parameters()):
            return (
                "Its weight is computed from other parameters (a parametrization, spectral_norm or weight_norm), whose "
                "per-example gradients are unknown",
                "Remove it (torch.nn.utils.parametrize.remove_parametrizations, remove_spectral_norm, "
                "remove_weight_norm), or freeze the module",
            )
        case nn.modules.instancenorm._InstanceNorm() if module.track_running_stats:
            return "Its running statistics keep raw data", "Set track_running_stats=False"
        case nn.MultiheadAttention() if any(p.requires_grad for p in module.parameters()) and not has_product(module):
            return (
                "The keys and values that add_bias_kv and add_zero_attn add have no per-example gradient here",
                "Make it without them, or freeze it with requires_grad_(False)",
            )
        case nn.RNNBase() | nn.MultiheadAttention():
            known = isinstance(module, QuantizableLayer) or quantizable_twin(type(module))
            if known or not any(p.requires_grad for p in module.parameters()):
                return None
            return (
                "It is a subclass, which need not compute what torch's class does: its parameters have no per-example "
                "gradient here",
                "Use torch's class itself, build it of Linear layers, or freeze it with requires_grad_(False)",
            )
        case nn.Embedding() if module.scale_grad_by_freq:
            return "scale_grad_by_freq weighs by counts over the batch", "Set scale_grad_by_freq=False"
        case nn.Embedding() if module.max_norm is not None:
            return "max_norm changes the table by which records are looked up", "Set max_norm=None"
        case LazyModuleMixin() if module.has_uninitialized_params():
            return "Its parameters have no shape yet", "Run one forward pass on synthetic data first"
        case _:
            return None


def _computed_weight(module: nn.Module) -> bool:
    """Whether torch computes a parameter of the module from others at each call."""
    hooks = (type(hook).__name__ for hook in module._forward_pre_hooks.values())
    return parametrize.is_parametrized(module) or any(name in ("SpectralNorm", "WeightNorm") for name in hooks)


class NotFinite(Exception):
    """A loss or a gradient is infinite or not a number."""


_WAYS_OUT = (
    "The records are synthetic. Make the model's input and output fit the records; or, where their values have a "
    "domain of their own, give example= a few public or synthetic records."
)


def explained(error: Exception) -> DPQuantError:
    """Return the error that says why a model's code raised this exception on synthetic records."""
    if isinstance(error, DPQuantError):
        return error
    files = {frame.filename.replace("\\", "/") for frame in traceback.extract_tb(error.__traceback__)}
    if any(name.endswith("torch/utils/checkpoint.py") for name in files):
        return ModelError(
            "Expected a model without activation checkpointing; got a layer that is computed again in the backward "
            "pass. Its per-example gradients would belong to another rounding. Turn checkpointing off: a smaller "
            "microbatch_size saves as much memory."
        )
    if "does not require grad" in str(error):
        return ModelError(
            "Expected model and loss_fn not to differentiate; got a gradient that is taken inside of them. Parameters "
            "are detached while losses are computed, and a gradient penalty's own gradient has no per-example form "
            "here. Leave it out of the loss."
        )
    if isinstance(error, NotFinite):
        return ModelError(
            "Expected losses and gradients that are finite on synthetic records; got others for every kind of values "
            f"that was tried. NaN would hide whether examples are kept apart. {_WAYS_OUT}"
        )
    refusal = ModelError(
        f"Expected model and loss_fn(model, batch) to run on a batch shaped like the data set's; got {quoted(error)}. "
        f"{_WAYS_OUT}"
    )
    refusal.__cause__ = error
    return refusal
