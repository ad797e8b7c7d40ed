# SPDX-License-Identifier: Apache-2.0
"""Forward and backward passes over microbatches that record every example's gradients on a tape.

Each microbatch has one forward and one backward pass: a second one would redraw the stochastic rounding.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dpquant.backends.precision import ieee_float32
from dpquant.backends.qtensor import QTensor
from dpquant.engine.batches import Microbatch, take_rows
from dpquant.engine.context import StepContext
from dpquant.engine.contributions import Contribution, Materialised
from dpquant.engine.layers import running
from dpquant.engine.leaves import Leaves, Routes
from dpquant.engine.listening import taping
from dpquant.engine.randomness import Drawing, TorchPosition, seeded
from dpquant.engine.routing import learn
from dpquant.engine.tape import GradientTape, check_examples_first
from dpquant.engine.unrouted import Unreached, Unrouted
from dpquant.errors import DPQuantError, ModelError, SettingError
from dpquant.rounding import derive_key

PerExampleLoss = Callable[[nn.Module, Any], Tensor]


@dataclasses.dataclass(frozen=True, eq=False)
class Objective:
    """The function that is minimised: a model, its loss, and how their random numbers are drawn.

    Attributes:
      model: a prepared model.
      loss_fn: `(model, batch) -> Tensor (B,)`, one loss per example.
      drawing: makes random numbers of model and loss follow from records, and remembers whether they draw any.
    """

    model: nn.Module
    loss_fn: PerExampleLoss
    drawing: Drawing = dataclasses.field(default_factory=Drawing)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return {name: parameter} of the parameters that require a gradient."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def losses(self, piece: Microbatch) -> Tensor:
        """Compute the losses `(B,)` of a microbatch.

        Raises:
          SettingError: the loss is not one number per example.
        Privacy: per example, if model and loss keep examples apart. This is not checked here.
        """
        losses = self.loss_fn(self.model, piece.data)
        if not isinstance(losses, Tensor) or losses.shape != (len(piece.record_ids),):
            got = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else f"a {type(losses).__name__}"
            raise SettingError(
                f"Expected loss_fn to return one loss per example, a tensor with one axis; got {got}. "
                "Each example's gradient is clipped on its own. Use reduction='none'."
            )
        return losses

    def learn(self, piece: Microbatch, names: Iterable[str] = ()) -> bool:
        """Find out how gradients of parameters are got that lie beside other layers; return whether any was found.

        Args:
          piece: rows on which this is tried; three of them are used.
          names: of further parameters, which no hook has reached.
        Raises:
          ModelError: there is no way for one of them.
        Privacy: decides by the rows that it is given. A run gives synthetic ones, before it reads a record.
        """
        trainable = self.trainable()
        asked = dict.fromkeys([*Routes.of(self.model).pending(self.model, trainable), *names])
        if not asked:
            return False
        some = few(piece, 3)
        return learn(self.model, trainable, asked, lambda: self.losses(some))

    def try_routes(self, piece: Microbatch, key: int) -> None:
        """Find out, once for a model, how gradients are got, by passes over two and over three rows.

        What has as many rows as there are examples, by chance, as a table of 16 positions beside 16 examples, would
        pass for theirs. It cannot have two rows and three.

        Args: as for `learn`; `key` is that of the draws.
        Raises:
          ModelError: there is no way for a parameter.
        """
        if not Routes.of(self.model).tried:
            for count in (2, 3):
                routed_norms(self, few(piece, count), key)
            routes = Routes.of(self.model)
            routes.tried = True
            routes.keep(self.model)

    def learn_of(self, piece: Microbatch, error: Unrouted) -> bool:
        """Find out how the gradients that were not found are got; return whether any was, args as for `learn`.

        Raises:
          ModelError: there is no way; what it says is what can be done.
        """
        try:
            return self.learn(piece, error.names)
        except ModelError as unknown:
            raise (unknown if isinstance(error, Unreached) else error) from None


def few(piece: Microbatch, count: int) -> Microbatch:
    """Return `count` rows of a microbatch, from its first to its last; one more than once if it has fewer."""
    rows = torch.linspace(0, len(piece.record_ids) - 1, count).long()
    return Microbatch(take_rows(piece.data, rows), piece.record_ids[rows], count)


class Passes:
    """Runs forward and backward passes that record a microbatch's per-example gradients on a tape."""

    def __init__(self, objective: Objective, run: StepContext, tape: GradientTape):
        self._objective, self._run, self._tape = objective, run, tape
        self._key = draws_key(run.key)

    def over(self, piece: Microbatch) -> Tensor:
        """Differentiate the sum of the losses of the rows that count; return the losses of all rows, `(B,)`."""
        model, size = self._objective.model, len(piece.record_ids)
        with seeded(self._key), Leaves.placed(model, self._tape.leaves, size) as leaves:
            losses = self._objective.drawing.by_record(lambda: self._forward(piece), self._key, piece.record_ids)
            counting = losses if piece.num_examples == len(losses) else losses[: piece.num_examples]
            self._backward(counting.sum())
            for parameter, gradients in leaves.gradients():
                self._tape.add(parameter, Materialised(gradients))
        return losses

    def over_pieces(self, pieces: Iterable[Microbatch], *, leaves_out: bool) -> Iterator[Microbatch | None]:
        """Differentiate one microbatch after the other, and yield each while the tape holds its gradients.

        Args:
          pieces: the microbatches.
          leaves_out: True: leave out the rows on which model or loss raise, as `over_sound_rows`, and yield what it
            returns. False: exceptions propagate.
        """
        for piece in pieces:
            if leaves_out:
                yield self.over_sound_rows(piece)
            else:
                self.over(piece)
                yield piece

    def over_sound_rows(self, piece: Microbatch) -> Microbatch | None:
        """Differentiate the losses of the rows on which model and loss do not raise.

        Whether a row is left out depends on that row alone: it is tried in a microbatch of its copies.

        Returns: the microbatch of the remaining rows, padded to the same size; None if no row remains.
        Raises:
          ModelError: model or loss raise on rows together that they run on alone.
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
        self._tape.rewind(len(piece.record_ids))
        self._run.phase = "forward"
        return self._objective.losses(piece)

    def _backward(self, total: Tensor) -> None:
        position = TorchPosition()
        self._run.phase = "backward"
        (total + self._tape.anchor).backward()  # the anchor is zero
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
    """Return a microbatch of the same size whose rows are all copies of one row; one of them counts."""
    rows = torch.full((len(piece.record_ids),), row)
    return Microbatch(take_rows(piece.data, rows), piece.record_ids[rows], 1)


def caused_by_records(error: Exception) -> bool:
    """Return whether an exception may be due to the records: it is neither out-of-memory nor an error of dpquant."""
    return not isinstance(error, DPQuantError) and not out_of_memory(error)


def out_of_memory(error: Exception) -> bool:
    """Return whether an exception says that the memory of the machine or of its GPU does not suffice."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


