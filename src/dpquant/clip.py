# SPDX-License-Identifier: Apache-2.0
"""The sum of clipped per-example gradients of a model, from one forward and one backward pass.

The norm that is clipped must be the norm of what is summed. A second backward pass would redraw the stochastic
rounding, so
there is none: layers leave their operands on a tape, every example's squared norm is taken from those, then the clipped
sum from the same operands (book-keeping; Bu et al., arXiv 2210.00038). A weight whose per-example gradient is G_i =
sum_t g_it x_it^T has

    ||G_i||^2 = <g_i g_i^T, x_i x_i^T>      by Gram matrices where there are few positions T, else by forming G_i

Trainable parameters are detached while the passes run: no gradient that is not clipped ever exists on the model.
A parameter without a per-example gradient is an error. An example whose gradient is not finite contributes exactly
zero.

Symbols: B examples, C clip norm, c_i clip factor, T positions, D patch size, O output channels, G groups.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from dpquant.errors import ModelError, SettingError
from dpquant.kernels import (
    Geometry,
    add_patch_products,
    code_values,
    in_weight_order,
    patch_products,
    unfolded,
)
from dpquant.layers import Pass, QuantizableLayer, quantizable_layers, running
from dpquant.quantizer import QTensor
from dpquant.streams import derive_key

PerExampleLoss = Callable[[nn.Module, Any], Tensor]

# Clip factors are rounded down by this much, and squared norms up by this much of the sum of absolute terms, which is
# more
# than float32 sums of the lengths met here lose: a contribution stays at most C.
_ROUND_OFF = 2.0**-20

# Examples a backward pass by default: where parameters are few, calls cost most; where they are many, memory does.
_MICROBATCH_OF_SMALL, _MICROBATCH_OF_LARGE, _MANY_PARAMETERS = 256, 64, 2**20


@dataclasses.dataclass(frozen=True)
class ClippedSum:
    """A sum over examples of clipped gradients, before noise.

    Attributes:
      grads: {parameter name: float32 tensor of the parameter's shape}.
      sensitivity: L2 norm by which adding or removing one record can change `grads` as one vector.
    Privacy: reads private data and is not private itself; release it only through noise of std proportional to
      `sensitivity`.
    """

    grads: dict[str, Tensor]
    sensitivity: float


def clipped_sum(
    model: nn.Module,
    loss_fn: PerExampleLoss,
    batch: Any,
    *,
    max_grad_norm: float,
    record_ids: Tensor,
    step: int,
    seed: int,
    microbatch_size: int | None = None,
) -> ClippedSum:
    """The sum over a batch of per-example gradients, each scaled to at most `max_grad_norm`.

    Example i's contribution depends on the model, on its own record and on its own rounding draws, which are fixed by
    (seed, step, record id): on nothing else. So the sum over any two batches that differ in one record differs by at
    most `max_grad_norm`. Microbatches change memory and time, never the result beyond float32 rounding.

    Args:
      model: a prepared model (`dpquant.prepare`), trainable privately (`check_trainable`).
      loss_fn: `(model, batch) -> Tensor (B,)`, the loss of each example.
      batch: tensors whose first axis is the example, or tuples, lists and dicts of them.
      max_grad_norm: C > 0.
      record_ids: int64 `(B,)`: the stable identity of each example.
      step: the logical step; another step draws other roundings.
      seed: of the rounding draws. They carry no privacy: the bound holds for every draw.
      microbatch_size: examples a backward pass; None chooses.
    Returns: ClippedSum with sensitivity C; zeros for an empty batch.
    Raises:
      SettingError: an argument out of range, or a loss that is not one number per example.
      ModelError: a parameter has no per-example gradient.
    Privacy: per example; no noise is added here.
    Source: Abadi et al., arXiv 1607.00133, Algorithm 1 (clipping); algorithm of DPQuant, arXiv 2509.03472.
    """
    if not (isinstance(max_grad_norm, int | float) and 0 < max_grad_norm < math.inf):
        raise SettingError(
            f"Expected max_grad_norm > 0 and finite; got max_grad_norm={max_grad_norm}. Without a bound there is no "
            "sensitivity. Pass the clipping norm C."
        )
    if microbatch_size is not None and microbatch_size < 1:
        raise SettingError(f"Expected microbatch_size >= 1; got microbatch_size={microbatch_size}.")
    if not quantizable_layers(model) and any(type(m) in (nn.Conv2d, nn.Linear) for m in model.modules()):
        raise ModelError("Expected a prepared model; got one without quantizable layers. Call dpquant.prepare(model).")
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    size = microbatch_size or default_microbatch_size(sum(p.numel() for p in trainable.values()))
    with _taping(model, trainable) as tape, running(model, Pass(key=derive_key(seed, "step", step), tape=tape)) as run:
        for start in range(0, len(record_ids), size):
            rows = slice(start, start + size)
            run.begin(record_ids[rows])
            tape.rewind()
            losses = per_example_losses(loss_fn, model, take_rows(batch, rows), len(record_ids[rows]))
            (losses.sum() + 0 * tape.anchor).backward()
            tape.add_clipped(max_grad_norm)
        return ClippedSum(grads=tape.totals(), sensitivity=float(max_grad_norm))


def default_microbatch_size(num_parameters: int) -> int:
    """Examples a backward pass."""
    return _MICROBATCH_OF_SMALL if num_parameters < _MANY_PARAMETERS else _MICROBATCH_OF_LARGE


def take_rows(batch: Any, rows: slice | Tensor) -> Any:
    """The same rows of every tensor in a batch of tensors, tuples, lists and dicts."""
    match batch:
        case Tensor():
            return batch[rows]
        case dict():
            return {key: take_rows(value, rows) for key, value in batch.items()}
        case tuple() if hasattr(batch, "_fields"):
            return type(batch)(*(take_rows(value, rows) for value in batch))
        case tuple():
            return tuple(take_rows(value, rows) for value in batch)
        case list():
            return [take_rows(value, rows) for value in batch]
    raise SettingError(
        f"Expected a batch of tensors, tuples, lists and dicts; got a {type(batch).__name__}. A microbatch takes the "
        "same "
        "rows of every tensor. Give the data set a collate function that returns tensors."
    )


def per_example_losses(loss_fn: PerExampleLoss, model: nn.Module, batch: Any, num_examples: int) -> Tensor:
    """The losses `(B,)`, checked to be one number per example."""
    losses = loss_fn(model, batch)
    if not isinstance(losses, Tensor) or losses.shape != (num_examples,):
        got = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else f"a {type(losses).__name__}"
        raise SettingError(
            f"Expected loss_fn to return one loss per example, a tensor with one axis; got {got}. "
            "Each example's gradient is clipped on its own. Use reduction='none'."
        )
    return losses


class Contribution(Protocol):
    """The per-example gradients of one parameter from one call of a layer, evaluated as late as possible."""

    def squared_norms(self) -> Tensor:
        """||G_i||^2, float64 `(B,)`, never less than the true value of what `add_weighted` adds up."""
        ...

    def per_example(self) -> Tensor:
        """G_i, float32 `(B, *parameter shape)`."""
        ...

    def add_weighted(self, weights_B: Tensor, total: Tensor | None) -> Tensor:
        """Add sum_i w_i G_i to a total, in place, in an order of its own that `in_parameter_order` undoes; float32."""
        ...

    def in_parameter_order(self, total: Tensor) -> Tensor:
        """The total in the parameter's own order and shape."""
        ...

    def take(self, rows: Tensor) -> "Contribution":
        """The same for some of the examples."""
        ...


@dataclasses.dataclass
class Formed:
    """Gradients that exist already, `(B, *parameter shape)`."""

    gradients: Tensor

    def squared_norms(self) -> Tensor:
        # Short rows in float32, then their squares in float64: as exact as float64 throughout, without its copy.
        rows = self.gradients.reshape(len(self.gradients), -1, self.gradients.shape[-1])
        return torch.linalg.vector_norm(rows, dim=2).double().square().sum(1)

    def per_example(self) -> Tensor:
        return self.gradients

    def add_weighted(self, weights_B: Tensor, total: Tensor | None) -> Tensor:
        total = self.gradients.new_zeros(self.gradients.shape[1:]) if total is None else total
        total.view(-1).addmv_(self.gradients.flatten(1).t(), weights_B)
        return total

    def in_parameter_order(self, total: Tensor) -> Tensor:
        return total

    def take(self, rows: Tensor) -> "Formed":
        return dataclasses.replace(self, gradients=self.gradients[rows])


@dataclasses.dataclass
class FormedProduct(Formed):
    """Weight gradients `(B, O, D)` in patch order, put into the weight's own order only after summing."""

    geometry: Geometry
    shape: torch.Size

    def per_example(self) -> Tensor:
        return in_weight_order(self.gradients, self.geometry).reshape(-1, *self.shape)

    def in_parameter_order(self, total: Tensor) -> Tensor:
        return in_weight_order(total, self.geometry).reshape(self.shape)


@dataclasses.dataclass
class Product:
    """Weight gradients as their operands: G_i = scale_i * sum_t g_it x_it^T, x_it the patch that position t sees.

    Attributes:
      patches_BGTD, g_BGTO: values or integer codes of patches and output gradients, float32.
      scale_B: of the product of codes; None = 1.
      geometry, shape: of the layer and its weight.
    """

    patches_BGTD: Tensor
    g_BGTO: Tensor
    scale_B: Tensor | None
    geometry: Geometry
    shape: torch.Size

    @classmethod
    def of(cls, x: Tensor | QTensor, g: Tensor | QTensor, geometry: Geometry, shape: torch.Size) -> "Product":
        """From a layer's operands `(B, C, H, W)` and `(B, O, H', W')`, both quantized or neither."""
        g_BGTO = code_values(g).flatten(2).unflatten(1, (geometry.groups, -1)).transpose(2, 3)
        scale_B = x.scale * g.scale if isinstance(x, QTensor) and isinstance(g, QTensor) else None
        return cls(unfolded(code_values(x), geometry), g_BGTO, scale_B, geometry, shape)

    @property
    def has_few_positions(self) -> bool:
        """Whether two T x T Gram matrices cost less than forming O x D products."""
        positions, out_channels, patch = self.patches_BGTD.shape[2], self.shape[0], math.prod(self.shape[1:])
        return positions * (out_channels + patch) < out_channels * patch

    def squared_norms(self) -> Tensor:
        """By Gram matrices: <x_i x_i^T, g_i g_i^T>, summed in float64, with a margin for the Grams' own round-off."""
        if self.patches_BGTD.shape[2] == 1:
            squares = [t.double().square().sum((2, 3)) for t in (self.patches_BGTD, self.g_BGTO)]
            total_B = (squares[0] * squares[1]).sum(1)
        else:
            grams = [(t @ t.transpose(2, 3)).double() for t in (self.patches_BGTD, self.g_BGTO)]
            lengths = [gram.diagonal(dim1=2, dim2=3).sqrt() for gram in grams]
            margin_B = (lengths[0] * lengths[1]).sum((1, 2)).square()
            total_B = (grams[0] * grams[1]).sum((1, 2, 3)) + _ROUND_OFF * margin_B
        return total_B if self.scale_B is None else total_B * self.scale_B.double().square()

    def formed(self) -> FormedProduct:
        """The gradients themselves."""
        gradients = patch_products(self.g_BGTO, self.patches_BGTD)
        if self.scale_B is not None:
            gradients.mul_(self.scale_B[:, None, None])
        return FormedProduct(gradients, self.geometry, self.shape)

    def per_example(self) -> Tensor:
        return self.formed().per_example()

    def add_weighted(self, weights_B: Tensor, total: Tensor | None) -> Tensor:
        if self.scale_B is not None:
            weights_B = weights_B * self.scale_B
        return add_patch_products(self.g_BGTO * weights_B[:, None, None, None], self.patches_BGTD, total)

    def in_parameter_order(self, total: Tensor) -> Tensor:
        return in_weight_order(total.flatten(0, 1), self.geometry).reshape(self.shape)

    def take(self, rows: Tensor) -> "Product":
        scale_B = None if self.scale_B is None else self.scale_B[rows]
        return dataclasses.replace(
            self, patches_BGTD=self.patches_BGTD[rows], g_BGTO=self.g_BGTO[rows], scale_B=scale_B
        )


class Lookup:
    """The gradient of an embedding table: rows `g` added at positions `ids`."""

    def __init__(self, ids_BT: Tensor, g_BTD: Tensor, num_rows: int):
        self._ids, self._g, self._num_rows = ids_BT, g_BTD, num_rows

    def squared_norms(self) -> Tensor:
        same = self._ids[:, :, None] == self._ids[:, None, :]
        gram = self._g @ self._g.transpose(1, 2)
        lengths = gram.diagonal(dim1=1, dim2=2).double().sqrt()
        return (gram.double() * same).sum((1, 2)) + _ROUND_OFF * lengths.sum(1).square()

    def per_example(self) -> Tensor:
        table = self._g.new_zeros(len(self._ids), self._num_rows, self._g.shape[2])
        return table.scatter_add_(1, self._ids[..., None].expand_as(self._g), self._g)

    def add_weighted(self, weights_B: Tensor, total: Tensor | None) -> Tensor:
        total = self._g.new_zeros(self._num_rows, self._g.shape[2]) if total is None else total
        return total.index_add_(0, self._ids.flatten(), (self._g * weights_B[:, None, None]).flatten(0, 1))

    def in_parameter_order(self, total: Tensor) -> Tensor:
        return total

    def take(self, rows: Tensor) -> "Lookup":
        return Lookup(self._ids[rows], self._g[rows], self._num_rows)


class _GradientTape:
    """Collects contributions during a backward pass and turns them into the clipped sum."""

    def __init__(self, names: dict[Tensor, str], device: torch.device):
        self.anchor = torch.zeros((), device=device, requires_grad=True)
        self._names = names  # of the trainable parameters
        self._contributions: dict[str, list[Contribution]] = {}
        self._last: dict[str, Contribution] = {}
        self._totals: dict[str, Tensor] = {}
        self.listening = True

    def rewind(self) -> None:
        """Forget the last microbatch."""
        self._contributions = {name: [] for name in self._names.values()}

    def owns(self, module: nn.Module) -> bool:
        """Whether some trainable parameter is the module's own."""
        return any(p in self._names for p in module.parameters(recurse=False))

    def record(self, layer: QuantizableLayer, x: Tensor | QTensor, g: Tensor | QTensor, grad: Tensor) -> None:
        if layer.weight in self._names:  # spares a frozen layer the operands' copies
            product = Product.of(x, g, layer.geometry, layer.weight.shape)
            self.add(layer.weight, product if product.has_few_positions else product.formed())
        if layer.bias is not None:
            self.add(layer.bias, Formed(grad.flatten(2).sum(2)))

    def add(self, parameter: Tensor, contribution: Contribution) -> None:
        """One more contribution to a parameter's per-example gradients; a frozen parameter needs none."""
        if parameter in self._names:
            self._contributions[self._names[parameter]].append(contribution)

    def add_clipped(self, max_grad_norm: float) -> None:
        """Add sum_i c_i G_i of the microbatch on the tape to the totals."""
        parts = {name: self._one_contribution(name) for name in self._contributions}
        squared_norms_B = torch.stack([part.squared_norms() for part in parts.values()]).sum(0)
        factors_B, finite_B = clip_factors(squared_norms_B, max_grad_norm)
        if not finite_B.all():
            rows = finite_B.nonzero().flatten()
            parts = {name: part.take(rows) for name, part in parts.items()}
            factors_B = factors_B[rows]
        for name, part in parts.items():
            self._totals[name] = part.add_weighted(factors_B, self._totals.get(name))
        self._last = parts

    def totals(self) -> dict[str, Tensor]:
        """{parameter name: the sum over all microbatches}; zeros before the first."""
        return {
            name: self._last[name].in_parameter_order(self._totals[name])
            if name in self._totals
            else torch.zeros_like(parameter)
            for parameter, name in self._names.items()
        }

    def _one_contribution(self, name: str) -> Contribution:
        """A parameter used once keeps its operands; one that is shared or reused needs its gradients formed."""
        contributions = self._contributions[name]
        if not contributions:
            raise ModelError(
                f"Expected every trainable parameter to get a per-example gradient; {name} got none. Its module was "
                "not "
                "called, or its output does not reach the loss, or the parameter is used outside its module. "
                "Freeze it with requires_grad_(False), or use it through the module that owns it."
            )
        if len(contributions) == 1:
            return contributions[0]
        return Formed(torch.stack([c.per_example() for c in contributions]).sum(0))


def clip_factors(squared_norms_B: Tensor, max_grad_norm: float) -> tuple[Tensor, Tensor]:
    """c_i = min(1, C / ||G_i||), rounded down to float32, and which examples are finite.

    Args:
      squared_norms_B: float64 `(B,)`.
      max_grad_norm: C.
    Returns: c_i float32 `(B,)`, 0 for an example that is not finite; finite, bool `(B,)`.
    """
    finite_B = squared_norms_B.isfinite()
    norms_B = squared_norms_B.clamp(min=0).sqrt()
    factors_B = torch.where(norms_B > max_grad_norm, max_grad_norm / norms_B, 1.0) * (1 - _ROUND_OFF)
    return torch.where(finite_B, factors_B, 0.0).float(), finite_B


@contextlib.contextmanager
def _taping(model: nn.Module, trainable: dict[str, nn.Parameter]) -> Iterator[_GradientTape]:
    """Detach all parameters and listen to the modules that own any, until the block ends."""
    device = next((p.device for p in trainable.values()), torch.device("cpu"))
    tape = _GradientTape({p: name for name, p in trainable.items()}, device)
    handles = [
        module.register_forward_hook(_listener(tape))
        for module in model.modules()
        if not isinstance(module, QuantizableLayer) and tape.owns(module)
    ]
    for parameter in trainable.values():
        parameter.requires_grad_(False)
    try:
        yield tape
    finally:
        for parameter in trainable.values():
            parameter.requires_grad_(True)
        for handle in handles:
            handle.remove()


def _listener(tape: _GradientTape) -> Callable[[nn.Module, tuple[Any, ...], Any], Tensor]:
    """A forward hook that, once the output's gradient is known, records the module's per-example gradients."""

    def listen(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        if not tape.listening:
            return output
        if len(inputs) != 1 or not isinstance(inputs[0], Tensor) or not isinstance(output, Tensor):
            raise ModelError(
                f"Expected a module with parameters of its own to map one tensor to one tensor; a "
                f"{type(module).__name__} does not. Its per-example gradients are unknown. Freeze it or replace it."
            )
        x = inputs[0].detach()
        if not output.requires_grad:
            output = output + tape.anchor

        def record(grad: Tensor) -> None:
            tape.listening = False  # the module may be evaluated again
            for name, contribution in _contributions(module, x, grad).items():
                tape.add(module.get_parameter(name), contribution)
            tape.listening = True

        output.register_hook(record)
        return output

    return listen


def _contributions(module: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Contribution]:
    """{parameter name inside the module: its per-example gradients}, from the module's input and output gradient."""
    match module:
        case nn.GroupNorm():
            normalised = F.group_norm(x, module.num_groups, None, None, module.eps)
            return {
                "weight": Formed((grad * normalised).flatten(2).sum(2)) if x.ndim > 2 else Formed(grad * normalised),
                "bias": Formed(grad.flatten(2).sum(2)) if x.ndim > 2 else Formed(grad),
            }
        case nn.LayerNorm():
            normalised = F.layer_norm(x, module.normalized_shape, None, None, module.eps)
            axes = tuple(range(1, x.ndim - len(module.normalized_shape)))
            total = (lambda t: t.sum(axes)) if axes else (lambda t: t)
            return {"weight": Formed(total(grad * normalised)), "bias": Formed(total(grad))}
        case nn.Embedding():
            ids_BT = x.reshape(len(x), -1)
            g_BTD = grad.reshape(len(x), -1, module.embedding_dim)
            if module.padding_idx is not None:
                g_BTD = g_BTD * (ids_BT != module.padding_idx)[..., None]
            return {"weight": Lookup(ids_BT, g_BTD, module.num_embeddings)}
        case _:
            return _contributions_by_vmap(module, x, grad)


def _contributions_by_vmap(module: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Contribution]:
    """Any other module: differentiate it on one example at a time, vectorised."""
    parameters = {name: p.detach() for name, p in module.named_parameters(recurse=False)}

    def inner(parameters: dict[str, Tensor], x: Tensor, grad: Tensor) -> Tensor:
        y = torch.func.functional_call(module, parameters, (x.unsqueeze(0),))
        return (y.squeeze(0) * grad).sum()

    try:
        with torch.enable_grad():
            gradients = torch.func.vmap(torch.func.grad(inner), (None, 0, 0), randomness="error")(parameters, x, grad)
    except RuntimeError as error:
        raise ModelError(
            f"Expected a {type(module).__name__} whose per-example gradients can be computed; got one that cannot be "
            "evaluated one example at a time. Freeze it, or build it of Conv2d, Linear, GroupNorm, LayerNorm and "
            "Embedding."
        ) from error
    return {name: Formed(gradient) for name, gradient in gradients.items()}


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
            return (
                (
                    "Its parameters have no per-example gradient here",
                    "Build it of Linear layers, or freeze it with requires_grad_(False)",
                )
                if any(p.requires_grad for p in module.parameters())
                else None
            )
        case nn.Embedding() if module.scale_grad_by_freq:
            return "scale_grad_by_freq weighs by counts over the batch", "Set scale_grad_by_freq=False"
        case nn.Embedding() if module.max_norm is not None:
            return "max_norm changes the table by which records are looked up", "Set max_norm=None"
        case LazyModuleMixin() if module.has_uninitialized_params():
            return "Its parameters have no shape yet", "Run one forward pass on made-up data first"
        case _:
            return None
