# SPDX-License-Identifier: Apache-2.0
"""Keeps the memory that a training step works in from one step to the next.

glibc gives large freed blocks back to the kernel, and a step frees all of its blocks, microbatch by microbatch. Getting
them anew, page by page and zeroed, costs a quarter to two thirds of a step, most where the machine is virtual. So while
a step runs nothing is given back, and between steps its free blocks are held here, out of the reach of the rest of the
program, whose own memory is managed as before. Held is no more than the largest step has used.

Only for the main thread and glibc 2.33 or newer; elsewhere nothing is done. Source: mallopt(3), mallinfo(3).
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
_LARGEST, _SMALLEST = 2**30, 2**20  # blocks that are held, bytes

_held: list[int] = []
_depth = 0


class _Info(ctypes.Structure):
    """struct mallinfo2."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in [
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        ]
    )


@contextlib.contextmanager
def working_memory() -> Iterator[None]:
    """Until the block ends, memory comes from what the last such block has used, and stays."""
    global _depth
    libc = _glibc()
    if libc is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    if _depth == 0:
        _release(libc)
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1
        if _depth == 0:
            _hold(libc)


def _release(libc: ctypes.CDLL) -> None:
    """Large blocks come from the heap from now on and stay in it; what was held is free."""
    for parameter in _USUAL:
        libc.mallopt(parameter, _NEVER)
    for block in _held:
        libc.free(block)
    _held.clear()


def _hold(libc: ctypes.CDLL) -> None:
    """Take the heap's large free blocks, largest first, without making the heap grow; then let glibc do as usual."""
    size = _LARGEST
    while size >= _SMALLEST:
        before = libc.mallinfo2()
        block = libc.malloc(size) if before.fordblks > size else None
        after = libc.mallinfo2()
        if block and after.arena == before.arena and after.fordblks < before.fordblks:
            _held.append(block)
            continue
        if block:
            libc.free(block)
        size //= 2
    for parameter, value in _USUAL.items():
        libc.mallopt(parameter, value)


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    """The process's C library, if it is one that this works with."""
    if platform.libc_ver()[0] != "glibc":
        return None
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        return None
    libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    libc.free.argtypes, libc.free.restype = [ctypes.c_void_p], None
    libc.mallinfo2.restype = _Info
    return libc
