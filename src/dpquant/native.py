# SPDX-License-Identifier: Apache-2.0
"""The C++ kernels of `native/`, loaded once. `kernels` is None where they were not built, and `obstacle` then says why.

Whoever uses a kernel has the same in torch or numpy, and takes that instead.
"""

try:
    from dpquant import _native as kernels
except ImportError as error:  # installed without a compiler
    kernels, obstacle = None, str(error)
else:
    obstacle = None
