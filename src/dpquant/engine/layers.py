# SPDX-License-Identifier: Apache-2.0
"""The quantizable layers of a model: replace a model's layers by twins, and set which of them run quantized.

`prepare` replaces every layer that has a quantizable twin: a subclass with the same parameters and state_dict
(`quantizable.py`, `convolutions.py`, `attention.py`, `recurrent.py`). A twin in full precision computes what
the original computes.
"""

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from dpquant.backends.interface import Backend
from dpquant.backends.registry import resolve
from dpquant.engine.arrangement import Arrangement, examples_first
from dpquant.engine.attention import (
    PaddedTransformerEncoder,
    QuantMultiheadAttention,
    QuantOutProjection,
    has_product,
)
from dpquant.engine.context import StepContext, twin_of
from dpquant.engine.convolutions import QuantConv1d, QuantConv2d, QuantConv3d
from dpquant.engine.foreign import refuse_foreign_codes
from dpquant.engine.fused_attention import fused_attention
from dpquant.engine.group_norm import TapedGroupNorm
from dpquant.engine.one_after_another import one_after_another
from dpquant.engine.quantizable import QuantizableLayer, QuantLinear, QuantTransposedLinear
from dpquant.engine.recurrent import QuantGRU, QuantLSTM, QuantRNN
from dpquant.engine.weight_cache import WeightCache
from dpquant.errors import ModelError, SettingError, expect
from dpquant.formats import FULL_PRECISION, Precision, Recipe, precision

ROUTES = "_gradient_routes"  # attribute of a model, see `leaves.py`
_QUANTIZABLE: dict[type[nn.Module], type[QuantizableLayer]] = {
    nn.Conv1d: QuantConv1d,
    nn.Conv2d: QuantConv2d,
    nn.Conv3d: QuantConv3d,
    nn.Linear: QuantLinear,
    NonDynamicallyQuantizableLinear: QuantOutProjection,
    nn.MultiheadAttention: QuantMultiheadAttention,
    nn.RNN: QuantRNN,
    nn.LSTM: QuantLSTM,
    nn.GRU: QuantGRU,
}


def quantizable_twin(kind: type[nn.Module]) -> type[QuantizableLayer] | None:
    """Return the class of quantizable layers that replaces layers of exactly this class; None if there is none."""
    # found only if the user has imported it, so transformers is no dependency
    if kind is getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None):
        return QuantTransposedLinear
    return _QUANTIZABLE.get(kind)


def _twin(module: nn.Module) -> nn.Module | None:
    """Return what takes a module's place in a prepared model; None: it is kept."""
    if "forward" in module.__dict__:  # a forward of its own may compute anything
        return None
    if type(module) is nn.GroupNorm:
        return twin_of(TapedGroupNorm, module, tape=None)
    if type(module) is nn.TransformerEncoder:
        return twin_of(PaddedTransformerEncoder, module)
    kind = quantizable_twin(type(module))
    if kind is None or (isinstance(module, nn.MultiheadAttention) and not has_product(module)):
        return None
    plain = {"plain": type(module)} if kind is QuantTransposedLinear else {}
    return twin_of(kind, module, precision=FULL_PRECISION, current=None, **plain)


def prepare(
    model: nn.Module, *, format: str | Recipe | Precision = "luq-fp4", backend: str | Backend = "auto"
) -> nn.Module:
    """Replace the layers of a model by their quantizable twins, and every GroupNorm by a `TapedGroupNorm`.

    Quantizable are Linear, Conv1d to Conv3d, MultiheadAttention (its projections), RNN, LSTM and GRU (the products with
    their inputs) and the Conv1D of transformers. All run in full precision until `set_policy` or `set_precisions`. The
    model is changed in place and returned; if it is itself such a layer, its twin is returned. Parameters are the same
    objects, so an existing optimizer stays valid, and the state_dict has the same keys and values. A second call
    changes recipe and backend.

    Args:
      model: any module with float32 parameters.
      format: of the layers that a policy selects: a recipe's name (`luq-fp4`, `int8`, `mxfp4`, ...), a `Recipe`, or a
        `Precision` of the three products; `dpquant.formats` explains all names.
      backend: `auto`, `simulate` (any device), `int8` (a CPU whose int8 convolution is exact), `cuda` (a GPU whose
        tensor cores are), or a `Backend`.
    Returns: the prepared model.
    Raises:
      FormatError: the recipe or the backend is unknown, or the recipe cannot run on the backend.
      ModelError: model is not a module, has parameters that are not float32 or that another library has quantized, or
        is on two devices.
    Privacy: reads no data.
    """
    expect("model", model, nn.Module, "a torch.nn.Module", "Pass the model itself", ModelError)
    chosen = precision(format)
    device = _device_of(model)
    refuse_foreign_codes(model)
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.float32:
            raise ModelError(
                f"Expected model's parameters to be float32; got {name} of {parameter.dtype}. Clipping and noise are "
                "calibrated in float32. Call model.float() first."
            )
    resolved = resolve(backend, [chosen], device)
    model.__dict__.pop(ROUTES, None)  # found again, because the model may have other layers by now
    twins: dict[nn.Module, nn.Module] = {}
    for module in list(model.modules()):
        if (twin := _twin(module)) is not None:
            twins[module] = twin
    for parent in list(model.modules()):
        for child_name, child in parent._modules.items():
            if child in twins:
                setattr(parent, child_name, twins[child])
    model = twins.get(model, model)
    for name, layer in quantizable_layers(model).items():
        layer.name, layer.chosen, layer.backend, layer.frozen = name, chosen, resolved, WeightCache()
        layer.__dict__.pop("parts", None)  # made again: they hold weights that the former backend packed
    return model


