# SPDX-License-Identifier: Apache-2.0
"""What a model makes of one synthetic record in different company, and couplings that are planted to be seen.

Comparisons are of a record's loss and gradient. None passes on NaN: each is written so that it holds or fails.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from dpquant.checks.refusals import BY_PLACE, COUPLED, KEEPS_STATE, MIXED
from dpquant.checks.synthetic import Specimens
from dpquant.engine.batches import Microbatch, leaves, with_leaves
from dpquant.engine.passes import Objective, RowGradients, draws_key, gradients_of_rows, losses_of
from dpquant.engine.randomness import seeded
from dpquant.engine.tape import no_gradient
from dpquant.errors import DataError, ModelError

KEY = 0  # of the synthetic records' draws: nothing private follows from them
TOLERANCE, _FLOAT64_TOLERANCE = 1e-3, 1e-6  # of a loss or a gradient; rounding is a hundred times smaller
SMALLEST_LOSS = 1e-3  # losses below it are compared as if they were as large

# Three companies in which each of a, b and c (0, 1, 2) meets others, once alone of its kind and once as a pair: so that
# what follows the largest, the smallest or the middle one shows, whichever that is. Then each one's two places in them,
# as (company, row); they differ or, for what has to be equal bit for bit, are the same.
MOVED = ((0, 1, 1), (1, 2, 2), (0, 0, 2))
PLACES_MOVED = (((0, 0), (2, 1)), ((0, 2), (1, 0)), ((1, 1), (2, 2)))
FIXED = ((0, 1, 1), (2, 1, 2), (0, 0, 2))
PLACES_FIXED = (((0, 0), (2, 0)), ((0, 1), (1, 1)), ((1, 2), (2, 2)))
_PAIRS = ((0, 1), (0, 2))  # companies of a that a planted coupling has to tell apart


class Blind(ModelError):
    """A coupling that was planted was not seen."""


def piece_of(specimens: Specimens, order: Sequence[int], dtype: torch.dtype) -> Microbatch:
    """The specimens of these numbers as a microbatch; a specimen's number is its record id."""
    batch = specimens.batch(order)
    if dtype == torch.float64:
        batch = with_leaves(batch, lambda leaf: leaf.double() if leaf.dtype == torch.float32 else leaf)
    return Microbatch(batch, torch.tensor(order), len(order))


@contextlib.contextmanager
def shaken(model: nn.Module, dtype: torch.dtype, seed: int) -> Iterator[None]:
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
        tensor.data = data.to(dtype, copy=tensor not in parameters)
    try:
        yield
    finally:
        for tensor, data in kept:
            tensor.data = data


@contextlib.contextmanager
def other_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation in place of training, or training in place of evaluation, until the block ends."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.train(not model.training)
        yield
    finally:
        for module, training in modes.items():
            module.training = training


