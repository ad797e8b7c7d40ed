# SPDX-License-Identifier: Apache-2.0
"""The C++ kernels of `native/`, imported once. If they were not built, `kernels` is None and `obstacle` is the reason.

Every caller of a kernel falls back to an equivalent computation in torch or NumPy.
"""

import hashlib
from pathlib import Path

try:
    from dpquant import _native as kernels
except ImportError as error:  # installed without a compiler
    kernels, obstacle = None, str(error)
else:
    obstacle = None

SLOWER = "none for this platform; same results, slower"


def build() -> str:
    """Return what tells a build of the kernels from every other; "" where there is none."""
    return "" if kernels is None else hashlib.sha256(Path(kernels.__file__).read_bytes()).hexdigest()
