# SPDX-License-Identifier: Apache-2.0
"""The sum of clipped per-example gradients of a model, from one forward and one backward pass.

The norm that is clipped must be the norm of what is summed. A second backward pass would redraw the stochastic
rounding, so there is none: layers leave their operands on a tape, every example's squared norm is taken from those,
then the clipped sum from the same operands (book-keeping; Bu et al., arXiv 2210.00038; `gradients.py` has the algebra).

Trainable parameters are detached while the passes run: no gradient that is not clipped ever exists on the model.
A parameter without a per-example gradient is an error. An example whose gradient is not finite contributes exactly
zero.

Symbols: B examples, O output channels, C clip norm, G_i the whole gradient of example i, c_i its clip factor.
"""

import contextlib
import dataclasses
import math
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dpquant.clock import Clock
from dpquant.errors import ModelError, SettingError
from dpquant.gradients import ROUND_OFF, Contribution, Formed, contributions_of
from dpquant.layers import Pass, QuantizableLayer, quantizable_layers, running
from dpquant.norms import TapedGroupNorm
from dpquant.quantizer import QTensor
from dpquant.streams import derive_key
from dpquant.weight_gradients import Product
from dpquant.working_memory import working_memory

PerExampleLoss = Callable[[nn.Module, Any], Tensor]

_SMALLEST_NORMAL = torch.finfo(torch.float32).tiny  # below it, rounding to float32 could double a factor

_MICROBATCHES = (64, 128, 256)  # examples a backward pass, by default
_microbatch_sizes: "weakref.WeakKeyDictionary[nn.Module, int]" = weakref.WeakKeyDictionary()


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
    clock: Clock | None = None,
) -> ClippedSum:
    """The sum over a batch of per-example gradients, each scaled to at most `max_grad_norm`.

    Example i's contribution depends on the model, on its own record and on its own rounding draws, which are fixed by
    (seed, step, record id): on nothing else. So the sum over any two batches that differ in one record differs by at
    most `max_grad_norm`. Every microbatch has the same size, filled up where need be, so that an example's own
    contribution does not depend on how many others there are. Another size changes memory and time, and the last bits
    of every sum; where layers run quantized after others that do not, a last bit can become another code.

    Args:
      model: a prepared model (`dpquant.prepare`), trainable privately (`check_trainable`).
      loss_fn: `(model, batch) -> Tensor (B,)`, the loss of each example.
      batch: tensors whose first axis is the example, or tuples, lists and dicts of them.
      max_grad_norm: C > 0.
      record_ids: int64 `(B,)`: the stable identity of each example.
      step: the logical step; another step draws other roundings.
      seed: of the rounding draws. They carry no privacy: the bound holds for every draw.
      microbatch_size: examples a backward pass; None chooses, by the shapes and, up to 256, by the number of examples.
      clock: if given, gets each layer's seconds: its three products, quantization included, and its norm and sum.
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
    if len(record_ids) == 0:
        return ClippedSum(
            grads={name: torch.zeros_like(p) for name, p in trainable.items()}, sensitivity=float(max_grad_norm)
        )
    size = microbatch_size or default_microbatch_size(model, loss_fn, batch, len(record_ids))
    with working_memory():
        grads = _clipped_grads(model, loss_fn, batch, trainable, max_grad_norm, record_ids, (seed, step), size, clock)
    return ClippedSum(grads=grads, sensitivity=float(max_grad_norm))


def _clipped_grads(
    model: nn.Module,
    loss_fn: PerExampleLoss,
    batch: Any,
    trainable: dict[str, nn.Parameter],
    max_grad_norm: float,
    record_ids: Tensor,
    draws: tuple[int, int],
    size: int,
    clock: Clock | None,
) -> dict[str, Tensor]:
    """The loop over microbatches. draws: (seed, step) of the roundings."""
    seed, step = draws
    key = derive_key(seed, "step", step)
    with _taping(model, trainable, clock=clock) as tape, running(model, Pass(key=key, tape=tape, clock=clock)) as run:
        for piece, ids, num_examples in microbatches(batch, record_ids, size):
            run.begin(ids)
            tape.rewind()
            losses = per_example_losses(loss_fn, model, piece, size)
            (losses[:num_examples].sum() + 0 * tape.anchor).backward()
            tape.add_clipped(max_grad_norm, size, num_examples)
        return tape.totals()


def contributions_by_parameter(
    model: nn.Module, loss_fn: PerExampleLoss, batch: Any, *, record_ids: Tensor, key: int
) -> dict[str, Contribution]:
    """Each example's own gradient in the precision that the model runs in, not clipped, as what it is made of.

    Args:
      model: as of `clipped_sum`.
      loss_fn: as of `clipped_sum`.
      batch: one microbatch.
      record_ids: int64 `(B,)`.
      key: of the rounding draws, 64 bits.
    Returns: {parameter name: its gradients}.
    Raises:
      SettingError, ModelError: as of `clipped_sum`.
    Privacy: per example; reads private data, and nothing bounds it.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with (
        _taping(model, trainable, forming=False) as tape,
        running(model, Pass(key=key, record_ids=record_ids, tape=tape)),
    ):
        tape.rewind()
        losses = per_example_losses(loss_fn, model, batch, len(record_ids))
        (losses.sum() + 0 * tape.anchor).backward()
        return tape.contributions()


