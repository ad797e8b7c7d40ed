# SPDX-License-Identifier: Apache-2.0
"""The backends by name, and which one a precision runs on here. To add a backend: a file of its own, and its line here.

`auto` takes the last backend that has no reason to refuse; the first never refuses.
"""

from collections.abc import Sequence

import torch

from dpquant.backends.cpu_int8 import CpuInt8
from dpquant.backends.interface import Backend
from dpquant.backends.reference import Reference
from dpquant.errors import FormatError
from dpquant.formats import Precision

BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (Reference(), CpuInt8())}


def resolve(backend: str | Backend, precisions: Sequence[Precision], device: torch.device) -> Backend:
    """Return the backend that runs all of these precisions on a device.

    Args:
      backend: `auto`, the name of one, or a backend.
      precisions: of the layers.
      device: where the model lives.
    Raises:
      FormatError: the backend is unknown, or the one that was asked for cannot give exact results here.
    """
    if backend == "auto":
        return next(one for one in reversed(BACKENDS.values()) if refusal(one, precisions, device) is None)
    if isinstance(backend, str) and backend not in BACKENDS:
        known = ", ".join(("auto", *BACKENDS))
        raise FormatError(f"Expected backend to be one of {known}; got backend={backend!r}.")
    chosen = BACKENDS[backend] if isinstance(backend, str) else backend
    reason = refusal(chosen, precisions, device)
    if reason is not None:
        raise FormatError(
            f"Expected a recipe, device and processor that run {chosen.name} exactly; got backend={chosen.name!r}, but "
            f"{reason}. A wrong product would silently change the training. Use backend='simulate' or backend='auto'."
        )
    return chosen


def refusal(backend: Backend, precisions: Sequence[Precision], device: torch.device) -> str | None:
    """Say why a backend cannot run one of these precisions on a device exactly; None: it can."""
    return next(filter(None, (backend.refusal(precision, device) for precision in precisions)), None)


def reason_for(backend: Backend, precisions: Sequence[Precision], device: torch.device) -> str:
    """Say why `auto` has come to this backend: the refusal of the one that comes after it, or that it is exact."""
    names = list(BACKENDS)
    later = names[names.index(backend.name) + 1 :]
    reasons = [refusal(BACKENDS[name], precisions, device) for name in later]
    return next(filter(None, reasons), None) or "exact on this processor"
