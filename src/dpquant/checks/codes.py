# SPDX-License-Identifier: Apache-2.0
"""Compares codes, scales and losses of a model whose layers all run quantized, among several batchmates, bit for bit.

Round-off in the last bit can change a code, so a record stays in its row, and nothing is compared up to a tolerance.
"""

import contextlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from dpquant.checks.planting import add_mean, blind
from dpquant.checks.probe import (
    FIXED,
    KEY,
    PLACES_FIXED,
    Probe,
    identical,
    left_as_it_was,
    other_mode,
    piece_of,
)
from dpquant.checks.refusals import COUPLED, PADDED
from dpquant.checks.step import TrialStep
from dpquant.checks.synthetic import Specimens
from dpquant.engine.layers import quantizable_layers, set_precisions
from dpquant.engine.passes import Objective, gradients_of_rows, losses_of
from dpquant.engine.perturbation import shaken
from dpquant.engine.quantizable import QuantizableLayer
from dpquant.errors import ModelError
from dpquant.formats import Precision


def check_quantized(
    objective: Objective,
    specimens: Specimens,
    others: Iterable[Specimens],
    quantized: Sequence[Precision],
    *,
    share: float = Probe.share,
) -> None:
    """Refuse a model in which one example's codes or losses depend on another, with all layers quantized.

    Args:
      objective: a prepared model that has passed the check in full precision, and its loss. It is left as it was.
      specimens: synthetic records that it runs on.
      others: further kinds of values, on which losses are compared.
      quantized: precisions in which it is checked.
      share: by which parameters are perturbed.
    Raises:
      ModelError: codes, scales or losses differ among batchmates.
    Privacy: reads no data.
    """
    model, kinds = objective.model, list(others)
    with left_as_it_was(model), shaken(model, 0, share):
        for one in quantized:
            set_precisions(model, dict.fromkeys(quantizable_layers(model), one))
            step = TrialStep(key=KEY)
            _check_codes(objective, specimens, step)
            for other in kinds:
                _check_quantized_losses(objective, other, step)


def _check_codes(objective: Objective, specimens: Specimens, step: TrialStep) -> None:
    """Compare rows' codes, scales and losses among several batchmates, bit for bit: sees batch scales and padding."""
    if specimens.padded:
        raise ModelError(PADDED)

    def results(order: Sequence[int]) -> list[Tensor]:
        found = gradients_of_rows(objective, piece_of(specimens, order, torch.float32), step)
        return [found.losses, *(part for operand in found.operands for part in (operand.codes, operand.scale))]

    def of_row(found: list[Tensor], row: int) -> list[Tensor]:
        return [values[row] for values in found]

    found = [results(order) for order in FIXED]
    for (one, row), (other, _) in PLACES_FIXED:
        here, there = of_row(found[one], row), of_row(found[other], row)
        if [values.shape for values in here] != [values.shape for values in there]:
            raise ModelError(PADDED)
        if not all(map(identical, here, there)):
            raise ModelError(COUPLED)
    first = next(module for module in objective.model.modules() if isinstance(module, QuantizableLayer))
    handle = first.register_forward_hook(add_mean)
    try:
        left, right = _losses_in(FIXED[::2], objective, specimens, step)
        if identical(left[0], right[0]) and all(map(identical, *(of_row(results(order), 0) for order in FIXED[::2]))):
            raise blind("the codes of quantized layers")
    finally:
        handle.remove()


def _check_quantized_losses(objective: Objective, specimens: Specimens, step: TrialStep) -> None:
    """Compare the losses of another kind of values bit for bit, in both modes, if the model runs on it."""
    for mode in (contextlib.nullcontext(), other_mode(objective.model)):
        try:
            with mode:
                found = _losses_in(FIXED, objective, specimens, step)
        except Exception:  # outside of the data's domain
            return
        if not all(bool(losses.isfinite().all()) for losses in found):
            return
        if specimens.padded:
            raise ModelError(PADDED)
        for (one, row), (other, _) in PLACES_FIXED:
            if not identical(found[one][row], found[other][row]):
                raise ModelError(COUPLED)


def _losses_in(
    orders: Iterable[Sequence[int]], objective: Objective, specimens: Specimens, step: TrialStep
) -> list[Tensor]:
    pieces = (piece_of(specimens, order, torch.float32) for order in orders)
    return [losses_of(objective, piece, step) for piece in pieces]
