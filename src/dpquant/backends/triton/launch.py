# SPDX-License-Identifier: Apache-2.0
"""How every kernel is started: rounded as it is written."""

from typing import Any

import torch
from torch import Tensor


def launch(kernel: Any, programs: tuple[int, ...], x: Tensor, *arguments: Any, **constants: Any) -> None:
    """Start a kernel on x's device, without contraction of a product and a sum into one operation.

    A contraction rounds once where torch rounds twice, so it would change bits. Triton contracts unless it is told not
    to.

    Args:
      kernel: a function compiled by `triton.jit`.
      programs: how many, by axis.
      x: the kernel's first argument.
      arguments: its others, tensors and numbers.
      constants: of the kernel, known when it is compiled.
    """
    with torch.cuda.device_of(x):  # of several GPUs; changes nothing on the CPU
        kernel[programs](x, *arguments, **constants, enable_fp_fusion=False)