def default_microbatch_size(model: nn.Module, loss_fn: PerExampleLoss, batch: Any, num_examples: int) -> int:
    """Examples a backward pass: so many that their activations outweigh the weights twice, which every pass reads anew.

    Shapes decide, from a forward pass over one example; its values do not. Once for every model. But no more than fewer
    examples than that can fill: where their number is private, give a size that does not depend on it.
    """
    if model not in _microbatch_sizes:
        outputs: list[int] = []
        handles = [
            module.register_forward_hook(lambda module, inputs, output: outputs.append(getattr(output, "numel", int)()))
            for module in model.modules()
            if not list(module.children())
        ]
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                loss_fn(model, take_rows(batch, slice(0, 1)))
        finally:
            for handle in handles:
                handle.remove()
        weights = sum(p.numel() for p in model.parameters())
        enough = [size for size in _MICROBATCHES if size * sum(outputs) >= 2 * weights]
        _microbatch_sizes[model] = min(enough, default=_MICROBATCHES[-1])
    filled = [size for size in _MICROBATCHES if size >= num_examples]
    return min([_microbatch_sizes[model], *filled])


def microbatches(batch: Any, record_ids: Tensor, size: int) -> Iterator[tuple[Any, Tensor, int]]:
    """A batch in pieces of exactly `size` examples: (batch, record ids, how many of them count).

    The last piece is filled up with its own last example, which counts once. An operator may sum in another order when
    it is given another number of examples, and stochastic rounding makes a different code of a last bit. Were pieces
    only as long as need be, a record that comes or goes would change what the others contribute.
    """
    for start in range(0, len(record_ids), size):
        rows = torch.arange(start, start + size).clamp_(max=len(record_ids) - 1)
        yield take_rows(batch, rows), record_ids[rows], min(size, len(record_ids) - start)


def take_rows(batch: Any, rows: slice | Tensor) -> Any:
    """The same rows of every tensor in a batch of tensors, tuples, lists and dicts."""

    def taken(leaf: Any) -> Tensor:
        if isinstance(leaf, Tensor):
            return leaf[rows]
        raise SettingError(
            f"Expected a batch of tensors, tuples, lists and dicts; got a {type(leaf).__name__}. A microbatch takes "
            "the same rows of every tensor. Give the data set a collate function that returns tensors."
        )

    return with_leaves(batch, taken)


def with_leaves(batch: Any, change: Callable[[Any], Any]) -> Any:
    """A batch of the same tuples, lists and dicts, with everything else in it changed."""
    match batch:
        case dict():
            return {key: with_leaves(value, change) for key, value in batch.items()}
        case tuple() if hasattr(batch, "_fields"):
            return type(batch)(*(with_leaves(value, change) for value in batch))
        case tuple() | list():
            return type(batch)([with_leaves(value, change) for value in batch])
    return change(batch)


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


