# SPDX-License-Identifier: Apache-2.0
"""The backends by name, and the choice of one for a device. To add a backend, write its file and add it to `BACKENDS`.

`auto` chooses the last backend that does not refuse; the first one never refuses.
"""

from collections.abc import Sequence

import torch

from dpquant.backends.cpu_int8 import CpuInt8
from dpquant.backends.cuda import Cuda
from dpquant.backends.interface import Backend
from dpquant.backends.reference import Reference
from dpquant.errors import FormatError
from dpquant.formats import Precision

BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (Reference(), CpuInt8(), Cuda())}


def resolve(backend: str | Backend, precisions: Sequence[Precision], device: torch.device) -> Backend:
    """Return the backend that runs all of these precisions on a device.

    Args:
      backend: `auto`, the name of a backend, or a backend.
      precisions: of the layers.
      device: of the model.
    Raises:
      FormatError: the backend is unknown, or cannot run one of the precisions exactly on this machine.
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
    """Return the reason why a backend cannot run one of these precisions exactly on a device, or None."""
    return next(filter(None, (backend.refusal(precision, device) for precision in precisions)), None)


def reason_for(backend: Backend, precisions: Sequence[Precision], device: torch.device) -> str:
    """Return why `auto` chose this backend: a refusal by a later one that is made for the device, or its exactness."""
    names = list(BACKENDS)
    later = [BACKENDS[name] for name in names[names.index(backend.name) + 1 :]]
    reasons = [refusal(one, precisions, device) for one in later if one.device_type in (None, device.type)]
    largest = max(precisions, key=lambda precision: precision.max_code)
    return next(filter(None, reasons), None) or backend.exactness(largest, device)
