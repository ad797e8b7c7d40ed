# SPDX-License-Identifier: Apache-2.0
"""Turns a model into one that can be trained privately (`fix`), and a trained one back into plain layers (`restore`).

BatchNorm normalises by statistics over the batch, so no example has a gradient of its own. `fix` puts one of these in
its place:

    group    GroupNorm, statistics of one example over a group of channels and all positions; learnt values are dropped
    freeze   y = x scale + shift,  scale = weight / sqrt(var + eps),  shift = bias - mean scale,  of the running
             statistics: what BatchNorm computes in evaluation

For `group`, 2-D and 3-D norms get gcd(32, C) groups, as Opacus' fixer chooses, so that results with either can be
compared. A 1-D norm may see vectors, one value a channel. There, what a group of one value gives is always zero, and of
two always -1 and 1, through which no gradient passes: two-layer networks with groups of two stay at chance on
handwritten digits. So groups keep at least 16 channels where there are as many, and one or two channels are scaled and
shifted only.

Symbols: B examples, C channels. Sources: Wu and He, arXiv 1803.08494; opacus/validators/batch_norm.py.
"""

import copy
import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy

from dpquant.engine.group_norm import TapedGroupNorm
from dpquant.engine.layers import QuantConv2d, QuantLinear
from dpquant.errors import ModelError, SettingError

_MAX_GROUPS = 32
_VECTOR_GROUP = 16  # channels a group where a channel may be one value; `data/models.py` chooses so for maps of 1x1
_TOO_FEW = 2  # channels of which a normalization of vectors leaves nothing but signs
_CHOICES = ("group", "freeze")
_PLAIN = {QuantConv2d: nn.Conv2d, QuantLinear: nn.Linear, TapedGroupNorm: nn.GroupNorm}
_OF_TWINS = ("name", "backend", "chosen", "precision", "current", "tape")  # attributes that only twins have


class FrozenBatchNorm(nn.Module):
    """BatchNorm with fixed statistics, as one scale and one shift a channel; nothing in it is trained.

    Attributes:
      scale, shift: buffers `(C,)`.

    Privacy: per example, reads no other row. The statistics count as public: take them from a model that was trained on
      public data.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    @classmethod
    def of(cls, norm: _BatchNorm) -> "FrozenBatchNorm":
        """What the norm computes in evaluation; it must keep running statistics."""
        assert norm.running_mean is not None and norm.running_var is not None
        with torch.no_grad():
            scale = torch.rsqrt(norm.running_var + norm.eps)
            scale = scale if norm.weight is None else scale * norm.weight
            shift = -norm.running_mean * scale
            shift = shift if norm.bias is None else shift + norm.bias
        return cls(scale, shift)

    def forward(self, input: Tensor) -> Tensor:
        shape = [-1] + [1] * (input.ndim - 2)
        return input * self.scale.view(shape) + self.shift.view(shape)

    def extra_repr(self) -> str:
        return f"{len(self.scale)}"


class ChannelAffine(nn.Module):
    """A trained scale and shift a channel, without a normalization.

    Attributes:
      weight, bias: `(C,)`; None where the norm had none.

    Privacy: per example, reads no other row.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, weight: nn.Parameter | None, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.register_parameter("weight", weight)
        self.register_parameter("bias", bias)

    def forward(self, input: Tensor) -> Tensor:
        shape = [-1] + [1] * (input.ndim - 2)
        if self.weight is not None:
            input = input * self.weight.view(shape)
        return input if self.bias is None else input + self.bias.view(shape)


def fix(model: nn.Module, *, batch_norm: Literal["group", "freeze"] = "group") -> nn.Module:
    """Return a copy of the model in which nothing mixes the examples of a batch by normalization.

    Every BatchNorm is replaced; InstanceNorm loses its running statistics, which would keep raw data, and normalises in
    evaluation as in training. All other modules, their weights and what they compute stay as they are. Make the
    optimizer from the copy's parameters. Hooks on a replaced module are not carried over.

    Args:
      model: any module.
      batch_norm: `group` puts a new GroupNorm in a BatchNorm's place (its learnt values are dropped); `freeze` a
        FrozenBatchNorm, for a backbone that was trained on public data.
    Returns: the copy; what was frozen or in evaluation mode is so in the copy.
    Raises:
      ModelError: not a module, a wrapper around a model, or a module without a private equivalent.
      SettingError: batch_norm is neither.
    Privacy: reads no data. `freeze` takes the running statistics for public; of a model trained on private data they
      are not.
    """
    _check_module(model)
    if batch_norm not in _CHOICES:
        raise SettingError(
            f"Expected batch_norm to be one of {', '.join(_CHOICES)}; got batch_norm={batch_norm!r}. It says what "
            "takes BatchNorm's place. Pass 'group' to train anew, 'freeze' to keep a public model's statistics."
        )
    for path, module in model.named_modules():
        _check_convertible(path or "the model", module, batch_norm)
    try:
        fixed = copy.deepcopy(model)
    except (RuntimeError, TypeError) as error:
        raise ModelError(
            f"Expected model to be one that can be copied; got a {type(error).__name__}: {error}. fix leaves the given "
            "model as it is. Build the model anew, and fix it before it has run."
        ) from error
    replacements: dict[nn.Module, nn.Module] = {}
    for module in fixed.modules():
        if isinstance(module, _BatchNorm):
            replacements[module] = _replacement(module, batch_norm)
            replacements[module].train(module.training)
        elif isinstance(module, _InstanceNorm):
            module.track_running_stats = False
            # torch would go on updating statistics that are there
            module.running_mean = module.running_var = module.num_batches_tracked = None
    for parent in list(fixed.modules()):
        for name, child in parent._modules.items():
            if child in replacements:
                setattr(parent, name, replacements[child])
    return replacements.get(fixed, fixed)


