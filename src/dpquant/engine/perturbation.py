# SPDX-License-Identifier: Apache-2.0
"""Other values of a model's parameters for a while: perturbed ones, or the same in another type."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def shaken(model: nn.Module, seed: int, share: float) -> Iterator[None]:
    """Perturb parameters until the block ends; then restore them and the buffers in place.

    Each entry changes by up to `share` of itself, a zero by up to `share`: a zero may be a gate that lets no gradient
    through. An entry of a matrix changes by at least `share` of an entry's usual size, 1 / sqrt(inputs): tiny matrices
    let so little through that what depends on an input is smaller than what a comparison tolerates.
    """
    generator = torch.Generator().manual_seed(seed)

    def perturbed(parameter: Tensor) -> Tensor:
        noise = torch.rand(parameter.shape, generator=generator).mul_(2 * share).sub_(share).to(parameter.device)
        usual = parameter[0].numel() ** -0.5 if parameter.ndim > 1 and parameter.numel() else 0.0
        size = torch.where(parameter == 0, 1.0, parameter.abs().clamp(min=usual))
        return (noise * size).add_(parameter)

    parameters = set(model.parameters())
    with _replaced(model, lambda tensor: (perturbed if tensor in parameters else Tensor.clone)(tensor.data)):
        yield


def converted(model: nn.Module, dtype: torch.dtype) -> contextlib.AbstractContextManager[None]:
    """Convert parameters and buffers to a type until the block ends; then restore them in place."""
    return _replaced(model, lambda tensor: tensor.data.to(dtype))


@contextlib.contextmanager
def _replaced(model: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace the values of parameters and buffers of type float32 until the block ends."""
    kept = [(t, t.data) for t in (*model.parameters(), *model.buffers()) if t.dtype == torch.float32]
    for tensor, _ in kept:
        tensor.data = change(tensor)
    try:
        yield
    finally:
        for tensor, data in kept:
            tensor.data = data
