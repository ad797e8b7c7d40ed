# SPDX-License-Identifier: Apache-2.0
"""Does this model, with this loss and this collate function, keep its examples apart? Tried before a record is used.

`refusals.check_trainable` refuses by type. Such a list can be evaded (a batch statistic in a forward method, a
parameter used behind its module's back), so `check_isolation` runs the model on synthetic records a, b, c
(`checks/synthetic.py`, `checks/probe.py`): what it makes of a, that is a's loss, a's gradient and, quantized, a's
codes, may not change when b takes c's place, nor when a takes another place, and the gradient must be what autograd
computes.

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
import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from dpquant.checks.probe import (
    FIXED,
    KEY,
    PLACES_FIXED,
    SMALLEST_LOSS,
    TOLERANCE,
    Blind,
    Probe,
    add_mean,
    blind,
    identical,
    other_mode,
    piece_of,
    shaken,
)
from dpquant.checks.refusals import BY_PLACE, COUPLED, PADDED, NotFinite, explained
from dpquant.checks.synthetic import Specimens
from dpquant.engine.batches import Microbatch
from dpquant.engine.layers import (
    QuantizableLayer,
    count_macs,
    current_precisions,
    quantizable_layers,
    set_policy,
    set_precisions,
)
from dpquant.engine.passes import Objective, gradients_of_rows, losses_of
from dpquant.engine.randomness import Drawing, seeded
from dpquant.engine.tape import check_examples_first, no_gradient
from dpquant.errors import DataError, DPQuantError, ModelError
from dpquant.formats import Precision

_MOST_KINDS = 6  # kinds of values on which a model runs, tried until a check is not blind
_MOST_SHAKES = 5
_BUFFERS = "Expected a forward pass to leave the model's buffers alone"
_FOLLOWS = (
    "A buffer that follows the data is released with the model, without noise. Remove it, or freeze it in evaluation."
)
_COUNTS = (
    "It changes at every pass, whatever the data, so that it tells how many passes were made, which follows how many "
    "records were drawn. Put its module in evaluation mode (spectral_norm stops there), or remove it."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Findings:
    """What the check found out about a model that passed it.

    Attributes:
      objective: the model and its loss, and whether they draw random numbers.
      macs: {quantizable layer: multiply-accumulates of its forward product, for one example}.
      specimens: the synthetic records that it ran on.
    """

    objective: Objective
    macs: dict[str, float]
    specimens: Specimens


def check_isolation(
    objective: Objective, candidates: Iterable[Specimens], *, quantized: Sequence[Precision] = ()
) -> Findings:
    """Run the model on synthetic records, refuse it if its examples are coupled, and count its multiply-accumulates.

    Args:
      objective: a prepared model and its loss. Parameters, modes and precisions and the global random streams are left
        as they were; buffers that the model fills at its first call are filled.
      candidates: synthetic records of several kinds; those that the model can run on are used.
      quantized: the precisions in which all layers are tried besides full precision.
    Raises:
      ModelError: the model runs on none of the candidates; a parameter has no per-example gradient, or one that is not
        what autograd computes; one example's gradient or codes depend on another; a buffer or other state follows the
        data; or the check was blind: a coupling that it planted itself had no effect.
      DataError: the collate function does not give one row for each record, or mixes records.
    Privacy: reads no data.
    """
    model = objective.model
    modes = {module: module.training for module in model.modules()}
    precisions = current_precisions(model)
    try:
        set_policy(model, ())
        unclear: list[Specimens] = []
        found, unseen = None, None
        for specimens in itertools.islice(_usable(objective, candidates), _MOST_KINDS):
            watched = dataclasses.replace(objective, drawing=Drawing(by_operator=True))
            macs = _count_macs(objective, specimens)
            try:
                _check(watched, specimens, planted=True)
            except Blind as problem:
                unseen = problem
                unclear.append(specimens)
            else:
                found = Findings(objective=watched, macs=macs, specimens=specimens)
                break
        if found is None:
            raise ModelError(str(unseen))
        others = [*unclear, *found.specimens.variations()]
        if quantized and quantizable_layers(model):
            with shaken(model, torch.float32, 0):
                for one in quantized:
                    set_precisions(model, dict.fromkeys(quantizable_layers(model), one))
                    _check_codes(found.objective, found.specimens)
                    for specimens in others:
                        _check_quantized_losses(found.objective, specimens)
        else:
            for specimens in others:
                _check_kind(found.objective, specimens)
        return found
    finally:
        set_precisions(model, precisions)
        for module, training in modes.items():
            module.training = training


def _usable(objective: Objective, candidates: Iterable[Specimens]) -> Iterator[Specimens]:
    """The candidates on which the model runs with finite losses and gradients; at least one, or an error."""
    first, any_usable = None, False
    for specimens in candidates:
        try:
            _run(objective, specimens)
        except DataError:  # the collate function's, or of the wrong number of rows
            raise
        except Exception as error:  # whatever the user's code raises on values that are not of its domain
            first = first or explained(error)
            continue
        any_usable = True
        yield specimens
    if not any_usable:
        assert first is not None
        raise first


def _run(objective: Objective, specimens: Specimens) -> None:
    """One pass over the three records. Raises whatever the user's code raises, and NotFinite."""
    piece = piece_of(specimens, (0, 1, 2), torch.float32)
    found = gradients_of_rows(dataclasses.replace(objective, drawing=objective.drawing.unknown()), piece, key=KEY)
    squared_norms = {name: part.squared_norms() for name, part in found.parts.items()}
    check_examples_first(squared_norms, 3)
    if not all(bool(values.isfinite().all()) for values in (found.losses, *squared_norms.values())):
        raise NotFinite


