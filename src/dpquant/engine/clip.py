# SPDX-License-Identifier: Apache-2.0
"""The sum of clipped per-example gradients of a model, from one forward and one backward pass.

The norm that is clipped must be the norm of what is summed. A second backward pass would redraw the stochastic
rounding, so there is none: layers leave their operands on a tape, every example's squared norm is taken from those,
then the clipped sum from the same operands (book-keeping; Bu et al., arXiv 2210.00038; `engine/contributions.py` has
the algebra).

Trainable parameters are detached while the passes run: no gradient that is not clipped ever exists on the model.
A parameter without a per-example gradient is an error. An example whose gradient is not finite contributes exactly
zero.

Symbols: B examples, O output channels, C clip norm, G_i the whole gradient of example i, c_i its clip factor.
"""

import contextlib
import dataclasses
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dpquant.backends.malloc import working_memory
from dpquant.backends.quantize import QTensor
from dpquant.engine.batches import Microbatch, check_rows, microbatches, take_rows
from dpquant.engine.clock import Clock
from dpquant.engine.context import Pass
from dpquant.engine.contributions import ROUND_OFF, Contribution, Formed, Lookup
from dpquant.engine.group_norm import TapedGroupNorm
from dpquant.engine.layers import QuantizableLayer, quantizable_layers, running
from dpquant.engine.per_example import contributions_of, has_formula
from dpquant.engine.randomness import Drawing, Position, drawn_by_record, seeded
from dpquant.engine.weight_gradients import Product
from dpquant.errors import DPQuantError, ModelError, SettingError
from dpquant.rounding import derive_key

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

    Example i's contribution depends on the model, on its own record and on its own draws (rounding, dropout), which are
    fixed by (seed, step, record id): on nothing else. So the sum over any two batches that differ in one record, the
    others keeping their ids, differs by at most `max_grad_norm`. Where ids are positions and a record is removed, the
    others' ids move: then the same bound needs draws that nobody knows, that is a secret seed (`engine/randomness.py`).
    Every microbatch has the same size, filled up where need be, so that an example's own contribution does not depend
    on how many others there are. Another size changes memory and time, and the last bits of every sum; where layers run
    quantized after others that do not, a last bit can become another code.

    Args:
      model: a prepared model (`dpquant.prepare`), trainable privately (`check_trainable`).
      loss_fn: `(model, batch) -> Tensor (B,)`, the loss of each example.
      batch: tensors whose first axis is the example, or tuples, lists and mappings of them.
      max_grad_norm: C > 0.
      record_ids: int64 `(B,)`: the identity of each example.
      step: the logical step; another step draws anew.
      seed: of the draws; secret wherever record ids can move.
      microbatch_size: examples a backward pass; None chooses, by the shapes and, up to 256, by the number of examples.
      clock: if given, gets each layer's seconds: its three products, quantization included, and its norm and sum.
    Returns: ClippedSum with sensitivity C; zeros for an empty batch.
    Raises:
      SettingError: an argument out of range, or a loss that is not one number per example.
      DataError: a tensor of the batch has not one row for each record id.
      ModelError: a parameter's per-example gradients cannot be computed.
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
    pieces: Iterable[Microbatch] = ()
    if len(record_ids) > 0:
        check_rows(batch, len(record_ids))
        size = microbatch_size or default_microbatch_size(model, loss_fn, batch, len(record_ids))
        pieces = microbatches(batch, record_ids, size)
    key = step_key(seed, step)
    with working_memory():
        return clipped_sum_of(model, loss_fn, pieces, max_grad_norm=max_grad_norm, key=key, clock=clock)


def step_key(seed: int, step: int) -> int:
    """The key of all draws of a logical step: as secret as the seed is."""
    return derive_key(seed, "step", step)


