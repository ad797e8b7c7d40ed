# SPDX-License-Identifier: Apache-2.0
"""The C++ kernels of `native/`, imported once. If they were not built, `kernels` is None and `obstacle` is the reason.

Every caller of a kernel falls back to an equivalent computation in torch or NumPy.
"""

try:
    from dpquant import _native as kernels
except ImportError as error:  # installed without a compiler
    kernels, obstacle = None, str(error)
else:
    obstacle = None
