# SPDX-License-Identifier: Apache-2.0
"""Checks that a model, with its loss and collate function, keeps examples apart, before a private record is read.

`refusals.check_trainable` refuses known types of modules. That does not cover a batch statistic in a forward method, or
a parameter used outside of its module. So `check_isolation` runs the model on synthetic records a, b, c
(`checks/synthetic.py`, `checks/probe.py`) and compares the loss of a, its gradient and, quantized, its codes. They must
not change when c replaces b in the batch, nor when a is in another row, and the gradient must be autograd's.

Each check is shown to be able to fail. No comparison passes on NaN. Parameters are perturbed a little, so that those
that start at zero (a gate, an adapter) let gradients through, and every trainable parameter must get a nonzero
gradient. Couplings are planted in this model and batch: in every leaf of the batch that is used, in activations and in
the loss. If one of them is not seen, everything is compared once more with another number where model or loss multiply
by a constant zero (`m(x) * 0.0`, of whoever wants to see the noise alone). If it is not seen then either, the check
raises an error, because it could not have seen the model's own.

Results are first compared bit for bit in float32, in which a run computes. Where bits differ, float64 decides, if the
model runs in it: in float32, round-off can carry a ReLU's input across zero, or make another pixel the maximum of a
pooling window, and the gradient jumps: with maps of 64x64 that happened in half of the ResNets that were tried.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from dpquant.checks.codes import check_quantized
from dpquant.checks.planting import Blind, without_zero_factors
from dpquant.checks.probe import (
    KEY,
    SMALLEST_LOSS,
    TOLERANCE,
    Probe,
    buffers_of,
    changed_buffer,
    identical,
    left_as_it_was,
    piece_of,
    restore_buffers,
)
from dpquant.checks.refusals import BUFFERS, BY_PLACE, COUNTS, COUPLED, FOLLOWS, NotFinite, explained
from dpquant.checks.synthetic import Specimens
from dpquant.engine.batches import Microbatch, take_rows
from dpquant.engine.context import StepContext
from dpquant.engine.layers import (
    count_macs,
    quantizable_layers,
    set_policy,
)
from dpquant.engine.passes import Objective, gradients_of_rows, losses_of, out_of_memory, routed_norms
from dpquant.engine.perturbation import shaken
from dpquant.engine.randomness import Drawing, seeded
from dpquant.engine.unrouted import Unreached
from dpquant.errors import DataError, DPQuantError, ModelError
from dpquant.formats import Precision

_MOST_KINDS = 6  # kinds of values on which a model runs: tried until the check sees what it plants
_MOST_SHAKES = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Findings:
    """Facts about a model that passed the check.

    Attributes:
      objective: the model and its loss, and whether they draw random numbers.
      compared: what was compared: the same, but without constant factors of zero where these hid what was planted.
      macs: {quantizable layer: multiply-accumulates of its forward product, for one example}.
      specimens: the synthetic records that the model ran on.
      unclear: others that it ran on, with which planted couplings were not seen.
    """

    objective: Objective
    compared: Objective
    macs: dict[str, float]
    specimens: Specimens
    unclear: Sequence[Specimens] = ()

    def others(self) -> Iterator[Specimens]:
        """Yield further kinds of values on which results are compared."""
        yield from self.unclear
        yield from self.specimens.variations()


def check_isolation(
    objective: Objective,
    candidates: Iterable[Specimens],
    *,
    quantized: Sequence[Precision] = (),
    probe: type[Probe] = Probe,
) -> Findings:
    """Run the model on synthetic records, refuse it if its examples are coupled, and count its multiply-accumulates.

    Args:
      objective: a prepared model and its loss. Parameters, modes and precisions and the global random streams are left
        as they were; buffers that the model fills at its first call are filled.
      candidates: synthetic records of several kinds; those that the model can run on are used.
      quantized: precisions in which all layers are also checked, besides full precision.
      probe: makes the comparisons.
    Raises:
      ModelError: the model runs on none of the candidates; a parameter has no per-example gradient, or one that is not
        what autograd computes; one example's gradient or codes depend on another; a buffer or other state follows the
        data; or a coupling that the check planted itself was not seen.
      DataError: the collate function does not give one row for each record, or mixes records.
    Privacy: reads no data.
    """
    with left_as_it_was(objective.model):
        set_policy(objective.model, ())
        unclear: list[Specimens] = []
        found, unseen = None, None
        for compared, specimens in _attempts(objective, itertools.islice(_usable(objective, candidates), _MOST_KINDS)):
            macs = _count_macs(objective, specimens)
            drawing = Drawing(by_operator=True)
            watched = dataclasses.replace(compared, drawing=drawing)
            try:
                _check(watched, specimens, probe, planted=True)
            except Blind as problem:
                if compared is objective:
                    unseen = problem
                    unclear.append(specimens)
            else:
                honest = dataclasses.replace(objective, drawing=drawing)
                found = Findings(objective=honest, compared=watched, macs=macs, specimens=specimens, unclear=unclear)
                break
        if found is None:
            raise ModelError(str(unseen))
        if quantized and quantizable_layers(objective.model):
            check_quantized(found.compared, found.specimens, found.others(), quantized, share=probe.share)
        else:
            for specimens in found.others():
                _check_kind(found.compared, specimens, probe)
        return found


def _usable(objective: Objective, candidates: Iterable[Specimens]) -> Iterator[Specimens]:
    """Yield the candidates on which the model runs with finite losses and gradients; raise an error if none."""
    first, any_usable = None, False
    for specimens in candidates:
        try:
            _run(objective, specimens)
        except DataError:  # the collate function's, or of the wrong number of rows
            raise
        except Exception as error:  # the user's code may raise anything on values outside of its domain
            first = first or explained(error)
            continue
        any_usable = True
        yield specimens
    if not any_usable:
        assert first is not None
        raise first


def _attempts(objective: Objective, kinds: Iterable[Specimens]) -> Iterator[tuple[Objective, Specimens]]:
    """Yield each kind with the objective, then each with the objective without constant factors of zero."""
    tried: list[Specimens] = []
    for specimens in kinds:
        tried.append(specimens)
        yield objective, specimens
    for specimens in tried:
        yield without_zero_factors(objective), specimens


def _run(objective: Objective, specimens: Specimens) -> None:
    """Run one pass over the three records; raises what the user's code raises, and NotFinite."""
    piece = piece_of(specimens, (0, 1, 2), torch.float32)
    unwatched = dataclasses.replace(objective, drawing=objective.drawing.unknown())
    unwatched.learn(piece)
    losses, squared_norms = routed_norms(unwatched, piece, KEY)
    if not all(bool(values.isfinite().all()) for values in (losses, *squared_norms.values())):
        raise NotFinite