def _check(objective: Objective, specimens: Specimens, *, planted: bool) -> None:
    """Make all comparisons, in float64 if the model runs in it."""
    trainable = set(objective.trainable())
    moved: set[str] = set()
    reached: set[str] = set()
    dtype = torch.float64
    for shake in range(_MOST_SHAKES):
        try:
            probe = _compare(objective, specimens, dtype, shake, planted)
        except DPQuantError:
            raise
        except Exception:  # a type that the model fixes by itself
            dtype = torch.float32
            try:
                probe = _compare(objective, specimens, dtype, shake, planted)
            except DPQuantError:
                raise
            except Exception as error:
                raise explained(error) from error
        moved |= probe.moved
        reached |= probe.reached
        if moved >= trainable or not planted:
            return
    if missing := sorted(trainable - reached):
        raise no_gradient(missing[0])
    raise Blind(
        f"Expected made-up records that give every trainable parameter a gradient; {min(trainable - moved)} got zero. "
        "So the check could not see whether examples are kept apart. Freeze the parameter if it has no effect, or give "
        "example= a few public or synthetic records."
    )


def _compare(objective: Objective, specimens: Specimens, dtype: torch.dtype, shake: int, planted: bool) -> Probe:
    """The comparisons of one kind of records and one shake; the first ones that pass are planted against."""
    model = objective.model
    with shaken(model, dtype, shake):
        before = buffers_of(model)
        probe = Probe(objective, specimens, dtype)
        if planted:
            probe.check_collation()
        probe.compare_company()
        if shake == 0:
            probe.compare_in_the_other_mode()
        if planted and shake == 0:
            probe.compare_further()
            probe.plant()
        if changed := changed_buffer(model, before):
            raise ModelError(f"{_BUFFERS}; got a change of {changed}. {_FOLLOWS}")
        return probe


def _check_kind(objective: Objective, specimens: Specimens) -> None:
    """Compare the results of another kind of values in full precision, if the model runs on it."""
    try:
        _run(objective, specimens)
    except Exception:  # outside of the data's domain
        return
    _check(objective, specimens, planted=False)


