# SPDX-License-Identifier: Apache-2.0
"""Does this model, with this loss and this collate function, keep its examples apart? Tried before a record is used.

`refusals.check_trainable` refuses by type. Such a list can be evaded (a batch statistic in a forward method, a
parameter used behind its module's back), so `check_isolation` runs the model on synthetic records a, b, c
(`synthetic.py`, `probe.py`): what it makes of a, that is a's loss, a's gradient and, quantized, a's codes, may not
change when b takes c's place, nor when a takes another place, and the gradient must be what autograd computes.

A check that cannot see is worse than none. No comparison passes on NaN. Parameters are shaken a little, so that what
begins at zero (a gate, an adapter) lets gradients through, and every trainable parameter has to be moved. And couplings
are planted into this very model and batch, in every leaf of the batch that it uses, in activations and in the loss:
each has to be seen, else the check says that it could not see.

A gradient jumps where round-off carries a ReLU's input across zero, or another pixel to the top of a maximum: with maps
of 64x64 in half of the ResNets that were tried. So comparisons are made in float64, where that does not happen, unless
the model cannot run in it.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dpquant.batches import Microbatch
from dpquant.clip import (
    PerExampleLoss,
    check_examples_first,
    contributions_by_parameter,
    gradient_of_row,
    losses_of,
    no_gradient,
)
from dpquant.errors import DataError, DPQuantError, ModelError
from dpquant.formats import Precision
from dpquant.layers import QuantizableLayer, current_precisions, quantizable_layers, set_policy, set_precisions
from dpquant.probe import (
    KEY,
    SMALLEST_LOSS,
    TOLERANCE,
    Blind,
    Probe,
    add_mean,
    blind,
    identical,
    norm_of,
    piece_of,
    shaken,
)
from dpquant.randomness import Drawing, seeded
from dpquant.refusals import BY_PLACE, COUPLED, PADDED, NotFinite, explained
from dpquant.synthetic import Specimens

_MOST_KINDS = 6  # kinds of values on which a model runs, tried until a check is not blind
_MOST_SHAKES = 5


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
    quantized: Sequence[Precision] = (),
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
        unclear: list[Specimens] = []
        found, unseen = None, None
        for specimens in itertools.islice(_usable(model, loss_fn, candidates), _MOST_KINDS):
            drawing = Drawing(by_operator=True)
            macs = _count_macs(model, loss_fn, specimens)
            try:
                _check(model, loss_fn, specimens, drawing, planted=True)
            except Blind as problem:
                unseen = problem
                unclear.append(specimens)
            else:
                found = Findings(macs=macs, specimens=specimens, drawing=drawing)
                break
        if found is None:
            raise ModelError(str(unseen))
        for one in quantized:
            _check_codes(model, loss_fn, found.specimens, found.drawing, one, planted=True)
        for specimens in (*unclear, *found.specimens.variations()):
            _check_kind(model, loss_fn, specimens, found.drawing, quantized)
        return found
    finally:
        set_precisions(model, precisions)
        for module, training in modes.items():
            module.training = training


def _usable(model: nn.Module, loss_fn: PerExampleLoss, candidates: Iterable[Specimens]) -> Iterator[Specimens]:
    """The candidates on which the model runs with finite losses and gradients; at least one, or an error."""
    first, any_usable = None, False
    for specimens in candidates:
        try:
            _run(model, loss_fn, specimens)
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


def _run(model: nn.Module, loss_fn: PerExampleLoss, specimens: Specimens) -> None:
    """One pass over the three records. Raises whatever the user's code raises, and NotFinite."""
    piece = Microbatch(specimens.batch((0, 1, 2)), torch.arange(3), 3)
    parts = contributions_by_parameter(model, loss_fn, piece, key=KEY)
    squared_norms = {name: part.squared_norms() for name, part in parts.items()}
    check_examples_first(squared_norms, len(piece.record_ids))
    losses = losses_of(model, loss_fn, piece, key=KEY)
    if not all(bool(values.isfinite().all()) for values in (losses, *squared_norms.values())):
        raise NotFinite


def _check(model: nn.Module, loss_fn: PerExampleLoss, specimens: Specimens, drawing: Drawing, *, planted: bool) -> None:
    """Make all comparisons, in float64 if the model runs in it."""
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    moved: set[str] = set()
    reached: set[str] = set()
    dtype = torch.float64
    for shake in range(_MOST_SHAKES):
        try:
            probe = _compare(model, loss_fn, specimens, drawing, dtype, shake, planted)
        except DPQuantError:
            raise
        except Exception:  # a type that the model fixes by itself
            dtype = torch.float32
            try:
                probe = _compare(model, loss_fn, specimens, drawing, dtype, shake, planted)
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


