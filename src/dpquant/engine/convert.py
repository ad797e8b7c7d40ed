# SPDX-License-Identifier: Apache-2.0
"""Replace layers that mix examples (`fix`), and turn a trained model's layers back into torch's own (`restore`).

BatchNorm normalises by statistics over the batch, so per-example gradients do not exist. `fix` replaces it by one of:

    group    GroupNorm: statistics of one example, over a group of channels and all positions. The learnt weight and
             bias of the BatchNorm are dropped
    freeze   y = x scale + shift,  scale = weight / sqrt(var + eps),  shift = bias - mean scale,  from the running
             statistics: the function that BatchNorm computes in evaluation mode

With `group`, 2-D and 3-D norms get gcd(32, C) groups. Opacus' fixer chooses the same number, so results can be
compared. A 1-D norm may see vectors, with one value per channel. Normalising a group of one value always gives 0, and a
group of two values always -1 and 1; no gradient passes through either (measured: two-layer networks with groups of two
stay at chance on handwritten digits). So groups get at least 16 channels if there are that many, and a norm of one or
two channels becomes a scale and shift without normalization.

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
from dpquant.errors import ModelError, SettingError, expect

_MAX_GROUPS = 32
_VECTOR_GROUP = 16  # channels per group where a channel may be one value; `data/models.py` does the same for 1x1 maps
_TOO_FEW = 2  # normalising vectors of at most this many channels leaves only signs
_CHOICES = ("group", "freeze")
_PLAIN = {QuantConv2d: nn.Conv2d, QuantLinear: nn.Linear, TapedGroupNorm: nn.GroupNorm}
_OF_TWINS = ("name", "backend", "chosen", "precision", "current", "frozen", "tape")  # what torch's layers lack


class FrozenBatchNorm(nn.Module):
    """BatchNorm with fixed statistics: one scale and one shift per channel. It has no parameters.

    Attributes:
      scale, shift: buffers `(C,)`.

    Privacy: per example, reads no other row. The statistics are treated as public: take them from a model that was
      trained on public data.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    @classmethod
    def of(cls, norm: _BatchNorm) -> "FrozenBatchNorm":
        """Build the equivalent of a norm in evaluation mode; the norm must keep running statistics."""
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
    """A trained scale and shift per channel, without normalization.

    Attributes:
      weight, bias: `(C,)`; None if the replaced norm had none.

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
    """Return a copy of the model whose normalization layers do not mix the examples of a batch.

    Every BatchNorm is replaced. Every InstanceNorm loses its running statistics, which would store raw data, and
    normalises in evaluation mode as in training mode. All other modules, their weights and their functions are
    unchanged. The given model is not modified. Make the optimizer from the copy's parameters. Hooks on a replaced
    module are not copied.

    Args:
      model: any module.
      batch_norm: `group` replaces BatchNorm by a new GroupNorm and drops the learnt weight and bias. `freeze` replaces
        it by a FrozenBatchNorm, for a backbone that was trained on public data.
    Returns: the copy. Frozen parameters stay frozen, and modules in evaluation mode stay in it.
    Raises:
      ModelError: model is not a module, is a wrapper around a model, or has a module without a private equivalent.
      SettingError: batch_norm is neither `group` nor `freeze`.
    Privacy: reads no data. `freeze` treats the running statistics as public; those of a model trained on private data
      are not.
    """
    _check_module(model)
    if batch_norm not in _CHOICES:
        raise SettingError(
            f"Expected batch_norm to be one of {', '.join(_CHOICES)}; got batch_norm={batch_norm!r}. It says what "
            "takes BatchNorm's place. Pass 'group' to train from scratch, 'freeze' to keep a public model's statistics."
        )
    for path, module in model.named_modules():
        _check_convertible(path or "the model", module, batch_norm)
    try:
        fixed = copy.deepcopy(model)
    except (RuntimeError, TypeError) as error:
        raise ModelError(
            f"Expected model to be one that can be copied; got a {type(error).__name__}: {error}. fix leaves the given "
            "model as it is. Build the model again, and fix it before it has run."
        ) from error
    replacements: dict[nn.Module, nn.Module] = {}
    for module in fixed.modules():
        if isinstance(module, _BatchNorm):
            replacements[module] = _replacement(module, batch_norm)
            replacements[module].train(module.training)
        elif isinstance(module, _InstanceNorm):
            module.track_running_stats = False
            # torch updates statistics that exist even if they are not tracked
            module.running_mean = module.running_var = module.num_batches_tracked = None
    for parent in list(fixed.modules()):
        for name, child in parent._modules.items():
            if child in replacements:
                setattr(parent, name, replacements[child])
    return replacements.get(fixed, fixed)


def restore(model: nn.Module) -> nn.Module:
    """Turn a prepared model's layers back into torch's own Conv2d, Linear and GroupNorm, in full precision.

    The model is changed in place and returned. Modules, parameters, hooks and settings are the same objects as before,
    so shared modules stay shared. Without dpquant's layers a model can be scripted, exported, pickled and
    differentiated by `torch.func`. Modules that `fix` has put in (FrozenBatchNorm, ChannelAffine) are kept. Call it
    after training, or on a copy.

    Args:
      model: a model that `prepare` or `make_private` has changed; any other model is left as it is.
    Returns: the model.
    Raises:
      ModelError: model is not a module.
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
    expect("model", model, nn.Module, "a torch.nn.Module", "Pass the model itself", ModelError)


def _check_convertible(path: str, module: nn.Module, batch_norm: str) -> None:
    """Raise ModelError, with the module's path, if a module has no private equivalent."""
    if problem := _problem(module, batch_norm):
        what, remedy = problem
        raise ModelError(
            f"Expected model to have a private equivalent; got {path} ({type(module).__name__}). {what}. {remedy}."
        )


def _problem(module: nn.Module, batch_norm: str) -> tuple[str, str] | None:
    """Return (problem, remedy) if a module has no private equivalent, else None."""
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
    """Build the module that replaces a BatchNorm."""
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
    """Return a new parameter filled with `value`, like `parameter` in shape, dtype, device and requires_grad."""
    if parameter is None:
        return None
    return nn.Parameter(torch.full_like(parameter, value), requires_grad=parameter.requires_grad)
