# SPDX-License-Identifier: Apache-2.0
"""Does this model, with this loss and this collate function, keep its examples apart? Tried before a record is used.

`check_trainable` refuses by type. Such a list can be evaded (a batch statistic in a forward method, a parameter used
behind its module's back), so `check_isolation` runs the model on synthetic records a, b, c (`synthetic.py`): what it
makes of a, that is a's loss, a's gradient and, quantized, a's codes, may not change when b takes c's place, nor when a
takes another place, and the gradient must be what autograd computes.

A check that cannot see is worse than none. No comparison passes on NaN. Parameters are shaken a little, so that what
begins at zero (a gate, an adapter) lets gradients through, and every trainable parameter has to be moved. And couplings
are planted into this very model and batch, in every leaf of the batch that it uses, in activations and in the loss:
each has to be seen, else the check says that it could not see.

A gradient jumps where round-off carries a ReLU's input across zero, or another pixel to the top of a maximum: with maps
of 64x64 in half of the ResNets that were tried. So comparisons are made in float64, where that does not happen, unless
the model cannot run in it.
"""

import contextlib
import dataclasses
import itertools
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from dpquant.batches import Microbatch, leaves, with_leaves
from dpquant.clip import (
    PerExampleLoss,
    RowGradient,
    contributions_by_parameter,
    draws_key,
    gradient_of_row,
    losses_of,
    no_gradient,
)
from dpquant.errors import DataError, DPQuantError, ModelError
from dpquant.formats import Precision
from dpquant.layers import QuantizableLayer, current_precisions, quantizable_layers, set_policy, set_precisions
from dpquant.randomness import Drawing, drawn_by_record, seeded
from dpquant.synthetic import Specimens