def _compare(
    model: nn.Module,
    loss_fn: PerExampleLoss,
    specimens: Specimens,
    drawing: Drawing,
    dtype: torch.dtype,
    shake: int,
    planted: bool,
) -> Probe:
    """The comparisons of one kind of records and one shake; the first ones that pass are planted against."""
    with shaken(model, dtype, shake):
        probe = Probe(model, loss_fn, specimens, drawing, dtype)
        if planted:
            probe.check_collation()
        probe.compare_company()
        if planted:
            probe.compare_places()
        if planted and shake == 0:
            probe.plant()
        return probe


def _check_kind(
    model: nn.Module, loss_fn: PerExampleLoss, specimens: Specimens, drawing: Drawing, quantized: Sequence[Precision]
) -> None:
    """Compare a in two companies of another kind of values, if the model runs on it: by codes, or else by gradients."""
    try:
        _run(model, loss_fn, specimens)
    except Exception:  # outside of the data's domain
        return
    for one in quantized:
        _check_codes(model, loss_fn, specimens, drawing, one, planted=False)
    if not quantized:
        _check(model, loss_fn, specimens, drawing, planted=False)


def _check_codes(
    model: nn.Module,
    loss_fn: PerExampleLoss,
    specimens: Specimens,
    drawing: Drawing,
    quantized: Precision,
    *,
    planted: bool,
) -> None:
    """Compare a row's codes, scales and loss in two companies, bit for bit: a batch scale shows, and padding."""
    if not quantizable_layers(model):
        return
    if specimens.padded:
        raise ModelError(PADDED)

    def results(one: int, other: int) -> list[Tensor]:
        piece = piece_of(specimens, (one, other, other), torch.float32)
        row = gradient_of_row(model, loss_fn, piece, 0, key=KEY, drawing=drawing)
        return [*row.operands, row.losses[0]]

    with shaken(model, torch.float32, 0):
        set_precisions(model, dict.fromkeys(quantizable_layers(model), quantized))
        # what the record with the largest values decides leaves that one alone: others are followed too
        for one, other, another in ((0, 1, 2), (1, 2, 0), (2, 0, 1))[: 3 if planted else 2]:
            here, there = results(one, other), results(one, another)
            if [t.shape for t in here] != [t.shape for t in there]:
                raise ModelError(PADDED)
            if not all(map(identical, here, there)):
                raise ModelError(COUPLED)
        if not planted:
            return
        first = next(module for module in model.modules() if isinstance(module, QuantizableLayer))
        handle = first.register_forward_hook(add_mean)
        try:
            if all(map(identical, results(0, 1), results(0, 2))):
                raise blind("the codes of quantized layers")
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
        return float(losses_of(model, loss_fn, piece, key=KEY, drawing=found.drawing)[place])

    first = loss(1, 0)
    scale = TOLERANCE * max(abs(first), SMALLEST_LOSS)
    if not abs(loss(2, 0) - first) <= scale:
        raise ModelError(BY_PLACE if found.drawing.seen else COUPLED)
    quantized = any(layer.quantized for layer in quantizable_layers(model).values())
    if not quantized and not abs(loss(1, size - 1) - first) <= scale:  # a last bit can become another code
        raise ModelError(BY_PLACE if found.drawing.seen else COUPLED)


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
    norm = norm_of(one.grads.values())
    gap = norm_of(one.grads[name] - other.grads[name] for name in one.grads)
    if not (gap <= TOLERANCE * norm or not norm < float("inf")):
        return False
    same_codes = len(one.operands) == len(other.operands) and all(map(identical, one.operands, other.operands))
    return same_codes and abs(float(losses[0] - losses[1])) <= TOLERANCE * max(abs(float(losses[0])), SMALLEST_LOSS)


def _count_macs(model: nn.Module, loss_fn: PerExampleLoss, specimens: Specimens) -> dict[str, float]:
    """One forward pass, counting; and the check that it leaves the buffers alone."""
    layers = quantizable_layers(model)
    macs = dict.fromkeys(layers, 0.0)

    def counter(name: str) -> Callable[..., None]:
        def count(module: nn.Module, inputs: Any, output: Tensor) -> None:
            macs[name] += output[0].numel() * layers[name].weight[0].numel()

        return count

    def forward(order: Sequence[int]) -> None:
        with torch.no_grad(), seeded(KEY):
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
                "follows how many records were drawn. Put its module in evaluation mode (spectral_norm stops there), "
                "or remove it."
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
