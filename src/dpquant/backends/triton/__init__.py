# SPDX-License-Identifier: Apache-2.0
"""Triton kernels for NVIDIA GPUs. Each gives the bits of a definition in torch, which the tests compare on any machine.

    quantize.py   codes and scales of rows                 = `backends.quantize._fill_torch`
    norms.py      squared norms of weight gradients        = float64 norms of `algebra.patch_products`
    conv.py       products of int8 codes, in float32       = `reference.ReferenceWeight`

Triton comes with torch's CUDA builds. Only the three modules import it, and only callers that were not refused import
them: dpquant runs without triton and without a driver. Without a GPU, Triton's interpreter runs the kernels on tensors
in main memory, slowly: set TRITON_INTERPRET=1 before triton is imported.
"""

import functools
import importlib.util
import os

import torch
from torch import Tensor

from dpquant.errors import FormatError
from dpquant.formats import RoleFormat

_LEAST_CAPABILITY = (8, 0)  # int8 tensor cores with at least 32 products an instruction


@functools.cache
def refusal(device: torch.device) -> str | None:
    """Return the reason why Triton kernels cannot run on tensors of a device, as a clause; None if they can.

    Triton is loaded only if all else allows a CUDA device; a kernel is then tried. The answer is kept for the process.
    """
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cpu":
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        return None if interpreted else "triton runs on CUDA devices, and on the CPU only with TRITON_INTERPRET=1"
    if device.type != "cuda":
        return f"triton runs on CUDA devices, not on {device.type}"
    if not torch.cuda.is_available():
        return "there is no CUDA driver or no GPU"
    if torch.version.hip is not None:
        return "the kernels' rounding is known on NVIDIA GPUs only"
    if torch.cuda.get_device_capability(device) < _LEAST_CAPABILITY:
        return "the GPU's compute capability is below 8.0"
    return obstacle(device)


def obstacle(device: torch.device) -> str | None:
    """Run a kernel on a device and return why it failed, or None; triton needs a C compiler and a driver."""
    from dpquant.backends.triton.quantize import largest_magnitudes

    try:
        found = largest_magnitudes(torch.full((1, 1), -2.0, device=device))
    except (
        Exception
    ) as error:  # whatever a compiler, a linker or a driver raises: the caller can do without the kernels
        first_line = str(error).partition("\n")[0].rstrip(".")
        return f"triton does not run ({type(error).__name__}: {first_line})"
    return None if found.tolist() == [2.0] else "triton gives wrong results"


def runs_quantizer(kernel: str, device: torch.device, supported: bool) -> bool:
    """Return whether `quantize_rows` uses the kernel of `quantize.py`: if it is asked for, or, on CUDA, by "auto".

    Args:
      kernel: as in `quantize_rows`.
      device: of the rows.
      supported: whether the kernel supports the format.

    Raises:
      FormatError: "triton" is asked for and cannot run.
    """
    if kernel == "auto" and device.type == "cuda":
        return supported and refusal(device) is None
    if kernel != "triton":
        return False
    reason = refusal(device) if supported else "the format's codes are not powers of two or uniform integers"
    if reason is not None:
        raise FormatError(
            f"Expected kernel 'triton' with an integer format on a CUDA device; got kernel='triton', but {reason}. "
            "The kernel cannot run there. Choose kernel='auto'."
        )
    return True


def fill(codes: Tensor, x: Tensor, role: RoleFormat, row_keys: Tensor, zero_point: int) -> Tensor:
    """Fill `codes` and return the scales, `(B,)`; see `quantize.fill`. The kernels are imported on first use."""
    from dpquant.backends.triton import quantize

    return quantize.fill(codes, x, role, row_keys, zero_point)
