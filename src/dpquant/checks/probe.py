# SPDX-License-Identifier: Apache-2.0
"""Compares a record's loss and gradient among different batchmates, and plants couplings to show that it sees them.

Every comparison is written so that it fails on NaN.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from dpquant.checks.refusals import BUFFERS, BY_PLACE, COUPLED, FOLLOWS, KEEPS_STATE, MIXED
from dpquant.checks.synthetic import Specimens
from dpquant.engine.batches import Microbatch, leaves, with_leaves
from dpquant.engine.passes import Objective, RowGradients, draws_key, gradients_of_rows, losses_of
from dpquant.engine.randomness import seeded
from dpquant.engine.tape import no_gradient
from dpquant.errors import DataError, ModelError

KEY = 0  # of the random draws on synthetic records; not secret, because no private value is involved
TOLERANCE, _FLOAT64_TOLERANCE = 1e-3, 1e-6  # relative, of a loss or a gradient; rounding is a hundred times smaller
SMALLEST_LOSS = 1e-3  # differences of smaller losses are taken relative to this

# Three batches of the records a, b and c (0, 1, 2). In two of them each record has other batchmates, once as the only
# copy and once as one of two, so that a statistic that follows the largest, smallest or middle record is seen. Then the
# two places of each record, as (batch, row): in different rows or, for comparisons bit for bit, in the same row.
MOVED = ((0, 1, 1), (1, 2, 2), (0, 0, 2))
PLACES_MOVED = (((0, 0), (2, 1)), ((0, 2), (1, 0)), ((1, 1), (2, 2)))
FIXED = ((0, 1, 1), (2, 1, 2), (0, 0, 2))
PLACES_FIXED = (((0, 0), (2, 0)), ((0, 1), (1, 1)), ((1, 2), (2, 2)))
_PAIRS = ((0, 1), (0, 2))  # batches of two in which a planted coupling has to change the results of a


class Blind(ModelError):
    """The check did not see a coupling that it planted itself."""


def piece_of(specimens: Specimens, order: Sequence[int], dtype: torch.dtype) -> Microbatch:
    """Return a microbatch of the specimens with these numbers, which are their record ids; floats in `dtype`."""
    batch = specimens.batch(order)
    if dtype == torch.float64:
        batch = with_leaves(batch, lambda leaf: leaf.double() if leaf.dtype == torch.float32 else leaf)
    return Microbatch(batch, torch.tensor(order), len(order))


@contextlib.contextmanager
def shaken(model: nn.Module, dtype: torch.dtype, seed: int, share: float) -> Iterator[None]:
    """Perturb parameters and convert parameters and buffers to a type until the block ends; then restore them in place.

    Each entry changes by up to `share` of itself, a zero by up to `share`: a zero may be a gate that lets no gradient
    through.
    """
    generator = torch.Generator().manual_seed(seed)
    parameters = set(model.parameters())
    kept = [(t, t.data) for t in (*model.parameters(), *model.buffers()) if t.dtype == torch.float32]
    for tensor, data in kept:
        if tensor in parameters:
            noise = (2 * share * torch.rand(data.shape, generator=generator) - share).to(data.device)
            data = data + torch.where(data == 0, noise, noise * data)
        tensor.data = data.to(dtype, copy=tensor not in parameters)
    try:
        yield
    finally:
        for tensor, data in kept:
            tensor.data = data


@contextlib.contextmanager
def other_mode(model: nn.Module) -> Iterator[None]:
    """Switch from training to evaluation, or back, until the block ends."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.train(not model.training)
        yield
    finally:
        for module, training in modes.items():
            module.training = training