class Probe:
    """What the model makes of a specimen in some company.

    Attributes:
      moved: names of the parameters that a comparison gave a gradient other than zero.
      reached: names of the parameters whose modules got a gradient at all.
    """

    def __init__(self, objective: Objective, specimens: Specimens, dtype: torch.dtype):
        self._objective, self._model, self._specimens = objective, objective.model, specimens
        self._dtype, self._tolerance = dtype, _FLOAT64_TOLERANCE if dtype == torch.float64 else TOLERANCE
        self.moved: set[str] = set()
        self.reached: set[str] = set()
        self._first = self._rows(MOVED[0])

    def compare_company(self) -> None:
        """Raise ModelError if the results of one change in other company and at another place."""
        self._compare_in_companies([self._first, *map(self._rows, MOVED[1:])])

    def compare_in_the_other_mode(self) -> None:
        """The same in the mode, training or evaluation, that the model is not in."""
        with other_mode(self._model):
            self._compare_in_companies([*map(self._rows, MOVED)])

    def compare_further(self) -> None:
        """Raise ModelError if results change with the number of neighbours or the past, or are not autograd's."""
        self._compare_with_autograd()
        if not self._objective.drawing.seen:
            self._compare_with_one_alone()
        if not self._close(self._first.losses[0], self._losses(MOVED[0])[0]):
            raise ModelError(KEEPS_STATE)

    def plant(self) -> None:
        """Raise Blind unless couplings that are planted here are seen."""
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

    def check_collation(self) -> None:
        """A record's row of the batch may not change with the other records, unless it is padded."""
        if self._specimens.padded:
            return
        for order, row in (((0, 1, 1), 0), ((0, 2, 2), 0), ((1, 0, 1), 1), ((2, 2, 0), 2)):
            mine = [leaf[0] for _, leaf in leaves(self._piece((0, 0, 0)).data)]
            here = [leaf[row] for _, leaf in leaves(self._piece(order).data)]
            if not all(map(identical, mine, here)):
                raise DataError(MIXED)

    def _piece(self, order: Sequence[int]) -> Microbatch:
        return piece_of(self._specimens, order, self._dtype)

    def _compare_in_companies(self, found: Sequence[RowGradients]) -> None:
        """Raise ModelError if the results of one differ in the companies; and note which parameters move."""
        for rows in found:
            self.reached |= rows.parts.keys()
            new = (item for item in rows.parts.items() if item[0] not in self.moved)
            self.moved |= {name for name, part in new if bool(part.inner_products(part).any())}
        for one, other in PLACES_MOVED:
            mine, theirs = (found[company].row(row) for company, row in (one, other))
            if not self._alike(mine, theirs):
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

    def _alike(self, one: RowGradients, other: RowGradients) -> bool:
        """Whether both are the same example's, each of one row."""
        return one.distance(other) <= self._tolerance * one.norm() and self._close(one.losses[0], other.losses[0])

    def _close(self, one: Tensor, other: Tensor) -> bool:
        scale = max(abs(float(one)), SMALLEST_LOSS)
        return abs(float(one) - float(other)) <= self._tolerance * scale

    def _coupled(self) -> ModelError:
        """The error for two results that differ; says what they differ by."""
        first, again = (self._rows(MOVED[0]).row(0) for _ in range(2))
        if not self._alike(first, again):
            return ModelError(KEEPS_STATE)
        if self._objective.drawing.seen and self._alike(self._rows((0, 0, 0)).row(0), first):
            return ModelError(BY_PLACE)
        return ModelError(COUPLED)

    def _compare_with_autograd(self) -> None:
        """Catches a parameter whose use is not seen, and so not clipped for: tied by hand, or used elsewhere."""
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
        # a gradient that is zero but for round-off, as of a bias before a normalization, is held to the others' size
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
        """Catches what depends on how many examples there are."""
        try:
            alone = self._losses((0,))
        except Exception:  # a model that squeezes its first axis: no microbatch of a run has one row unless asked for
            return
        if not self._close(self._first.losses[0], alone[0]):
            raise ModelError(COUPLED)

    def _sees(self, *, leaf: int | None = None, module: nn.Module | None = None, loss: bool = False) -> bool:
        """Whether a coupling in one place makes a's results depend on b and c."""
        with contextlib.ExitStack() as planted:
            if module is not None:
                planted.callback(module.register_forward_hook(add_mean).remove)
            honest = self._objective
            if loss:
                planted.callback(setattr, self, "_objective", honest)
                coupled = lambda model, batch: add_mean(None, None, honest.loss_fn(model, batch))  # noqa: E731
                self._objective = dataclasses.replace(honest, loss_fn=coupled)
            one, other = (self._losses(pair, leaf) for pair in _PAIRS)
            if not self._close(one[0], other[0]):
                return True
            one, other = (self._rows(pair, leaf).row(0) for pair in _PAIRS)
            return not self._alike(one, other)

    def _used(self) -> tuple[dict[int, str], list[nn.Module]]:
        """Where couplings can be planted: in leaves of the batch, by number and path, and in the outputs of modules.

        The leaves are those that enter any computation. The modules have trainable parameters of their own and return
        a tensor of examples, as they are called. Not those whose output is the same for all records, such as learnt
        positions: no mean of it couples anything.
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
    """A coupling: each row gets a part of the batch's mean. A forward hook, or a loss' last step."""
    if isinstance(output, Tensor) and output.is_floating_point() and output.ndim:
        return output + output.detach().mean(0, keepdim=True)
    return output


def _rolled(batch: Any, number: int) -> Any:
    """A coupling: one leaf's rows move up by one, so that each example gets another's."""
    numbers = itertools.count()
    return with_leaves(batch, lambda leaf: leaf.roll(1, 0) if next(numbers) == number else leaf)


def blind(place: str) -> Blind:
    """The error for a coupling that was planted in vain."""
    return Blind(
        f"Expected made-up records that would show a coupling of examples in {place}; one that was planted there had "
        "no effect. So the check could not see whether examples are kept apart. Give example= a few public or "
        "synthetic records that differ in every value, or leave out of the batch what has no effect."
    )


_CARRIES = {
    getattr(torch.ops.aten, name)
    for name in (
        *("_to_copy", "alias", "clone", "detach", "expand", "permute", "select", "slice", "squeeze", "t"),
        *("transpose", "unsqueeze", "view", "_unsafe_view", "split", "unbind"),
    )
}  # operators that pass values on


class _Watched(TorchDispatchMode):
    """Notices which of some tensors, or what other shapes and types of them there are, enter a computation.

    Attributes:
      used: their numbers.
    """

    def __init__(self, tensors: Sequence[Tensor]):
        super().__init__()
        self._numbers: dict[int, set[int]] = {}  # by the memory that they are in
        for number, tensor in enumerate(tensors):
            self._numbers.setdefault(_memory(tensor), set()).add(number)
        self._kept = list(tensors)  # memory that was freed could come again
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
