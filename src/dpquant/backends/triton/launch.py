# SPDX-License-Identifier: Apache-2.0
"""How every kernel is started: rounded as it is written."""

from typing import Any


def launch(kernel: Any, programs: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Start a kernel without contraction of a product and a sum into one operation.

    A contraction rounds once where torch rounds twice, so it would change bits. Triton contracts unless it is told not
    to.

    Args:
      kernel: a function compiled by `triton.jit`.
      programs: how many, by axis.
      arguments: of the kernel, tensors and numbers.
      constants: of the kernel, known when it is compiled.
    """
    kernel[programs](*arguments, **constants, enable_fp_fusion=False)
