# SPDX-License-Identifier: Apache-2.0
"""Keeps freed memory in the process while a step runs, so that the next operation finds its pages in place.

glibc gives large freed blocks back to the kernel and gets them anew, page by page and zeroed. A training step allocates
and frees the same few blocks for every microbatch: giving them back costs a quarter to a half of its time. What is kept
is no more than the step's own peak; it goes back with the first large block that is freed after the step.

Elsewhere than on glibc nothing is done. Source: mallopt(3).
"""

import contextlib
import ctypes
import functools
import platform
from collections.abc import Callable, Iterator

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # names of parameters in malloc.h
_NEVER = 2**31 - 1  # bytes; the largest value there is
_USUAL = {_MMAP_THRESHOLD: 2**25, _TRIM_THRESHOLD: 2**26}  # where glibc's own adaptation ends, once blocks are large


@contextlib.contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Until the block ends, freed memory stays with the process."""
    set_parameter = _mallopt()
    for name in _USUAL:
        set_parameter(name, _NEVER)
    try:
        yield
    finally:
        for name, value in _USUAL.items():
            set_parameter(name, value)


@functools.cache
def _mallopt() -> Callable[[int, int], object]:
    """glibc's, or nothing."""
    if platform.libc_ver()[0] != "glibc":
        return lambda name, value: None
    return ctypes.CDLL(None).mallopt
