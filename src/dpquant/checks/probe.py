# SPDX-License-Identifier: Apache-2.0
"""Compares a record's loss and gradient among different batchmates, and plants couplings to show that it sees them.

Results are first compared bit for bit in float32, as a run computes. Where they agree, nothing is coupled, and nothing
else is tried. Where they do not, round-off may be the cause: float64 and a tolerance decide. Every comparison is
written so that it fails on NaN.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dpquant.checks.planting import Places, a_twice, blind, means_with
from dpquant.checks.refusals import BUFFERS, BY_PLACE, COUPLED, FOLLOWS, KEEPS_STATE, MIXED
from dpquant.checks.synthetic import Specimens
from dpquant.engine.batches import Microbatch, leaves, with_leaves
from dpquant.engine.context import StepContext
from dpquant.engine.contributions import Contribution
from dpquant.engine.layers import current_precisions, set_precisions
from dpquant.engine.passes import Objective, RowGradients, draws_key, gradients_of_rows, losses_of
from dpquant.engine.perturbation import converted
from dpquant.engine.randomness import seeded
from dpquant.engine.unrouted import Unreached
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
_PAIR = (0, 1)  # a batch of two, whose first row is compared with autograd, and with itself later on


def piece_of(specimens: Specimens, order: Sequence[int], dtype: torch.dtype) -> Microbatch:
    """Return a microbatch of the specimens with these numbers, which are their record ids; floats in `dtype`."""
    return _in_type(Microbatch(specimens.batch(order), torch.tensor(order), len(order)), dtype)


def _in_type(piece: Microbatch, dtype: torch.dtype) -> Microbatch:
    """Return the microbatch with its floats of type float32 in `dtype`."""
    if dtype == torch.float32:
        return piece
    data = with_leaves(piece.data, lambda leaf: leaf.to(dtype) if leaf.dtype == torch.float32 else leaf)
    return dataclasses.replace(piece, data=data)


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


@contextlib.contextmanager
def left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Restore the modes and precisions of the model's modules when the block ends."""
    modes = {module: module.training for module in model.modules()}
    precisions = current_precisions(model)
    try:
        yield
    finally:
        set_precisions(model, precisions)
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
        """Note the buffers as they are.

        Args:
          objective: the model and its loss.
          specimens: synthetic records.
          dtype: in which results are compared that differ in float32.
        """
        self._objective, self._model, self._specimens = objective, objective.model, specimens
        self._precise, self._dtype = dtype, torch.float32
        self._buffers = buffers_of(objective.model)
        self.moved: set[str] = set()
        self.reached: set[str] = set()

    def remember(self) -> None:
        """Take the results that `compare_further` compares with autograd's and with later ones."""
        with self._precisely():
            self._first = self._rows(_PAIR)

    def compare_batchmates(self) -> None:
        """Raise ModelError if a record's results change with its batchmates or its row."""
        if not (self._compare_bits() and self.moved >= self._objective.trainable().keys()):
            with self._precisely():
                self._compare_in_batches([*map(self._rows, MOVED)])

    def compare_in_the_other_mode(self) -> None:
        """Compare batchmates in evaluation if the model is in training, and the other way round."""
        with other_mode(self._model):
            if not self._compare_bits():
                with self._precisely():
                    self._compare_in_batches([*map(self._rows, MOVED)])

    def compare_further(self) -> None:
        """Raise ModelError if results change with the batch size or with earlier calls, or differ from autograd's."""
        with self._precisely():
            self.compare_with_autograd()
            if not self._objective.drawing.seen:
                self._compare_with_one_alone()
            if not self.close(self._first.losses[0], self._losses(_PAIR)[0]):
                raise ModelError(KEEPS_STATE)

    def plant(self) -> None:
        """Plant couplings in the batch, in activations and in the loss; raise Blind if one of them is not seen."""
        abc = self._piece((0, 1, 2))
        places = Places.of(self._objective, abc, KEY)
        for number, path in places.leaves.items():
            if not self._sees(abc, places, leaf=number):
                raise blind(f"batch{path}")
        modules = list(places.outputs)
        for module in dict.fromkeys([*modules[:1], *modules[len(modules) // 2 :][:1], *modules[-1:]]):
            if not self._sees(abc, places, module=module):
                name = next(name for name, one in self._model.named_modules() if one is module)
                raise blind(f"the output of {name or 'the model'}")
        if not self._sees(abc, places):
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

    @contextlib.contextmanager
    def _precisely(self) -> Iterator[None]:
        """Run the model in the precise type until the block ends; raise ModelError if a buffer changes in it."""
        before = self._dtype, self._buffers
        try:
            with converted(self._model, self._precise):
                self._dtype, self._buffers = self._precise, buffers_of(self._model)
                yield
                self.compare_buffers()
        finally:
            self._dtype, self._buffers = before

    def _compare_bits(self) -> bool:
        """Return whether the results of each record's copies are equal in all batches, bit for bit, in float32."""
        found = [*map(self._rows, MOVED)]
        self._note(found)
        copies: dict[int, list[RowGradients]] = {}
        for order, rows in zip(MOVED, found, strict=True):
            for row, number in enumerate(order):
                copies.setdefault(number, []).append(rows.row(row))
        return all(first.same_bits(other) for first, *others in copies.values() for other in others)

    def _note(self, found: Sequence[RowGradients]) -> None:
        """Note which parameters have gradients."""
        for rows in found:
            self.reached |= rows.parts.keys()
            new = (item for item in rows.parts.items() if item[0] not in self.moved)
            self.moved |= {name for name, part in new if _moves(part)}

    def _compare_in_batches(self, found: Sequence[RowGradients]) -> None:
        """Raise ModelError if a record's results differ between the batches."""
        self._note(found)
        for one, other in PLACES_MOVED:
            mine, theirs = (found[batch].row(row) for batch, row in (one, other))
            if not self.alike(mine, theirs):
                raise self._coupled()

    def _rows(self, order: Sequence[int]) -> RowGradients:
        return gradients_of_rows(self._objective, self._piece(order), StepContext(key=KEY))

    def _losses(self, order: Sequence[int]) -> Tensor:
        return losses_of(self._objective, self._piece(order), StepContext(key=KEY))

    @property
    def _tolerance(self) -> float:
        return self.tolerances[self._dtype]

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
        piece = self._piece(_PAIR)
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
                    raise Unreached([name])
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

    def _sees(
        self, abc: Microbatch, places: Places, *, leaf: int | None = None, module: nn.Module | None = None
    ) -> bool:
        """Whether a coupling changes the results of a between batches with b and with c, side by side in one batch.

        The coupling is planted in a leaf, in a module's output or, without either, in the loss. If it is seen in
        float32, it would be seen in float64 too, where the tolerance is smaller.
        """
        honest = self._objective

        def coupled(model: nn.Module, batch: Any) -> Any:
            return means_with([places.losses])(None, None, honest.loss_fn(model, batch))

        objective = dataclasses.replace(honest, loss_fn=coupled) if leaf is None and module is None else honest

        def computed(work: Callable[..., Any]) -> Any:
            piece = _in_type(a_twice(abc, leaf), self._dtype)
            hook = None if module is None else module.register_forward_hook(means_with(places.outputs[module]))
            try:
                return work(objective, piece, StepContext(key=KEY))
            finally:
                if hook is not None:
                    hook.remove()

        def differs() -> bool:
            losses = computed(losses_of)
            if not self.close(losses[0], losses[1]):
                return True
            rows = computed(gradients_of_rows)
            return not self.alike(rows.row(0), rows.row(1))

        if differs():
            return True
        with self._precisely():
            return differs()


def _moves(part: Contribution) -> bool:
    """Whether a gradient is not zero, of any row; the first is enough as a rule."""
    rows = (part.take(torch.full((1,), row, device=part.tensors()[0].device)) for row in range(len(part.tensors()[0])))
    return any(bool(row.inner_products(row).any()) for row in rows)


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
