# SPDX-License-Identifier: Apache-2.0
"""The right clipped sum: by plain autograd, one example at a time, in float64."""

from typing import Any

import torch
from torch import Tensor, nn

from dpquant.engine.batches import num_rows, take_rows
from dpquant.engine.clip import clipped_sum
from dpquant.engine.layers import prepare
from dpquant.engine.passes import PerExampleLoss

_BOUND, _TOLERANCE = 0.5, 1e-4


def error_of_sum(what: str, model: nn.Module, losses: PerExampleLoss, batch: Any, **prepared: Any) -> float:
    """Return the relative error of dpquant's clipped sum in full precision; exit with an error if it is large.

    Args:
      what: name of the model, for the message.
      model: is prepared afterwards, so that it changes.
      losses: `(model, batch) -> Tensor (B,)`.
      batch: a few examples.
      prepared: options of `prepare`.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    expected = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in trained.items()}
    for row in range(num_rows(batch)):
        loss = losses(model, take_rows(batch, slice(row, row + 1))).sum()
        grads = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
        found = {name: grad.double() for name, grad in zip(trained, grads, strict=True) if grad is not None}
        factor = min(1.0, _BOUND / _norm(found))
        for name, grad in found.items():
            expected[name] += grad * factor
    ids = torch.arange(num_rows(batch))
    total = clipped_sum(prepare(model, **prepared), losses, batch, max_grad_norm=_BOUND, record_ids=ids, step=0, seed=0)
    error = _norm({name: total.grads[name] - one for name, one in expected.items()}) / _norm(expected)
    if not error < _TOLERANCE:
        raise SystemExit(f"error: the clipped sum of {what} is off by {error:.1e}")
    return error


def _norm(parts: dict[str, Tensor]) -> float:
    """Return the norm of all parts as one vector."""
    return torch.stack([part.norm() for part in parts.values()]).norm().item()