def clipped_sum_of(
    model: nn.Module,
    loss_fn: PerExampleLoss,
    pieces: Iterable[Microbatch],
    *,
    max_grad_norm: float,
    key: int,
    drawing: Drawing | None = None,
    leaves_out: bool = False,
    complete: bool = True,
    clock: Clock | None = None,
) -> ClippedSum:
    """`clipped_sum` of microbatches that exist already, or are read when their turn comes.

    Args:
      model: as of `clipped_sum`.
      loss_fn: as of `clipped_sum`.
      max_grad_norm: as of `clipped_sum`.
      clock: as of `clipped_sum`.
      pieces: microbatches of one size.
      key: of the step's draws, from `step_key`.
      drawing: what is known of the model; None: nothing.
      leaves_out: a record on which model or loss raise contributes nothing, silently, since an error would tell about
        it. Otherwise what they raise is passed on.
      complete: a parameter that no microbatch reached is an error. Otherwise its sum is zero, as in a step in which its
        layer is dropped at random.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with (
        _taping(model, trainable, clock=clock) as tape,
        running(model, Pass(key=key, tape=tape, clock=clock)) as run,
    ):
        passes = _Passes(model, loss_fn, run, tape, drawing or Drawing())
        found = False
        for piece in pieces:
            found = True
            kept = passes.over_sound_rows(piece) if leaves_out else passes.over_all_rows(piece)
            if kept is not None:
                tape.add_clipped(max_grad_norm, len(kept.record_ids), kept.num_examples)
        return ClippedSum(grads=tape.totals(trainable, complete and found), sensitivity=float(max_grad_norm))


class _Passes:
    """Forward and backward passes that leave a microbatch's per-example gradients on a tape."""

    def __init__(self, model: nn.Module, loss_fn: PerExampleLoss, run: Pass, tape: "_GradientTape", drawing: Drawing):
        self._model, self._loss_fn, self._run, self._tape, self._drawing = model, loss_fn, run, tape, drawing
        self._key = draws_key(run.key)

    def over(self, piece: Microbatch) -> Tensor:
        """Differentiate the sum of the losses that count; returns all of them."""
        with seeded(self._key):
            losses = drawn_by_record(lambda: self._forward(piece), self._key, piece.record_ids, self._drawing)
            self._backward(losses[: piece.num_examples].sum())
        return losses

    def over_all_rows(self, piece: Microbatch) -> Microbatch:
        """The same, for `over_sound_rows`' result."""
        self.over(piece)
        return piece

    def over_sound_rows(self, piece: Microbatch) -> Microbatch | None:
        """The same without the rows on which it raises; None if it raises on all.

        Whether a row is left out is decided by the row alone, in a microbatch of its copies.
        """
        if self._runs_on(piece):
            return piece
        sound = [row for row in range(piece.num_examples) if self._runs_on(copies(piece, row))]
        if not sound:
            return None
        rows = torch.tensor(sound + sound[-1:] * (len(piece.record_ids) - len(sound)))
        rest = Microbatch(take_rows(piece.data, rows), piece.record_ids[rows], len(sound))
        if self._runs_on(rest):
            return rest
        raise ModelError(
            "Expected model and loss_fn to run on records together that they run on alone; they do not. Examples that "
            "interact bound no one's influence. Remove operations across the first axis."
        )

    def _forward(self, piece: Microbatch) -> Tensor:
        self._run.begin(piece.record_ids)
        self._tape.rewind()
        self._run.phase = "forward"
        return per_example_losses(self._loss_fn, self._model, piece.data, len(piece.record_ids))

    def _backward(self, total: Tensor) -> None:
        position = Position()
        self._run.phase = "backward"
        (total + 0 * self._tape.anchor).backward()
        if position.torch_moved():
            raise ModelError(
                "Expected the backward pass to draw no random numbers; it does. They would follow a record's place in "
                "the batch, not the record. Draw in the forward pass."
            )

    def _runs_on(self, piece: Microbatch) -> bool:
        try:
            self.over(piece)
        except Exception as error:
            if not caused_by_records(error):
                raise
            return False
        return True