class Probe:
    """Compares losses and gradients of specimens among different batchmates, for parameters as they are now.

    Attributes:
      share: by which parameters are perturbed before they are probed, see `shaken`.
      tolerances: largest relative difference of losses or gradients that count as equal, by type.
      moved: names of the parameters that had a nonzero gradient in a comparison.
      reached: names of the parameters whose modules received a gradient, zero or not.
    """

    share: ClassVar[float] = 0.1
    tolerances: ClassVar[dict[torch.dtype, float]] = {
        torch.float32: TOLERANCE,
        torch.float64: _FLOAT64_TOLERANCE,
    }

    def __init__(self, objective: Objective, specimens: Specimens, dtype: torch.dtype):
        """Take the gradients of the first batch.

        Args:
          objective: the model and its loss.
          specimens: synthetic records.
          dtype: of the model and of the batches' floats.
        """
        self._objective, self._model, self._specimens = objective, objective.model, specimens
        self._dtype, self._tolerance = dtype, self.tolerances[dtype]
        self._buffers = buffers_of(objective.model)
        self.moved: set[str] = set()
        self.reached: set[str] = set()
        self._first = self._rows(MOVED[0])

    def compare_batchmates(self) -> None:
        """Raise ModelError if a record's results change with its batchmates or its row."""
        self._compare_in_batches([self._first, *map(self._rows, MOVED[1:])])

    def compare_in_the_other_mode(self) -> None:
        """Compare batchmates in evaluation if the model is in training, and the other way round."""
        with other_mode(self._model):
            self._compare_in_batches([*map(self._rows, MOVED)])

    def compare_further(self) -> None:
        """Raise ModelError if results change with the batch size or with earlier calls, or differ from autograd's."""
        self.compare_with_autograd()
        if not self._objective.drawing.seen:
            self._compare_with_one_alone()
        if not self.close(self._first.losses[0], self._losses(MOVED[0])[0]):
            raise ModelError(KEEPS_STATE)

    def plant(self) -> None:
        """Plant couplings in the batch, in activations and in the loss; raise Blind if one of them is not seen."""
        used, modules = self._used()
        for number, path in used.items():
            if not self._sees(leaf=number):
                raise blind(f"batch{path}")
        for module in dict.fromkeys([*modules[:1], *modules[len(modules) // 2 :][:1], *modules[-1:]]):
            if not self._sees(module=module):
                name = next(name for name, one in self._model.named_modules() if one is module)
                raise blind(f"the output of {name or 'the model'}")
        if not self._sees(loss=True):
            raise blind("the loss")

    def compare_buffers(self) -> None:
        """Raise ModelError if a buffer has changed since the probe was made."""
        if changed := changed_buffer(self._model, self._buffers):
            raise ModelError(f"{BUFFERS}; got a change of {changed}. {FOLLOWS}")

    def check_collation(self) -> None:
        """Raise DataError if a record's row of the batch changes with the other records; padded rows may."""
        if self._specimens.padded:
            return
        for order, row in (((0, 1, 1), 0), ((0, 2, 2), 0), ((1, 0, 1), 1), ((2, 2, 0), 2)):
            mine = [leaf[0] for _, leaf in leaves(self._piece((0, 0, 0)).data)]
            here = [leaf[row] for _, leaf in leaves(self._piece(order).data)]
            if not all(map(identical, mine, here)):
                raise DataError(MIXED)

    def _piece(self, order: Sequence[int]) -> Microbatch:
        return piece_of(self._specimens, order, self._dtype)

    def _compare_in_batches(self, found: Sequence[RowGradients]) -> None:
        """Raise ModelError if a record's results differ between the batches; note which parameters have gradients."""
        for rows in found:
            self.reached |= rows.parts.keys()
            new = (item for item in rows.parts.items() if item[0] not in self.moved)
            self.moved |= {name for name, part in new if bool(part.inner_products(part).any())}
        for one, other in PLACES_MOVED:
            mine, theirs = (found[batch].row(row) for batch, row in (one, other))
            if not self.alike(mine, theirs):
                raise self._coupled()

    def _rows(self, order: Sequence[int], leaf: int | None = None) -> RowGradients:
        piece = self._piece(order)
        if leaf is not None:
            piece = dataclasses.replace(piece, data=_rolled(piece.data, leaf))
        return gradients_of_rows(self._objective, piece, key=KEY)

    def _losses(self, order: Sequence[int], leaf: int | None = None) -> Tensor:
        piece = self._piece(order)
        if leaf is not None:
            piece = dataclasses.replace(piece, data=_rolled(piece.data, leaf))
        return losses_of(self._objective, piece, key=KEY)

    def alike(self, one: RowGradients, other: RowGradients) -> bool:
        """Whether two results of one row each have equal gradients and losses, up to the tolerance."""
        return one.distance(other) <= self._tolerance * one.norm() and self.close(one.losses[0], other.losses[0])

    def close(self, one: Tensor, other: Tensor) -> bool:
        """Whether two losses are equal up to the tolerance."""
        scale = max(abs(float(one)), SMALLEST_LOSS)
        return abs(float(one) - float(other)) <= self._tolerance * scale

    def _coupled(self) -> ModelError:
        """Return the error for two results that differ, with the cause: state, random draws by row, or batchmates."""
        first, again = (self._rows(MOVED[0]).row(0) for _ in range(2))
        if not self.alike(first, again):
            return ModelError(KEEPS_STATE)
        if self._objective.drawing.seen and self.alike(self._rows((0, 0, 0)).row(0), first):
            return ModelError(BY_PLACE)
        return ModelError(COUPLED)

    def compare_with_autograd(self) -> None:
        """Raise ModelError if a per-example gradient is not autograd's.

        That is so where a parameter is used outside of its module, or tied by hand: part of its gradient would not be
        clipped.
        """
        trainable = self._objective.trainable()
        piece = self._piece(MOVED[0])
        with seeded(derived := draws_key(KEY)):
            losses = self._objective.drawing.by_record(lambda: self._objective.losses(piece), derived, piece.record_ids)
            found = torch.autograd.grad(losses[0], list(trainable.values()), allow_unused=True)
        theirs = [
            torch.zeros_like(p) if g is None else g.to_dense() for p, g in zip(trainable.values(), found, strict=True)
        ]
        norms = [float(reference.norm()) for reference in theirs]
        mine = self._first.row(0).parts
        # a gradient that is zero up to round-off (a bias before a normalization) is compared at the others' scale
        smallest = 1e-3 * self._tolerance * max(1.0, *norms)
        for name, reference, norm in zip(trainable, theirs, norms, strict=True):
            gap = reference if name not in mine else reference - mine[name].per_example()[0]
            if not float(gap.norm()) <= max(self._tolerance * norm, smallest):
                if name not in mine:
                    raise no_gradient(name)
                raise ModelError(
                    f"Expected {name} to be used only by the module that owns it; got a gradient that its per-example "
                    "gradients do not add up to. Clipping would miss a part of it. Call the module instead of using "
                    "its parameter, or make the examples the first axis of every input."
                )

    def _compare_with_one_alone(self) -> None:
        """Raise ModelError if a loss depends on the number of examples in the batch."""
        try:
            alone = self._losses((0,))
        except Exception:  # a model that squeezes its first axis; a run has microbatches of one row only if asked for
            return
        if not self.close(self._first.losses[0], alone[0]):
            raise ModelError(COUPLED)

    def _sees(self, *, leaf: int | None = None, module: nn.Module | None = None, loss: bool = False) -> bool:
        """Whether a coupling planted in one place changes the results of a between batches with b and with c."""
        with contextlib.ExitStack() as planted:
            if module is not None:
                planted.callback(module.register_forward_hook(add_mean).remove)
            honest = self._objective
            if loss:
                planted.callback(setattr, self, "_objective", honest)
                self._objective = dataclasses.replace(
                    honest, loss_fn=lambda model, batch: add_mean(None, None, honest.loss_fn(model, batch))
                )
            one, other = (self._losses(pair, leaf) for pair in _PAIRS)
            if not self.close(one[0], other[0]):
                return True
            one, other = (self._rows(pair, leaf).row(0) for pair in _PAIRS)
            return not self.alike(one, other)

    def _used(self) -> tuple[dict[int, str], list[nn.Module]]:
        """Return where couplings can be planted: {number of a leaf of the batch: its path}, and modules.

        The leaves are those that enter a computation. The modules, in the order of their calls, have trainable
        parameters of their own and return a tensor of examples. A module whose output is the same for all records, such
        as learnt positions, is left out: its mean couples nothing.
        """
        called: dict[nn.Module, None] = {}

        def note(module: nn.Module, inputs: Any, output: Any) -> None:
            of_examples = isinstance(output, Tensor) and output.is_floating_point() and output.ndim and len(output) == 3
            if of_examples and not (torch.equal(output[0], output[1]) and torch.equal(output[0], output[2])):
                called[module] = None

        own = [m for m in self._model.modules() if any(p.requires_grad for p in m.parameters(recurse=False))]
        handles = [module.register_forward_hook(note) for module in own]
        piece = self._piece((0, 1, 2))
        paths, tensors = zip(*leaves(piece.data), strict=True)
        try:
            with seeded(KEY), torch.no_grad(), _Watched(tensors) as watched:
                self._objective.loss_fn(self._model, piece.data)
        finally:
            for handle in handles:
                handle.remove()
        return {number: paths[number] for number in sorted(watched.used)}, list(called)


def add_mean(module: Any, inputs: Any, output: Any) -> Any:
    """Add the batch's mean to each row: a coupling to plant as a forward hook or on a loss."""
    if isinstance(output, Tensor) and output.is_floating_point() and output.ndim:
        return output + output.detach().mean(0, keepdim=True)
    return output


def _rolled(batch: Any, number: int) -> Any:
    """Move one leaf's rows up by one, so that each example gets another's: a coupling to plant in a batch."""
    numbers = itertools.count()
    return with_leaves(batch, lambda leaf: leaf.roll(1, 0) if next(numbers) == number else leaf)


def blind(place: str) -> Blind:
    """Return the error for a coupling that was planted and not seen."""
    return Blind(
        f"Expected synthetic records that would show a coupling of examples in {place}; one that was planted there had "
        "no effect. So the check could not see whether examples are kept apart. Give example= a few public or "
        "synthetic records that differ in every value, or leave out of the batch what has no effect."
    )


_CARRIES = {
    getattr(torch.ops.aten, name)
    for name in (
        *("_to_copy", "alias", "clone", "detach", "expand", "permute", "select", "slice", "squeeze", "t"),
        *("transpose", "unsqueeze", "view", "_unsafe_view", "split", "unbind"),
    )
}  # operators that return the values they are given, and compute nothing with them


class _Watched(TorchDispatchMode):
    """Records which of some tensors enter a computation, also through views, copies and conversions of them.

    Attributes:
      used: the numbers of these tensors.
    """

    def __init__(self, tensors: Sequence[Tensor]):
        super().__init__()
        self._numbers: dict[int, set[int]] = {}  # by the address of their memory
        for number, tensor in enumerate(tensors):
            self._numbers.setdefault(_memory(tensor), set()).add(number)
        self._kept = list(tensors)  # alive, so that no address is used for another tensor
        self.used: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        numbers = set().union(*(self._numbers.get(_memory(t), ()) for t in given))
        if numbers and func.overloadpacket in _CARRIES:
            made = [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]
            for tensor in made:
                self._numbers.setdefault(_memory(tensor), set()).update(numbers)
            self._kept += made
        else:
            self.used |= numbers
        return result


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def identical(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same shape and values."""
    return one.shape == other.shape and torch.equal(one, other)


def buffers_of(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of the model's buffers, by name."""
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def changed_buffer(model: nn.Module, before: dict[str, Tensor]) -> str | None:
    """Return the name of a buffer that was added, removed or changed since `before`, or None."""
    now = dict(model.named_buffers())
    for name in {**before, **now}:
        same = name in now and name in before and now[name].shape == before[name].shape
        if not (same and torch.equal(now[name].nan_to_num(), before[name].nan_to_num())):
            return name
    return None


def restore_buffers(model: nn.Module, before: dict[str, Tensor]) -> None:
    """Restore the values of the buffers that have kept their shape since `before`."""
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name in before and buffer.shape == before[name].shape:
                buffer.copy_(before[name])