def _device_of(model: nn.Module) -> torch.device:
    """Return the device of all parameters and buffers; the CPU if there are none."""
    tensors = list(itertools.chain(model.named_parameters(), model.named_buffers()))
    if not tensors:
        return torch.device("cpu")
    first, here = tensors[0][0], tensors[0][1].device
    for name, tensor in tensors:
        if tensor.device != here:
            raise ModelError(
                f"Expected model's parameters and buffers to be on one device; got {first} on {here} and {name} on "
                f"{tensor.device}. A step computes on one. Call model.to(device) before the optimizer is made."
            )
    return here


def quantizable_layers(model: nn.Module) -> dict[str, QuantizableLayer]:
    """Return {name: layer} of a prepared model's quantizable layers, in the order in which the model defines them.

    Raises:
      ModelError: model is no torch.nn.Module.
    """
    expect("model", model, nn.Module, "a torch.nn.Module", "Pass the model itself", ModelError)
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizableLayer)}


def set_policy(model: nn.Module, names: Iterable[str]) -> None:
    """Run exactly these layers in the `format` given to `prepare`, all others in full precision; () quantizes none.

    Raises:
      SettingError: a name is not a quantizable layer of the model, or names are no collection.
    Privacy: reads no data; the choice itself must come from released numbers only.
    """
    layers = quantizable_layers(model)
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise SettingError(
            f"Expected names to be a collection of layer names; got names={names!r}. () quantizes none. Put names into "
            "a tuple."
        )
    set_precisions(model, {name: layers[name].chosen if name in layers else FULL_PRECISION for name in names})


def set_precisions(model: nn.Module, precisions: Mapping[str, Precision]) -> None:
    """Set the precision of each of these layers; all other layers run in full precision.

    Raises:
      SettingError: a name is not a quantizable layer of the model.
      FormatError: the model's backend cannot run a precision.
    Privacy: reads no data; the choice itself must come from released numbers only.
    """
    layers = quantizable_layers(model)
    if unknown := sorted(precisions.keys() - layers.keys()):
        raise SettingError(
            f"Expected names to be quantizable layers of the model; got {unknown[0]!r}. "
            f"Known layers: {', '.join(layers) or 'none (call dpquant.prepare(model) first)'}."
        )
    for name, one in precisions.items():
        resolve(layers[name].backend, [one], layers[name].weight.device)
    for name, layer in layers.items():
        layer.precision = precisions.get(name, FULL_PRECISION)


def current_precisions(model: nn.Module) -> dict[str, Precision]:
    """Return {name: precision} of the layers that currently run quantized."""
    return {name: layer.precision for name, layer in quantizable_layers(model).items() if layer.quantized}


def count_macs(
    model: nn.Module, forward: Callable[[], object], rows: int = 1, *, layers: Mapping[str, nn.Module] | None = None
) -> dict[str, float]:
    """Return {layer's name: multiply-accumulates of its forward product for one example}.

    Args:
      model: a prepared model, or any model if layers are given.
      forward: runs the model once on a batch; it is called without autograd.
      rows: number of examples of that batch.
      layers: {name: convolution or linear layer} of the model; None: its quantizable layers.
    """
    layers = quantizable_layers(model) if layers is None else layers
    macs, arranged = dict.fromkeys(layers, 0.0), arrangements(model)

    def counter(name: str) -> Callable[..., None]:
        def count(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            output = examples_first(output, arranged[name], rows) if name in arranged else output
            if isinstance(module, QuantizableLayer):
                macs[name] += module.macs(args, kwargs, output)
            else:
                macs[name] += output[0].numel() * cast(Tensor, module.weight)[0].numel()

        return count

    handles = [layer.register_forward_hook(counter(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        with torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return macs


def arrangements(model: nn.Module) -> Mapping[str, Arrangement]:
    """Return {path: where the module's calls have the examples} of those that have them elsewhere than others."""
    return getattr(model.__dict__.get(ROUTES), "arranged", {})


@contextlib.contextmanager
def running(model: nn.Module, run: StepContext) -> Iterator[StepContext]:
    """Attach a step context to every quantizable layer, and its tape to every GroupNorm twin, until the block ends.

    Modules that have to take examples one after another do so until then, and attention is `fused_attention`'s.
    """
    layers, arranged = quantizable_layers(model), arrangements(model)
    separate = [model.get_submodule(path) for path in getattr(model.__dict__.get(ROUTES), "separate", ())]
    norms = [module for module in model.modules() if isinstance(module, TapedGroupNorm)]
    for name, layer in layers.items():
        layer.current, layer.arrangement = run, arranged.get(name, "first")
    for norm in norms:
        norm.tape = run.tape
    try:
        with one_after_another(separate, run), fused_attention():
            yield run
    finally:
        for layer in layers.values():
            layer.current = None
        for norm in norms:
            norm.tape = None