class _GradientTape:
    """Collects contributions during a backward pass and turns them into the clipped sum.

    forming: weight gradients may be formed at once, where that makes norm and sum faster; else operands are kept.
    clock: measures what norms and sums take, under the name of the module that owns the parameter; None: nothing does.
    """

    def __init__(self, names: dict[Tensor, str], device: torch.device, forming: bool, clock: Clock | None):
        self.anchor = torch.zeros((), device=device, requires_grad=True)
        self._names = names  # of the trainable parameters
        self._forming, self._clock = forming, clock
        self._contributions: dict[str, list[Contribution]] = {}
        self._last: dict[str, Contribution] = {}
        self._totals: dict[str, Any] = {}
        self.listening = True

    def rewind(self) -> None:
        """Forget the last microbatch."""
        self._contributions = {name: [] for name in self._names.values()}

    def owns(self, module: nn.Module) -> bool:
        """Whether some trainable parameter is the module's own."""
        return any(p in self._names for p in module.parameters(recurse=False))

    def record(self, layer: QuantizableLayer, x: Tensor | QTensor, g: Tensor | QTensor, grad: Tensor) -> None:
        if layer.weight in self._names:  # spares a frozen layer the operands' copies
            recipe = layer.precision.wgrad
            bits = None if recipe is None else recipe.gradient.format.significant_bits
            product = Product.of(x, g, layer.geometry, layer.weight.shape, significant_bits=bits)
            self.add(layer.weight, product.fastest() if self._forming else product)
        if layer.bias is not None:
            self.add(layer.bias, Formed(grad.flatten(2).sum(2)))

    def add(self, parameter: Tensor, contribution: Contribution) -> None:
        """One more contribution to a parameter's per-example gradients; a frozen parameter needs none."""
        if parameter in self._names:
            self._contributions[self._names[parameter]].append(contribution)

    def add_clipped(self, max_grad_norm: float, size: int, num_examples: int) -> None:
        """Add sum_i c_i G_i of the microbatch of `size` on the tape to the totals; its first `num_examples` count."""
        parts = self.contributions()
        squared_norms: dict[str, Tensor] = {}
        for name, part in parts.items():
            with self._timing(name):
                squared_norms[name] = part.squared_norms()
        for name, norms in squared_norms.items():
            if len(norms) != size:
                raise ModelError(
                    f"Expected the first axis of every module's input to be the example; got one of another length for "
                    f"{name}. Its gradients would be clipped by rows that are no examples. Put the examples first."
                )
        squared_norms_B = torch.stack(list(squared_norms.values())).sum(0)
        factors_B, finite_B = clip_factors(squared_norms_B, max_grad_norm)
        factors_B[num_examples:] = 0
        if not finite_B.all():
            rows = finite_B.nonzero().flatten()
            parts = {name: part.take(rows) for name, part in parts.items()}
            factors_B = factors_B[rows]
        for name, part in parts.items():
            with self._timing(name):
                self._totals[name] = part.add_weighted(factors_B, self._totals.get(name))
        self._last = parts

    def contributions(self) -> dict[str, Contribution]:
        """{parameter name: the microbatch's gradients}."""
        return {name: self._one_contribution(name) for name in self._contributions}

    def totals(self) -> dict[str, Tensor]:
        """{parameter name: the sum over all microbatches}."""
        return {name: part.finished(self._totals[name]) for name, part in self._last.items()}

    def _timing(self, parameter: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self._clock is None else self._clock.timing(parameter.rpartition(".")[0])

    def _one_contribution(self, name: str) -> Contribution:
        """A parameter used once keeps its operands; one that is shared or reused needs its gradients formed."""
        contributions = self._contributions[name]
        if not contributions:
            raise ModelError(
                f"Expected every trainable parameter to get a per-example gradient; {name} got none. Its module was "
                "not called, or its output does not reach the loss, or the parameter is used outside its module. "
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
    factors_B = torch.where(norms_B > max_grad_norm, max_grad_norm / norms_B, 1.0) * (1 - ROUND_OFF)
    factors_B = torch.where(finite_B & (factors_B >= _SMALLEST_NORMAL), factors_B, 0.0)
    return factors_B.float(), finite_B


@contextlib.contextmanager
def _taping(
    model: nn.Module, trainable: dict[str, nn.Parameter], *, forming: bool = True, clock: Clock | None = None
) -> Iterator[_GradientTape]:
    """Detach all parameters and listen to the modules that own any, until the block ends."""
    device = next((p.device for p in trainable.values()), torch.device("cpu"))
    tape = _GradientTape({p: name for name, p in trainable.items()}, device, forming, clock)
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
        if not tape.listening or (isinstance(module, TapedGroupNorm) and inputs and module.records(inputs[0])):
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
            own = dict(module.named_parameters(recurse=False))
            for name, contribution in contributions_of(module, x, grad).items():
                if name in own:  # a norm may have no bias
                    tape.add(own[name], contribution)
            tape.listening = True

        output.register_hook(record)
        return output

    return listen