def copies(piece: Microbatch, row: int) -> Microbatch:
    """A microbatch of the same size with one row of a microbatch in every place."""
    rows = torch.full((len(piece.record_ids),), row)
    return Microbatch(take_rows(piece.data, rows), piece.record_ids[rows], 1)


def caused_by_records(error: Exception) -> bool:
    """Whether model and loss raised because of what they were given, not for want of memory or by our refusal."""
    out_of_memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
    return not isinstance(error, DPQuantError) and not out_of_memory


@dataclasses.dataclass(frozen=True, eq=False)
class RowGradients:
    """What the rows of a microbatch give.

    Attributes:
      losses: `(B,)`.
      parts: {parameter name: gradients of the rows' losses, not clipped}, without parameters that got none.
      operands: of quantized layers: the rows' codes and scales, in the order of the calls.
    """

    losses: Tensor
    parts: dict[str, Contribution]
    operands: list[QTensor]

    def row(self, row: int) -> "RowGradients":
        """The same of one row."""
        rows = torch.tensor([row])
        parts = {name: part.take(rows) for name, part in self.parts.items()}
        return RowGradients(self.losses[[row]], parts, [operand.take(rows) for operand in self.operands])

    def norm(self) -> float:
        """The L2 norm of all gradients as one vector, rounded up."""
        return float(sum(float(part.squared_norms().sum()) for part in self.parts.values())) ** 0.5

    def distance(self, other: "RowGradients") -> float:
        """The L2 norm of the difference of all gradients; a parameter that got none has zero."""
        squares = 0.0
        for name in self.parts.keys() | other.parts.keys():
            pair = [rows.parts[name] for rows in (self, other) if name in rows.parts]
            squares += float((pair[0].squared_distances(pair[1]) if pair[1:] else pair[0].squared_norms()).sum())
        return squares**0.5