def _check(objective: Objective, specimens: Specimens, kind: type[Probe], *, planted: bool) -> None:
    """Make all comparisons, in float64 if the model runs in it; perturb until every parameter gets a gradient."""
    trainable = set(objective.trainable())
    moved: set[str] = set()
    reached: set[str] = set()
    dtype = torch.float64
    for shake in range(_MOST_SHAKES):
        try:
            probe = _compare(objective, specimens, kind, dtype, shake, planted)
        except DPQuantError:
            raise
        except Exception:  # the model casts to a type of its own
            dtype = torch.float32
            try:
                probe = _compare(objective, specimens, kind, dtype, shake, planted)
            except DPQuantError:
                raise
            except Exception as error:
                raise explained(error) from error
        moved |= probe.moved
        reached |= probe.reached
        if moved >= trainable or not planted:
            return
    if missing := sorted(trainable - reached):
        raise Unreached(missing)
    raise Blind(
        f"Expected synthetic records that give every trainable parameter a gradient; {min(trainable - moved)} got "
        "zero. So the check could not see whether examples are kept apart. Freeze the parameter if it has no effect, "
        "or give example= a few public or synthetic records."
    )


def _compare(
    objective: Objective, specimens: Specimens, kind: type[Probe], dtype: torch.dtype, shake: int, planted: bool
) -> Probe:
    """Make the comparisons on one kind of records for one perturbation; couplings are planted at the first only."""
    with shaken(objective.model, shake, kind.share):
        probe = kind(objective, specimens, dtype)
        if planted:
            probe.check_collation()
        if planted and shake == 0:
            probe.remember()
        probe.compare_batchmates()
        if shake == 0:
            probe.compare_in_the_other_mode()
        if planted and shake == 0:
            probe.compare_further()
            probe.plant()
        probe.compare_buffers()
        return probe


def _check_kind(objective: Objective, specimens: Specimens, kind: type[Probe]) -> None:
    """Compare the results of another kind of values in full precision, if the model runs on it."""
    try:
        _run(objective, specimens)
    except Exception:  # outside of the data's domain
        return
    _check(objective, specimens, kind, planted=False)