def _check_codes(objective: Objective, specimens: Specimens) -> None:
    """Compare rows' codes, scales and losses in several companies, bit for bit: a batch scale shows, and padding."""
    if specimens.padded:
        raise ModelError(PADDED)

    def results(order: Sequence[int]) -> list[Tensor]:
        found = gradients_of_rows(objective, piece_of(specimens, order, torch.float32), key=KEY)
        return [found.losses, *(part for operand in found.operands for part in (operand.codes, operand.scale))]

    def of_row(found: list[Tensor], row: int) -> list[Tensor]:
        return [values[row] for values in found]

    found = [results(order) for order in FIXED]
    for (company, row), (other, _) in PLACES_FIXED:
        here, there = of_row(found[company], row), of_row(found[other], row)
        if [values.shape for values in here] != [values.shape for values in there]:
            raise ModelError(PADDED)
        if not all(map(identical, here, there)):
            raise ModelError(COUPLED)
    first = next(module for module in objective.model.modules() if isinstance(module, QuantizableLayer))
    handle = first.register_forward_hook(add_mean)
    try:
        one, other = _losses_in(FIXED[::2], objective, specimens)
        if identical(one[0], other[0]) and all(map(identical, *(of_row(results(order), 0) for order in FIXED[::2]))):
            raise blind("the codes of quantized layers")
    finally:
        handle.remove()


def _check_quantized_losses(objective: Objective, specimens: Specimens) -> None:
    """Compare the losses of another kind of values bit for bit, in both modes, if the model runs on it."""
    for mode in (contextlib.nullcontext(), other_mode(objective.model)):
        try:
            with mode:
                found = _losses_in(FIXED, objective, specimens)
        except Exception:  # outside of the data's domain
            return
        if not all(bool(losses.isfinite().all()) for losses in found):
            return
        if specimens.padded:
            raise ModelError(PADDED)
        for (company, row), (other, _) in PLACES_FIXED:
            if not identical(found[company][row], found[other][row]):
                raise ModelError(COUPLED)


def _losses_in(companies: Iterable[Sequence[int]], objective: Objective, specimens: Specimens) -> list[Tensor]:
    pieces = (piece_of(specimens, order, torch.float32) for order in companies)
    return [losses_of(objective, piece, key=KEY) for piece in pieces]


def check_at_size(found: Findings, size: int) -> None:
    """Other company and another place in a microbatch of the run's own size, by losses, as the model runs now.

    Raises:
      ModelError: a's loss depends on the others or on its place, or the model does not run on so many examples.
    Privacy: reads no data.
    """

    def loss(other: int, place: int) -> float:
        order = [0 if row == place else other for row in range(size)]
        try:
            piece = Microbatch(found.specimens.batch(order), torch.tensor(order), size)
            return float(losses_of(found.objective, piece, key=KEY)[place])
        except DPQuantError:
            raise
        except Exception as error:
            raise ModelError(
                f"Expected model and loss_fn to run on any number of examples, as on {size}, which a backward pass "
                f"takes here; got a {type(error).__name__}: {error}. Mend them, or give a microbatch_size that fits."
            ) from error

    quantized = any(layer.quantized for layer in quantizable_layers(found.objective.model).values())
    first, other = loss(1, 0), loss(2, 0 if quantized else size - 1)  # elsewhere, a last bit can become another code
    if not abs(other - first) <= TOLERANCE * max(abs(first), SMALLEST_LOSS):
        raise ModelError(BY_PLACE if found.objective.drawing.seen else COUPLED)


def keeps_apart(objective: Objective, piece: Microbatch, elsewhere: Microbatch, *, key: int) -> bool:
    """Whether the first row comes out alike in two microbatches of one size: loss, gradient, and codes bit for bit.

    Privacy: for a model that keeps examples apart the answer is always yes, so that it says nothing about the records.
    """
    one, other = (gradients_of_rows(objective, batch, key=key).row(0) for batch in (piece, elsewhere))
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
    """One forward pass, counting; and the check that it leaves the buffers alone."""

    def forward(order: Sequence[int]) -> None:
        with torch.no_grad(), seeded(KEY):
            objective.loss_fn(model, specimens.batch(order))

    model = objective.model
    before = buffers_of(model)
    macs = count_macs(model, lambda: forward((0, 0, 0)))
    if changed := changed_buffer(model, before):
        restore_buffers(model, before)
        forward((1, 1, 1))
        one = buffers_of(model)
        restore_buffers(model, before)
        forward((2, 2, 2))
        follows = changed_buffer(model, one) is not None
        raise ModelError(f"{_BUFFERS}; got a change of {changed}. {_FOLLOWS if follows else _COUNTS}")
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
