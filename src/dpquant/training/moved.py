# SPDX-License-Identifier: Apache-2.0
"""Checks, at the first step, that every trainable parameter moves and no frozen one does.

Otherwise a run may spend its whole budget on a model that does not train: parameters that were replaced after the
optimizer was made, adapters that are not the model's own.
"""

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dpquant.errors import ModelError


class Stepping(Protocol):
    """What takes a step: an optimizer, or one of several processes."""

    @property
    def param_groups(self) -> list[dict[str, Any]]: ...

    def step(self) -> Any: ...


def check_moved(model: nn.Module, optimizer: Stepping) -> bool:
    """Call the optimizer's step and compare the parameters before and after it.

    A trainable parameter may stay where it is if its learning rate is zero (a warm-up begins so), if its noised
    gradient is zero, or if an update of the size of the learning rate, or of the learning rate times the gradient,
    vanishes in rounding. An optimizer that moves nothing at all (one that takes a step every few calls) is not judged.

    Args:
      model: whose parameters hold their noised gradients.
      optimizer: takes its step here.
    Returns: whether it moved anything, so that the question is answered.
    Raises:
      ModelError: a trainable parameter stayed while others moved, or a frozen one moved.
    Privacy: post-processing. It compares released values, which the optimizer computes from noised gradients.
    """
    frozen = {name: _checksum(p) for name, p in model.named_parameters() if not p.requires_grad}
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trainable.items()}
    may_stay = {name for name, p in trainable.items() if _may_stay(p, optimizer)}
    optimizer.step()
    now = dict(model.named_parameters())
    for name, checksum in frozen.items():
        if not torch.equal(_checksum(now[name]), checksum):
            raise ModelError(
                f"Expected the first step to leave frozen parameters alone; got a change of {name}. It was to stay as "
                "it was given. Leave it out of the optimizer and of its hooks. What was charged stays charged."
            )
    stayed = [name for name, was in before.items() if torch.equal(now[name].detach(), was)]
    if len(stayed) == len(before):
        return False
    for name in stayed:
        if name not in may_stay:
            raise ModelError(
                f"Expected the first step to move every trainable parameter; got {name} where it was. The run would "
                "pay for training it, and it would not train. Make the optimizer from the model's parameters as they "
                "are now, or freeze it with requires_grad_(False). What was charged stays charged."
            )
    return True


def _checksum(parameter: Tensor) -> Tensor:
    """Return the sum of a tensor's bits, as integers: it changes with the values, and takes no memory to keep."""
    flat = parameter.detach().reshape(-1)
    return flat.view(torch.int32 if flat.element_size() % 4 == 0 else torch.uint8).sum(dtype=torch.int64)


def _may_stay(parameter: Tensor, optimizer: Stepping) -> bool:
    """Whether a step may leave a parameter where it is: no learning rate, no gradient, or an update below round-off."""
    gradient = parameter.grad
    if gradient is None or not bool(gradient.any()):
        return True
    rates = [group.get("lr") for group in optimizer.param_groups if any(p is parameter for p in group["params"])]
    rate = float(rates[0]) if rates and rates[0] is not None else 1.0
    largest = rate * max(1.0, float(gradient.abs().max()))
    return largest <= float(parameter.detach().abs().min()) * torch.finfo(parameter.dtype).eps