def check_at_size(found: Findings, size: int) -> None:
    """Compare losses in a microbatch of the run's own size with those among other batchmates and in other rows.

    In full precision one such microbatch is enough, if each row has the loss that its record has in a batch of three.
    If not, the number of examples may be the cause: all copies of a record in this microbatch and in two more of
    this size are compared. Quantized, a stays in one row, because round-off in the last bit can change a code.

    Args:
      found: about the model, which is checked in its current precisions.
      size: examples of a microbatch.
    Raises:
      ModelError: a loss depends on the others or on its row, or the model does not run on so many examples. What says
        that memory does not suffice is raised unchanged.
    Privacy: reads no data.
    """

    def losses(order: Sequence[int]) -> Tensor:
        try:
            piece = Microbatch(found.specimens.batch(order), torch.tensor(order), len(order))
            return losses_of(found.compared, piece, StepContext(key=KEY))
        except DPQuantError:
            raise
        except Exception as error:
            if out_of_memory(error):
                raise
            raise ModelError(
                f"Expected model and loss_fn to run on any number of examples, as on {len(order)}, which a backward "
                f"pass takes here; got a {type(error).__name__}: {error}. Mend them, or give a microbatch_size that "
                "fits."
            ) from error

    def close(these: Tensor, those: Tensor) -> bool:
        return bool(((those - these).abs() <= TOLERANCE * these.abs().clamp(min=SMALLEST_LOSS)).all())

    if any(layer.quantized for layer in quantizable_layers(found.objective.model).values()):
        of_a = [losses([0, *[other] * (size - 1)])[0] for other in (1, 2)]
        equal = close(*of_a)
    else:
        mixed = [(0, 1, 2, 2, 1, 0)[row % 6] for row in range(size)]
        many = losses(mixed)
        if close(take_rows(losses((0, 1, 2)), torch.tensor(mixed)), many):
            return
        among = [[*[other] * (size - 1), 0] for other in (1, 2)]
        numbers, values = torch.tensor([*mixed, *among[0], *among[1]]), torch.cat([many, *map(losses, among)]).cpu()
        copies = [values[numbers == number] for number in range(3)]
        equal = all(close(of_one[:1], of_one) for of_one in copies)
    if not equal:
        raise ModelError(BY_PLACE if found.objective.drawing.seen else COUPLED)


def keeps_apart(objective: Objective, piece: Microbatch, elsewhere: Microbatch, *, key: int) -> bool:
    """Whether the first row of two microbatches of one size has equal loss and gradient, and codes equal bit for bit.

    Args:
      objective: the model and its loss.
      piece: a record and its batchmates.
      elsewhere: the same record in the first row, among others.
      key: of the step's random draws.
    Privacy: always True for a model that keeps examples apart, so the answer depends on no record.
    """
    one, other = (gradients_of_rows(objective, batch, StepContext(key=key)).row(0) for batch in (piece, elsewhere))
    losses = float(one.losses[0]), float(other.losses[0])
    if not all(map(math.isfinite, losses)):
        return not any(map(math.isfinite, losses))
    norm = one.norm()
    if not (one.distance(other) <= TOLERANCE * norm or not norm < math.inf):
        return False
    if len(one.operands) != len(other.operands) or not all(
        identical(mine.codes, theirs.codes) and identical(mine.scale, theirs.scale)
        for mine, theirs in zip(one.operands, other.operands, strict=True)
    ):
        return False
    return abs(losses[0] - losses[1]) <= TOLERANCE * max(abs(losses[0]), SMALLEST_LOSS)


def _count_macs(objective: Objective, specimens: Specimens) -> dict[str, float]:
    """Count multiply-accumulates in one forward pass; raise ModelError if it changes a buffer."""

    def forward(order: Sequence[int]) -> None:
        with torch.no_grad(), seeded(KEY):
            objective.loss_fn(model, specimens.batch(order))

    model = objective.model
    before = buffers_of(model)
    macs = count_macs(model, lambda: forward((0, 0, 0)), 3)
    if changed := changed_buffer(model, before):
        restore_buffers(model, before)
        forward((1, 1, 1))
        one = buffers_of(model)
        restore_buffers(model, before)
        forward((2, 2, 2))
        follows = changed_buffer(model, one) is not None
        raise ModelError(f"{BUFFERS}; got a change of {changed}. {FOLLOWS if follows else COUNTS}")
    return macs