def gradients_of_rows(
    model: nn.Module, loss_fn: PerExampleLoss, piece: Microbatch, *, key: int, drawing: Drawing | None = None
) -> RowGradients:
    """Differentiate all losses of a microbatch at once, as a step does, and keep what it leaves.

    Args:
      model: as of `clipped_sum`.
      loss_fn: as of `clipped_sum`.
      piece: the microbatch, all of whose rows count.
      key: of the step's draws, 64 bits.
      drawing: what is known of the model; None: nothing.
    Raises:
      SettingError, ModelError: as of `clipped_sum`.
    Privacy: per example; reads private data if the piece holds any, and nothing bounds it.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    taping = _taping(model, trainable, forming=False, keeping=True)
    with taping as tape, running(model, Pass(key=key, tape=tape)) as run:
        losses = _Passes(model, loss_fn, run, tape, drawing or Drawing()).over(piece)
        return RowGradients(losses.detach(), tape.contributions(), tape.operands)


def losses_of(
    model: nn.Module, loss_fn: PerExampleLoss, piece: Microbatch, *, key: int, drawing: Drawing | None = None
) -> Tensor:
    """The losses of a microbatch `(B,)`, with the draws of `gradients_of_rows`, whose arguments these are."""
    draws = draws_key(key)

    def forward() -> Tensor:
        with running(model, Pass(key=key, record_ids=piece.record_ids)):
            return per_example_losses(loss_fn, model, piece.data, len(piece.record_ids))

    with torch.no_grad(), seeded(draws):
        return drawn_by_record(forward, draws, piece.record_ids, drawing or Drawing())


def draws_key(key: int) -> int:
    """Of what the model draws by itself in a step."""
    return derive_key(key, "draws")


def contributions_by_parameter(
    model: nn.Module, loss_fn: PerExampleLoss, piece: Microbatch, *, key: int, drawing: Drawing | None = None
) -> dict[str, Contribution]:
    """Each example's own gradient in the precision that the model runs in, not clipped, as what it is made of.

    Args:
      model: as of `clipped_sum`.
      loss_fn: as of `clipped_sum`.
      piece: one microbatch, all of whose rows count.
      key: of the draws, 64 bits.
      drawing: what is known of the model; None: nothing.
    Returns: {parameter name: its gradients}, without parameters that no module used.
    Raises:
      SettingError, ModelError: as of `clipped_sum`.
    Privacy: per example; reads private data, and nothing bounds it.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with _taping(model, trainable, forming=False) as tape, running(model, Pass(key=key, tape=tape)) as run:
        _Passes(model, loss_fn, run, tape, drawing or Drawing()).over(piece)
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
            with torch.no_grad(), seeded(0):
                loss_fn(model, take_rows(batch, slice(0, 1)))
        finally:
            for handle in handles:
                handle.remove()
        weights = sum(p.numel() for p in model.parameters())
        enough = [size for size in _MICROBATCHES if size * sum(outputs) >= 2 * weights]
        _microbatch_sizes[model] = min(enough, default=_MICROBATCHES[-1])
    filled = [size for size in _MICROBATCHES if size >= num_examples]
    return min([_microbatch_sizes[model], *filled])


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
    keeping: codes and scales are kept, to be compared with those in another microbatch.
    clock: measures what norms and sums take, under the name of the module that owns the parameter; None: nothing does.
    """

    def __init__(
        self,
        names: dict[Tensor, str],
        device: torch.device,
        *,
        forming: bool,
        keeping: bool,
        clock: Clock | None,
    ):
        self.anchor = torch.zeros((), device=device, requires_grad=True)
        self._names = names  # of the trainable parameters
        self._forming, self._keeping, self._clock = forming, keeping, clock
        self._contributions: dict[str, list[Contribution]] = {}
        self._totals: dict[tuple[Any, ...], tuple[Contribution, Any]] = {}
        self.operands: list[QTensor] = []
        self.listening = True

    def rewind(self) -> None:
        """Forget the last microbatch."""
        self._contributions = {name: [] for name in self._names.values()}
        self.operands = []

    def owns(self, module: nn.Module) -> bool:
        """Whether some trainable parameter is the module's own."""
        return any(p in self._names for p in module.parameters(recurse=False))

    def record(self, layer: QuantizableLayer, x: Tensor | QTensor, g: Tensor | QTensor, grad: Tensor) -> None:
        if self._keeping:
            self.operands += [operand for operand in (x, g) if isinstance(operand, QTensor)]
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
        if not parts:
            return
        squared_norms_B = self._squared_norms(parts, size)
        factors_B, finite_B = clip_factors(squared_norms_B, max_grad_norm)
        factors_B[num_examples:] = 0
        if not finite_B.all():
            rows = finite_B.nonzero().flatten()
            parts = {name: part.take(rows) for name, part in parts.items()}
            factors_B = factors_B[rows]
        for name, part in parts.items():
            with self._timing(name):
                form = (name, type(part), getattr(part, "geometry", None))  # what shares one running total
                _, total = self._totals.get(form, (part, None))
                self._totals[form] = part, part.add_weighted(factors_B, total)

    def contributions(self) -> dict[str, Contribution]:
        """{parameter name: the microbatch's gradients}, without parameters that got none."""
        return {name: _one_contribution(found) for name, found in self._contributions.items() if found}

    def totals(self, trainable: Mapping[str, nn.Parameter], complete: bool) -> dict[str, Tensor]:
        """{parameter name: the sum over all microbatches}; where there is none, zero or, if complete, an error."""
        totals: dict[str, Tensor] = {}
        for (name, *_), (part, total) in self._totals.items():
            finished = part.finished(total)
            totals[name] = finished if name not in totals else totals[name] + finished
        if complete and totals.keys() < trainable.keys():
            raise no_gradient(next(name for name in trainable if name not in totals))
        return {name: totals[name] if name in totals else torch.zeros_like(p) for name, p in trainable.items()}

    def _squared_norms(self, parts: Mapping[str, Contribution], size: int) -> Tensor:
        """Each example's squared norm over all parameters, float64 `(B,)`."""
        squared_norms: dict[str, Tensor] = {}
        for name, part in parts.items():
            with self._timing(name):
                squared_norms[name] = part.squared_norms()
        check_examples_first(squared_norms, size)
        return torch.stack(list(squared_norms.values())).sum(0)

    def _timing(self, parameter: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self._clock is None else self._clock.timing(parameter.rpartition(".")[0])


def check_examples_first(squared_norms: Mapping[str, Tensor], size: int) -> None:
    """Refuse per-example gradients of some parameter that are not of `size` examples.

    Raises:
      ModelError: a module's input had another first axis than the examples.
    """
    for name, norms in squared_norms.items():
        if len(norms) != size:
            raise ModelError(
                "Expected the first axis of every module's input to be the example; got one of another length for "
                f"{name}. Its gradients would be clipped by rows that are no examples: positions, nodes, or "
                "several views of a record. Put the examples first, and views of one record on a second axis."
            )


def _one_contribution(found: list[Contribution]) -> Contribution:
    """A parameter used once keeps its operands, as do lookups; else one that is shared or reused is formed."""
    if len(found) == 1:
        return found[0]
    lookups = [one for one in found if isinstance(one, Lookup)]
    if len(lookups) == len(found):
        return Lookup.merged(lookups)
    return Formed(torch.stack([one.per_example() for one in found]).sum(0))


def no_gradient(name: str) -> ModelError:
    """The error for a parameter that no module call reached."""
    return ModelError(
        f"Expected every trainable parameter to get a per-example gradient; {name} got none. Its module was "
        "not called, or its output does not reach the loss, or the parameter is used outside its module. "
        "Freeze it with requires_grad_(False), or use it through the module that owns it."
    )


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
    model: nn.Module,
    trainable: dict[str, nn.Parameter],
    *,
    forming: bool = True,
    keeping: bool = False,
    clock: Clock | None = None,
) -> Iterator[_GradientTape]:
    """Detach all parameters and listen to the modules that own any, until the block ends."""
    device = next((p.device for p in trainable.values()), torch.device("cpu"))
    names: dict[Tensor, str] = {p: name for name, p in trainable.items()}
    tape = _GradientTape(names, device, forming=forming, keeping=keeping, clock=clock)
    # ours comes first, so that it sees what the module gave before other hooks change it
    handles = [
        module.register_forward_hook(_listener(tape), prepend=True, with_kwargs=True)
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


def _listener(tape: _GradientTape) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], Any]:
    """A forward hook that, once the output's gradient is known, records the module's per-example gradients."""

    def listen(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        x = args[0] if args else kwargs.get("input")
        records_itself = isinstance(module, TapedGroupNorm) and isinstance(x, Tensor) and module.records(x)
        if not tape.listening or records_itself:
            return output
        if not isinstance(output, Tensor) or output.ndim == 0:
            raise ModelError(
                f"Expected a module with parameters of its own to return one tensor, the examples first; a "
                f"{type(module).__name__} returns a {type(output).__name__}. Its per-example gradients are unknown. "
                "Freeze it, or put its parameters into modules of their own."
            )
        if not has_formula(module) and any(isinstance(inner, QuantizableLayer) for inner in module.modules()):
            raise ModelError(
                f"Expected parameters to be used by a module that holds nothing else; a {type(module).__name__} has "
                "parameters of its own beside other layers. Their per-example gradients are unknown. Put them into a "
                "small module of their own, which is called with the batch, or freeze them."
            )
        plain = (
            output.detach() if has_formula(module) else output.detach().clone()
        )  # to be compared: may be overwritten
        if not output.requires_grad:
            output = output + tape.anchor

        def record(grad: Tensor) -> None:
            tape.listening = False  # the module may be evaluated again
            own = dict(module.named_parameters(recurse=False))
            for name, contribution in contributions_of(module, args, kwargs, plain, grad).items():
                if name in own:  # a norm may have no bias
                    tape.add(own[name], contribution)
            tape.listening = True

        output.register_hook(record)
        return output

    return listen
