# SPDX-License-Identifier: Apache-2.0
"""Keeps the memory that a training step works in from one step to the next.

glibc gives large freed blocks back to the kernel, and a step frees all of its blocks, microbatch by microbatch. Getting
them anew, page by page and zeroed, costs a quarter to two thirds of a step, most where the machine is virtual. So large
blocks of a step come from the heap, and the heap keeps what is freed until `give_back`. Between steps the rest of the
program gets its own large blocks as before.

Only for the main thread and glibc 2.33 or newer; elsewhere nothing is done. Source: mallopt(3), malloc_trim(3).
"""

import contextlib
import ctypes
import functools
import platform
import threading
from collections.abc import Iterator

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # names of parameters in malloc.h
_NEVER = 2**31 - 1  # bytes; the largest value there is
_USUAL = {_MMAP_THRESHOLD: 2**25, _TRIM_THRESHOLD: 2**26}  # where glibc's own adaptation ends, once blocks are large
_BLOCK = 2**20  # bytes, by which it is tried whose malloc this is

_depth = 0


class _Info(ctypes.Structure):
    """struct mallinfo2."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "top",
        )
    )


@contextlib.contextmanager
def working_memory() -> Iterator[None]:
    """Until the block ends, memory comes from the heap, which keeps it for the next such block."""
    global _depth
    libc = _glibc()
    if libc is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    if _depth == 0:
        for parameter in _USUAL:
            libc.mallopt(parameter, _NEVER)
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1
        if _depth == 0:
            libc.mallopt(_MMAP_THRESHOLD, _USUAL[_MMAP_THRESHOLD])


def give_back() -> None:
    """Return to the system what is free, and keep no more than usual until the next step."""
    libc = _glibc()
    if libc is None or threading.current_thread() is not threading.main_thread():
        return
    if _depth == 0:
        libc.mallopt(_TRIM_THRESHOLD, _USUAL[_TRIM_THRESHOLD])
    libc.malloc_trim(0)


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    """The process's C library, if it is one that this works with."""
    if platform.libc_ver()[0] != "glibc":
        return None
    libc = ctypes.CDLL(None)
    if not all(hasattr(libc, name) for name in ("mallopt", "mallinfo2", "malloc_trim")):
        return None
    libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    libc.free.argtypes, libc.free.restype = [ctypes.c_void_p], None
    libc.mallinfo2.restype = _Info
    libc.malloc_trim.argtypes = [ctypes.c_size_t]
    return libc if _in_charge(libc) else None


def _in_charge(libc: ctypes.CDLL) -> bool:
    """Whether malloc is glibc's own: another allocator may have been put in its place."""
    before = libc.mallinfo2()
    block = libc.malloc(_BLOCK)
    after = libc.mallinfo2()
    libc.free(block)
    return after.uordblks + after.hblkhd - before.uordblks - before.hblkhd >= _BLOCK