def restore(model: nn.Module) -> nn.Module:
    """Turn a prepared model's layers back into torch's own Conv2d, Linear and GroupNorm, in full precision.

    The model is changed in place and returned. Modules, parameters, hooks and settings are the same objects, so what is
    shared stays shared. Without dpquant's layers a model can be scripted, exported, pickled and differentiated by
    `torch.func` like any other. The norms that `fix` may have put in, FrozenBatchNorm and ChannelAffine, stay. Call it
    when training is over, or on a copy.

    Args:
      model: a model that `prepare` or `make_private` has worked on; any other is left as it is.
    Returns: the model.
    Raises:
      ModelError: not a module.
    Privacy: reads no data.
    """
    _check_module(model)
    for module in model.modules():
        if type(module) in _PLAIN:
            module.__class__ = _PLAIN[type(module)]
            for name in _OF_TWINS:
                module.__dict__.pop(name, None)
    return model


def _check_module(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise ModelError(f"Expected model to be a torch.nn.Module; got a {type(model).__name__}.")


def _check_convertible(path: str, module: nn.Module, batch_norm: str) -> None:
    """Refuse a module that has no private equivalent, by its place in the model."""
    if problem := _problem(module, batch_norm):
        what, remedy = problem
        raise ModelError(
            f"Expected model to have a private equivalent; got {path} ({type(module).__name__}). {what}. {remedy}."
        )


def _problem(module: nn.Module, batch_norm: str) -> tuple[str, str] | None:
    """(what is wrong, what to do), or None."""
    if "_orig_mod" in module._modules:  # torch.compile's wrapper, whose class is slow to import
        return "It is compiled for the modules that it has now", "Pass model._orig_mod, and compile afterwards"
    match module:
        case nn.DataParallel() | nn.parallel.DistributedDataParallel():
            return "It is a wrapper that splits and sums batches by itself", "Pass model.module"
        case nn.RNNBase() | nn.MultiheadAttention():
            if not any(p.requires_grad for p in module.parameters()):
                return None
            return (
                "It has trainable parameters, and there is no private equivalent here yet",
                "Freeze it with requires_grad_(False), or replace it; attention can be built of Linear layers",
            )
        case _BatchNorm() if any(is_lazy(t) for t in (*module.parameters(), *module.buffers())):
            return "Its parameters have no shape yet", "Run one forward pass on synthetic data first"
        case _BatchNorm() if type(module).forward not in (_BatchNorm.forward, nn.SyncBatchNorm.forward):
            return "It is a BatchNorm with a forward method of its own", "Replace it by hand, by GroupNorm for instance"
        case _BatchNorm() if batch_norm == "freeze" and module.running_mean is None:
            return "It keeps no running statistics that could be frozen", "Use batch_norm='group'"
        case _:
            return None


def _replacement(norm: _BatchNorm, batch_norm: str) -> nn.Module:
    """What takes the norm's place."""
    if batch_norm == "freeze":
        return FrozenBatchNorm.of(norm)
    weight, bias = _fresh(norm.weight, 1.0), _fresh(norm.bias, 0.0)
    channels = norm.num_features
    groups = math.gcd(_MAX_GROUPS, channels)
    if not isinstance(norm, nn.BatchNorm2d | nn.BatchNorm3d):
        if channels <= _TOO_FEW:
            return ChannelAffine(weight, bias)
        most = min(_MAX_GROUPS, max(channels // _VECTOR_GROUP, 1))
        groups = max(n for n in range(1, most + 1) if channels % n == 0)
    group_norm = nn.GroupNorm(groups, channels, affine=False)
    group_norm.affine = norm.affine
    group_norm.register_parameter("weight", weight)
    group_norm.register_parameter("bias", bias)
    return group_norm


def _fresh(parameter: nn.Parameter | None, value: float) -> nn.Parameter | None:
    """A parameter that begins at the value, of the other's shape, type and device, and as frozen as that."""
    if parameter is None:
        return None
    return nn.Parameter(torch.full_like(parameter, value), requires_grad=parameter.requires_grad)