_KEY = 0  # of the synthetic records' draws: nothing private follows from them
_MOST_KINDS = 2  # kinds of synthetic values that are tried on a model that runs on them
_MOST_SHAKES = 5
_TOLERANCE, _FLOAT64_TOLERANCE = 1e-3, 1e-6  # of a loss or a gradient; rounding is a hundred times smaller
_SMALLEST_LOSS = 1e-3  # losses below it are compared as if they were as large
_OTHERS = 1, 2  # the numbers of b and c; a is 0
_COUPLED = (
    "Expected each example's gradient to depend on that example alone; got one that depends on the rest of the batch. "
    "Clipping would bound no one's influence. Remove batch statistics and other operations across the first axis."
)
_COLLATES = (
    "Expected collate_fn to make each row of one record alone, in the records' order; got rows that change with the "
    "other records. Clipping rows would bound no one's influence. Collate without mixing or sorting records."
)
PADDED = (
    "Expected a record's row to have a shape that the record alone decides; got one that is padded to the longest "
    "record of the batch. Quantized, what one record contributes would depend on how long another is. Pad to a length "
    "that the record alone decides (a fixed one, such as padding='max_length'), or run in full precision."
)
_BY_PLACE = (
    "Expected the random numbers that the model draws to belong to an example each or to all of them; got some that "
    "follow an example's place in the batch. A record that is removed moves the places of all others. Let the axis of "
    "examples come first where random numbers are drawn, or choose another microbatch_size if another axis has as many."
)
_KEEPS_STATE = (
    "Expected what the model computes to depend on its parameters and its input; got a model that remembers what it "
    "was given before. What it remembers of records is never noised. Keep nothing from one call to the next."
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
        case torch._dynamo.OptimizedModule():
            return "torch.compile hides the layers", "Pass the module that was compiled, model._orig_mod"
        case nn.DataParallel() | nn.parallel.DistributedDataParallel():
            return "It splits batches by itself", "Pass the module inside, model.module"
        case nn.modules.batchnorm._BatchNorm() if not module.training:
            return (
                "In evaluation it keeps examples apart, but training mode would mix them, and can be turned on any time",
                'Make its statistics part of the network: dpquant.fix(model, batch_norm="freeze")',
            )
        case nn.modules.batchnorm._BatchNorm():
            return (
                "It mixes the examples of a batch, so clipping bounds no single example's influence",
                "Replace it by GroupNorm: dpquant.fix(model), or --fix on the command line",
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


def _computed_weight(module: nn.Module) -> bool:
    """Whether torch computes a parameter of the module anew at each call."""
    hooks = (type(hook).__name__ for hook in module._forward_pre_hooks.values())
    return parametrize.is_parametrized(module) or any(name in ("SpectralNorm", "WeightNorm") for name in hooks)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Findings:
    """What the check found out about a model that passed it.

    Attributes:
      macs: {quantizable layer: multiply-accumulates of its forward product, for one example}.
      specimens: the synthetic records that it ran on.
      drawing: whether the model draws random numbers.
    """

    macs: dict[str, float]
    specimens: Specimens
    drawing: Drawing


def check_isolation(
    model: nn.Module,
    loss_fn: PerExampleLoss,
    candidates: Iterable[Specimens],
    *,
    quantized: Iterable[Precision] = (),
) -> Findings:
    """Run the model on synthetic records, refuse it if its examples are coupled, and count its multiply-accumulates.

    Args:
      model: a prepared model. Its parameters, modes and precisions and the global random streams are left as they were;
        buffers that it fills at its first call are filled.
      loss_fn: `(model, batch) -> Tensor (B,)`.
      candidates: synthetic records of several kinds; those that the model can run on are used.
      quantized: the precisions in which all layers are tried besides full precision.
    Raises:
      ModelError: the model runs on none of the candidates; a parameter has no per-example gradient, or one that is not
        what autograd computes; one example's gradient or codes depend on another; a buffer or other state follows the
        data; or the check was blind: a coupling that it planted itself had no effect.
      DataError: the collate function does not give one row for each record, or mixes records.
    Privacy: reads no data.
    """
    modes = {module: module.training for module in model.modules()}
    precisions = current_precisions(model)
    try:
        set_policy(model, ())
        usable = _usable(model, loss_fn, candidates)
        blind: ModelError | None = None
        found: Findings | None = None
        for specimens in itertools.islice(usable, _MOST_KINDS):
            drawing = Drawing()
            macs = _count_macs(model, loss_fn, specimens)
            try:
                _check(model, loss_fn, specimens, drawing, planted=found is None)
            except _Blind as problem:
                blind = problem
            else:
                found = found or Findings(macs=macs, specimens=specimens, drawing=drawing)
        if found is None:
            assert blind is not None
            raise ModelError(str(blind))
        for one in quantized:
            _check_codes(model, loss_fn, found, one)
        return found
    finally:
        set_precisions(model, precisions)
        for module, training in modes.items():
            module.training = training


class _Blind(ModelError):
    """A coupling that was planted was not seen."""


def _usable(model: nn.Module, loss_fn: PerExampleLoss, candidates: Iterable[Specimens]) -> Iterator[Specimens]:
    """The candidates on which the model runs with finite losses and gradients; at least one, or an error."""
    first, any_usable = None, False
    for specimens in candidates:
        try:
            _run(model, loss_fn, specimens)
        except DataError:  # the collate function's, or of the wrong number of rows
            raise
        except Exception as error:  # whatever the user's code raises on values that are not of its domain
            first = first or _explained(error)
            continue
        any_usable = True
        yield specimens
    if not any_usable:
        assert first is not None
        raise first


def _run(model: nn.Module, loss_fn: PerExampleLoss, specimens: Specimens) -> None:
    """One pass over the three records. Raises whatever the user's code raises, and _NotFinite."""
    piece = Microbatch(specimens.batch((0, 1, 2)), torch.arange(3), 3)
    parts = contributions_by_parameter(model, loss_fn, piece, key=_KEY)
    losses = losses_of(model, loss_fn, piece, key=_KEY)
    if not all(bool(values.isfinite().all()) for values in (losses, *(part.squared_norms() for part in parts.values()))):
        raise _NotFinite


class _NotFinite(Exception):
    """A loss or a gradient is infinite or not a number."""


_WAYS_OUT = (
    "The records were made up. Make the model's input and output fit the records; or, where their values have a domain "
    "of their own, give example= a few public or synthetic records."
)


def _explained(error: Exception) -> DPQuantError:
    """The error that says what is wrong with the model, from what its code raised on synthetic records."""
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
    if isinstance(error, _NotFinite):
        return ModelError(
            "Expected losses and gradients that are finite on made-up records; got others for every kind of values that "
            f"was tried. NaN would hide whether examples are kept apart. {_WAYS_OUT}"
        )
    refusal = ModelError(
        f"Expected model and loss_fn to run on a batch shaped like the data set's; got a {type(error).__name__}: "
        f"{error}. {_WAYS_OUT}"
    )
    refusal.__cause__ = error
    return refusal


def _check(model: nn.Module, loss_fn: PerExampleLoss, specimens: Specimens, drawing: Drawing, *, planted: bool) -> None:
    """Make all comparisons, in float64 if the model runs in it."""
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    moved, reached = set(), set()
    dtype = torch.float64
    for shake in range(_MOST_SHAKES):
        try:
            rows = _compare(model, loss_fn, specimens, drawing, dtype, shake, planted)
        except DPQuantError:
            raise
        except Exception:  # a type that the model fixes by itself
            dtype = torch.float32
            try:
                rows = _compare(model, loss_fn, specimens, drawing, dtype, shake, planted)
            except DPQuantError:
                raise
            except Exception as error:
                raise _explained(error) from error
        moved |= {name for row in rows for name, grad in row.grads.items() if bool(grad.any())}
        reached |= {name for row in rows for name in row.reached}
        if moved >= trainable or not planted:
            return
    if missing := sorted(trainable - reached):
        raise no_gradient(missing[0])
    raise _Blind(
        f"Expected made-up records that give every trainable parameter a gradient; {min(trainable - moved)} got zero. "
        "So the check could not see whether examples are kept apart. Freeze the parameter if it has no effect, or give "
        "example= a few public or synthetic records."
    )


def _compare(
    model: nn.Module,
    loss_fn: PerExampleLoss,
    specimens: Specimens,
    drawing: Drawing,
    dtype: torch.dtype,
    shake: int,
    planted: bool,
) -> list[RowGradient]:
    """The comparisons of one kind of records and one shake; the first ones that pass are planted against."""
    with _shaken(model, dtype, shake):
        probe = _Probe(model, loss_fn, specimens, drawing, dtype)
        if not planted:
            return probe.compare_company()
        rows = probe.compare_company() + probe.compare_places()
        if shake == 0:
            probe.plant()
        return rows


def _piece(specimens: Specimens, order: Sequence[int], dtype: torch.dtype) -> Microbatch:
    """The specimens of these numbers as a microbatch; a specimen's number is its record id."""
    batch = specimens.batch(order)
    if dtype == torch.float64:
        batch = with_leaves(batch, lambda leaf: leaf.double() if leaf.dtype == torch.float32 else leaf)
    return Microbatch(batch, torch.tensor(order), len(order))


@contextlib.contextmanager
def _shaken(model: nn.Module, dtype: torch.dtype, seed: int) -> Iterator[None]:
    """Parameters a little off, parameters and buffers in a type, until the block ends; then as before, in their memory.

    Each entry moves by up to a tenth of itself, and zeros leave zero: a zero may be a gate that lets no gradient by.
    """
    generator = torch.Generator().manual_seed(seed)
    parameters = set(model.parameters())
    kept = [(t, t.data) for t in (*model.parameters(), *model.buffers()) if t.dtype == torch.float32]
    for tensor, data in kept:
        if tensor in parameters:
            noise = (0.2 * torch.rand(data.shape, generator=generator) - 0.1).to(data.device)
            data = data + torch.where(data == 0, noise, noise * data)
        tensor.data = data.to(dtype)
    try:
        yield
    finally:
        for tensor, data in kept:
            tensor.data = data


class _Probe:
    """What the model makes of a specimen in some company."""

    def __init__(
        self, model: nn.Module, loss_fn: PerExampleLoss, specimens: Specimens, drawing: Drawing, dtype: torch.dtype
    ):
        self._model, self._loss_fn, self._specimens, self._drawing = model, loss_fn, specimens, drawing
        self._dtype, self._tolerance = dtype, _FLOAT64_TOLERANCE if dtype == torch.float64 else _TOLERANCE

    def compare_company(self) -> list[RowGradient]:
        """Raise ModelError if a's results change when c takes b's place; else return them."""
        first, other = self._row((0, 1, 1), 0), self._row((0, 2, 2), 0)
        if not self._agree(first, 0, other, 0):
            raise self._coupled(first)
        return [first, other]

    def compare_places(self) -> list[RowGradient]:
        """Raise ModelError if a's results change with its place, its number of neighbours, the mode or the past."""
        self._check_collation()
        first, last = self._row((0, 1, 1), 0), self._row((2, 2, 0), 2)
        if not self._agree(first, 0, last, 2):
            raise self._coupled(first)
        self._compare_with_autograd(first)
        if not self._close(first.losses[0], self._losses((1, 0, 1))[1]):
            raise self._coupled(first)
        if not self._drawing.seen:
            self._compare_with_one_alone(first)
        self._compare_losses()
        if not self._close(first.losses[0], self._losses((0, 1, 1))[0]):
            raise ModelError(_KEEPS_STATE)
        return [first, last, self._row((2, 1, 0), 1)]

    def plant(self) -> None:
        """Raise _Blind unless couplings that are planted here are seen."""
        piece = self._piece((0, 1, 1))
        for number, path in enumerate(path for path, _ in leaves(piece.data)):
            if self._uses(piece, number) and not self._sees(leaf=number):
                raise _blind(f"batch{path}")
        modules = self._modules()
        for module in dict.fromkeys([modules[0], modules[len(modules) // 2], modules[-1]]):
            if not self._sees(module=module):
                name = next(name for name, one in self._model.named_modules() if one is module)
                raise _blind(f"the output of {name or 'the model'}")
        if not self._sees(loss=True):
            raise _blind("the loss")

    def _check_collation(self) -> None:
        """A record's row of the batch may not change with the other records, unless it is padded."""
        if self._specimens.padded:
            return
        for order, row in (((0, 1, 1), 0), ((0, 2, 2), 0), ((1, 0, 1), 1), ((2, 2, 0), 2)):
            mine = [leaf[0] for _, leaf in leaves(self._piece((0, 0, 0)).data)]
            here = [leaf[row] for _, leaf in leaves(self._piece(order).data)]
            if not all(map(_identical, mine, here)):
                raise DataError(_COLLATES)

    def _piece(self, order: Sequence[int]) -> Microbatch:
        return _piece(self._specimens, order, self._dtype)

    def _row(self, order: Sequence[int], row: int, leaf: int | None = None) -> RowGradient:
        piece = self._piece(order)
        if leaf is not None:
            piece = dataclasses.replace(piece, data=_rolled(piece.data, leaf))
        return gradient_of_row(self._model, self._loss_fn, piece, row, key=_KEY, drawing=self._drawing)

    def _losses(self, order: Sequence[int], leaf: int | None = None) -> Tensor:
        piece = self._piece(order)
        if leaf is not None:
            piece = dataclasses.replace(piece, data=_rolled(piece.data, leaf))
        return losses_of(self._model, self._loss_fn, piece, key=_KEY, drawing=self._drawing)

    def _agree(self, one: RowGradient, row: int, other: RowGradient, other_row: int) -> bool:
        """Whether both are the same example's, and neither gives another example any gradient."""
        bound = self._tolerance * _norm(one.grads.values())
        return one.others <= bound and other.others <= bound and self._alike(one, row, other, other_row)

    def _alike(self, one: RowGradient, row: int, other: RowGradient, other_row: int) -> bool:
        gap = _norm(one.grads[name] - other.grads[name] for name in one.grads)
        bound = self._tolerance * _norm(one.grads.values())
        return gap <= bound and self._close(one.losses[row], other.losses[other_row])

    def _close(self, one: Tensor, other: Tensor) -> bool:
        scale = max(abs(float(one)), _SMALLEST_LOSS)
        return abs(float(one) - float(other)) <= self._tolerance * scale

    def _coupled(self, first: RowGradient) -> ModelError:
        """The error for two results that differ; says what they differ by."""
        if not self._alike(first, 0, self._row((0, 1, 1), 0), 0):
            return ModelError(_KEEPS_STATE)
        if self._drawing.seen and self._agree(self._row((0, 0, 0), 0), 0, first, 0):
            return ModelError(_BY_PLACE)
        return ModelError(_COUPLED)

    def _compare_with_autograd(self, first: RowGradient) -> None:
        """Catches a parameter whose use is not seen, and so not clipped for: tied by hand, or used outside its module."""
        trainable = {name: p for name, p in self._model.named_parameters() if p.requires_grad}
        piece = self._piece((0, 1, 1))
        with seeded(derived := draws_key(_KEY)):
            losses = drawn_by_record(
                lambda: self._loss_fn(self._model, piece.data), derived, piece.record_ids, self._drawing
            )
            found = torch.autograd.grad(losses[0], list(trainable.values()), allow_unused=True)
        theirs = [torch.zeros_like(p) if g is None else g for p, g in zip(trainable.values(), found, strict=True)]
        # a gradient that is zero but for round-off, as of a bias before a normalization, is held to the others' size
        smallest = 1e-3 * self._tolerance * max(1.0, *(float(reference.norm()) for reference in theirs))
        for (name, mine), reference in zip(first.grads.items(), theirs, strict=True):
            if not float((mine - reference).norm()) <= max(self._tolerance * float(reference.norm()), smallest):
                raise (
                    no_gradient(name)
                    if name not in first.reached
                    else ModelError(
                        f"Expected {name} to be used only by the module that owns it; got a gradient that its per-example "
                        "gradients do not add up to. Clipping would miss a part of it. Call the module instead of using "
                        "its parameter, or make the examples the first axis of every input."
                    )
                )

    def _compare_with_one_alone(self, first: RowGradient) -> None:
        """Catches what depends on how many examples there are."""
        try:
            alone = self._losses((0,))
        except Exception:  # a model that squeezes its first axis: no microbatch of a run has one row unless asked for
            return
        if not self._close(first.losses[0], alone[0]):
            raise ModelError(_COUPLED)

    def _compare_losses(self) -> None:
        """Catches losses that see other examples in the mode that the gradients were not taken in."""
        modes = {module: module.training for module in self._model.modules()}
        try:
            self._model.train(not self._model.training)
            first = self._losses((0, 1, 1))
            for order, row in (((0, 2, 2), 0), ((1, 2, 0), 2)):
                if not self._close(first[0], self._losses(order)[row]):
                    raise ModelError(_COUPLED)
        finally:
            for module, training in modes.items():
                module.training = training

    def _sees(self, *, leaf: int | None = None, module: nn.Module | None = None, loss: bool = False) -> bool:
        """Whether a coupling in one place makes a's results depend on b and c."""
        with contextlib.ExitStack() as planted:
            if module is not None:
                planted.callback(module.register_forward_hook(_add_mean).remove)
            honest = self._loss_fn
            if loss:
                planted.callback(setattr, self, "_loss_fn", honest)
                self._loss_fn = lambda model, batch: _add_mean(None, None, honest(model, batch))
            one, other = (self._losses((0, number, number), leaf) for number in _OTHERS)
            if not self._close(one[0], other[0]):
                return True
            one, other = (self._row((0, number, number), 0, leaf) for number in _OTHERS)
            return not self._agree(one, 0, other, 0)

    def _uses(self, piece: Microbatch, number: int) -> bool:
        """Whether a leaf of the batch enters any computation."""
        watched = _Watched([leaf for _, leaf in leaves(piece.data)][number])
        with seeded(_KEY), torch.no_grad(), watched:
            self._loss_fn(self._model, piece.data)
        return watched.used

    def _modules(self) -> list[nn.Module]:
        """The modules with trainable parameters of their own that return a tensor of examples, as they are called."""
        called: dict[nn.Module, None] = {}

        def note(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.is_floating_point() and output.ndim and len(output) == 3:
                called[module] = None

        own = [m for m in self._model.modules() if any(p.requires_grad for p in m.parameters(recurse=False))]
        handles = [module.register_forward_hook(note) for module in own]
        try:
            self._losses((0, 1, 1))
        finally:
            for handle in handles:
                handle.remove()
        return list(called) or own


def _add_mean(module: Any, inputs: Any, output: Any) -> Any:
    """A coupling: each row gets a part of the batch's mean. A forward hook, or a loss' last step."""
    if isinstance(output, Tensor) and output.is_floating_point() and output.ndim:
        return output + output.detach().mean(0, keepdim=True)
    return output


def _rolled(batch: Any, number: int) -> Any:
    """A coupling: one leaf's rows move up by one, so that each example gets another's."""
    numbers = itertools.count()
    return with_leaves(batch, lambda leaf: leaf.roll(1, 0) if next(numbers) == number else leaf)


def _blind(place: str) -> _Blind:
    return _Blind(
        f"Expected made-up records that would show a coupling of examples in {place}; one that was planted there had no "
        "effect. So the check could not see whether examples are kept apart. Give example= a few public or synthetic "
        "records that differ in every value, or leave out of the batch what has no effect."
    )


_CARRIES = {
    getattr(torch.ops.aten, name)
    for name in (
        *("_to_copy", "alias", "clone", "detach", "expand", "permute", "select", "slice", "squeeze", "t"),
        *("transpose", "unsqueeze", "view", "_unsafe_view", "split", "unbind"),
    )
}  # operators that pass values on


class _Watched(TorchDispatchMode):
    """Notices whether a tensor, or what other shapes and types of it there are, enters a computation."""

    def __init__(self, tensor: Tensor):
        super().__init__()
        self._memory = {tensor.untyped_storage().data_ptr()}
        self._kept = [tensor]  # memory that was freed could come again
        self.used = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = pytree.tree_leaves((args, kwargs))
        if any(isinstance(t, Tensor) and t.untyped_storage().data_ptr() in self._memory for t in given):
            if func.overloadpacket in _CARRIES:
                made = [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]
                self._memory |= {t.untyped_storage().data_ptr() for t in made}
                self._kept += made
            else:
                self.used = True
        return result


def _norm(tensors: Iterable[Tensor]) -> float:
    return float(sum(t.double().square().sum() for t in tensors)) ** 0.5


def _identical(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)


def _check_codes(model: nn.Module, loss_fn: PerExampleLoss, found: Findings, quantized: Precision) -> None:
    """A row's codes and scales, bit for bit, in other company: a scale over the batch shows here, and so does padding."""
    if not quantizable_layers(model):
        return
    if found.specimens.padded:
        raise ModelError(PADDED)

    def operands(other: int) -> list[Tensor]:
        piece = _piece(found.specimens, (0, other, other), torch.float32)
        return gradient_of_row(model, loss_fn, piece, 0, key=_KEY, drawing=found.drawing).operands

    with _shaken(model, torch.float32, 0):
        set_precisions(model, dict.fromkeys(quantizable_layers(model), quantized))
        first = next(module for module in model.modules() if isinstance(module, QuantizableLayer))
        one, other = map(operands, _OTHERS)
        if [t.shape for t in one] != [t.shape for t in other]:
            raise ModelError(PADDED)
        if not all(map(_identical, one, other)):
            raise ModelError(_COUPLED)
        handle = first.register_forward_hook(_add_mean)
        try:
            if one and all(map(_identical, *map(operands, _OTHERS))):
                raise _blind("the codes of quantized layers")
        finally:
            handle.remove()


def check_at_size(model: nn.Module, loss_fn: PerExampleLoss, found: Findings, size: int) -> None:
    """The same company and places in a microbatch of the run's own size, by losses, as the model runs now.

    Raises:
      ModelError: a's loss depends on the others, or on its place.
    Privacy: reads no data.
    """

    def loss(other: int, place: int) -> float:
        order = [0 if row == place else other for row in range(size)]
        piece = Microbatch(found.specimens.batch(order), torch.tensor(order), size)
        return float(losses_of(model, loss_fn, piece, key=_KEY, drawing=found.drawing)[place])

    first = loss(1, 0)
    scale = _TOLERANCE * max(abs(first), _SMALLEST_LOSS)
    if not abs(loss(2, 0) - first) <= scale:
        raise ModelError(_BY_PLACE if found.drawing.seen else _COUPLED)
    quantized = any(layer.quantized for layer in quantizable_layers(model).values())
    if not quantized and not abs(loss(1, size - 1) - first) <= scale:  # a last bit can become another code
        raise ModelError(_BY_PLACE if found.drawing.seen else _COUPLED)


def keeps_apart(
    model: nn.Module,
    loss_fn: PerExampleLoss,
    piece: Microbatch,
    elsewhere: Microbatch,
    *,
    key: int,
    drawing: Drawing,
) -> bool:
    """Whether the first row comes out alike in two microbatches of one size: loss, gradient, and codes bit for bit.

    Privacy: for a model that keeps examples apart the answer is always yes, so that it says nothing about the records.
    """
    one, other = (gradient_of_row(model, loss_fn, batch, 0, key=key, drawing=drawing) for batch in (piece, elsewhere))
    losses = one.losses[0], other.losses[0]
    if not all(bool(loss.isfinite()) for loss in losses):
        return all(not bool(loss.isfinite()) for loss in losses)
    norm = _norm(one.grads.values())
    gap = _norm(one.grads[name] - other.grads[name] for name in one.grads)
    if not (gap <= _TOLERANCE * norm or not norm < float("inf")):
        return False
    same_codes = len(one.operands) == len(other.operands) and all(map(_identical, one.operands, other.operands))
    return same_codes and abs(float(losses[0] - losses[1])) <= _TOLERANCE * max(abs(float(losses[0])), _SMALLEST_LOSS)


def _count_macs(model: nn.Module, loss_fn: PerExampleLoss, specimens: Specimens) -> dict[str, float]:
    """One forward pass, counting; and the check that it leaves the buffers alone."""
    layers = quantizable_layers(model)
    macs = dict.fromkeys(layers, 0.0)

    def counter(name: str) -> Callable[..., None]:
        def count(module: nn.Module, inputs: Any, output: Tensor) -> None:
            macs[name] += output[0].numel() * layers[name].weight[0].numel()

        return count

    def forward(order: Sequence[int]) -> None:
        with torch.no_grad(), seeded(_KEY):
            loss_fn(model, specimens.batch(order))

    handles = [layer.register_forward_hook(counter(name)) for name, layer in layers.items()]
    before = buffers_of(model)
    try:
        forward((0, 0, 0))
    finally:
        for handle in handles:
            handle.remove()
    if changed := changed_buffer(model, before):
        restore_buffers(model, before)
        forward((1, 1, 1))
        one = buffers_of(model)
        restore_buffers(model, before)
        forward((2, 2, 2))
        follows = changed_buffer(model, one) is not None
        raise ModelError(
            f"Expected a forward pass to leave the model's buffers alone; got a change of {changed}. "
            + (
                "A buffer that follows the data is released with the model, without noise. Remove it, or freeze it in "
                "evaluation."
                if follows
                else "It changes at every pass, whatever the data, so that it tells how many passes were made, which "
                "follows how many records were drawn. Put its module in evaluation mode (spectral_norm stops there), or "
                "remove it."
            )
        )
    return macs


def buffers_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the model's buffers."""
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def changed_buffer(model: nn.Module, before: dict[str, Tensor]) -> str | None:
    """The name of a buffer that is no longer what it was, or None."""
    now = dict(model.named_buffers())
    for name in {**before, **now}:
        same = name in now and name in before and now[name].shape == before[name].shape
        if not (same and torch.equal(now[name].nan_to_num(), before[name].nan_to_num())):
            return name
    return None


def restore_buffers(model: nn.Module, before: dict[str, Tensor]) -> None:
    """Put back the values of buffers that still have their shape."""
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name in before and buffer.shape == before[name].shape:
                buffer.copy_(before[name])