@dataclasses.dataclass(frozen=True, eq=False)
class RowGradients:
    """Losses, unclipped gradients and quantized operands of the rows of a microbatch.

    Attributes:
      losses: `(B,)`.
      parts: {parameter name: per-example gradients, not clipped}; parameters that got no gradient are missing.
      operands: codes and scales of the quantized layers' operands, in the order of the calls.
    """

    losses: Tensor
    parts: dict[str, Contribution]
    operands: list[QTensor]

    def row(self, row: int) -> "RowGradients":
        """Return losses, gradients and operands of one row."""
        rows = torch.full((1,), row, device=self.losses.device)
        parts = {name: part.take(rows) for name, part in self.parts.items()}
        return RowGradients(self.losses[rows], parts, [operand.take(rows) for operand in self.operands])

    def same_bits(self, other: "RowGradients") -> bool:
        """Whether losses and all that the gradients are computed from are finite and equal, bit for bit."""
        pairs = [(self.losses, other.losses)]
        for name in self.parts.keys() | other.parts.keys():
            if name not in self.parts or name not in other.parts:
                return False
            mine, theirs = self.parts[name].tensors(), other.parts[name].tensors()
            if len(mine) != len(theirs):
                return False
            pairs += zip(mine, theirs, strict=True)
        # what is not finite differs from itself by NaN
        return all(one.shape == other.shape and not bool((one - other).any()) for one, other in pairs)

    @ieee_float32()
    def norm(self) -> float:
        """Return the L2 norm of the gradients of all rows and parameters as one vector, rounded up."""
        return sum(float(part.squared_norms().sum()) for part in self.parts.values()) ** 0.5

    @ieee_float32()
    def distance(self, other: "RowGradients") -> float:
        """Return the L2 norm of the difference of all gradients; a missing gradient counts as zero."""
        squares = 0.0
        for name in self.parts.keys() | other.parts.keys():
            pair = [rows.parts[name] for rows in (self, other) if name in rows.parts]
            squares += float((pair[0].squared_distances(pair[1]) if pair[1:] else pair[0].squared_norms()).sum())
        return squares**0.5


def gradients_of_rows(objective: Objective, piece: Microbatch, run: StepContext) -> RowGradients:
    """Compute the per-example gradients of a microbatch in one backward pass, as a step does, without clipping them.

    Args:
      objective: model and loss.
      piece: a microbatch all of whose rows count.
      run: the step, whose key fixes all draws, and whose packed weights are used and kept.
    Raises:
      SettingError, ModelError: as in `clipped_sum`.
    Privacy: per example and not clipped: the result has no sensitivity bound and must not be released.
    """
    tapes = taping(objective.model, objective.trainable(), forming=False, keeping=True)
    with tapes as tape, running(objective.model, dataclasses.replace(run, tape=tape)) as taped:
        losses = Passes(objective, taped, tape).over(piece)
        tape.settle()
        return RowGradients(losses.detach(), tape.contributions(), tape.operands)


def routed_norms(objective: Objective, piece: Microbatch, key: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the rows' losses and {parameter: squared norms}, once routes to gradients that were not found are known.

    Args: as for `gradients_of_rows`; `key` is that of the draws.
    Raises:
      ModelError: there is no such route.
    """
    while True:
        run = StepContext(key=key)
        try:
            found = gradients_of_rows(objective, piece, run)
            squared_norms = {name: part.squared_norms() for name, part in found.parts.items()}
            check_examples_first(squared_norms, len(piece.record_ids))
        except Unrouted as error:
            if not objective.learn_of(piece, error):
                raise
            continue
        # a frozen layer gets no gradient, but its scales and draws are an example's, too
        unrouted = {*(objective.trainable().keys() - found.parts.keys()), *run.elsewhere}
        if not unrouted or not objective.learn(piece, unrouted):
            return found.losses, squared_norms


def losses_of(objective: Objective, piece: Microbatch, run: StepContext) -> Tensor:
    """Compute the losses `(B,)` of a microbatch, with the same draws as `gradients_of_rows` for the same arguments."""
    draws = draws_key(run.key)

    def forward() -> Tensor:
        run.begin(piece.record_ids)
        with running(objective.model, run):
            return objective.losses(piece)

    with torch.no_grad(), seeded(draws):
        return objective.drawing.by_record(forward, draws, piece.record_ids)


def draws_key(key: int) -> int:
    """Return the key of the random numbers that model and loss draw themselves in a step (dropout, for instance)."""
    return derive_key(key, "draws")
