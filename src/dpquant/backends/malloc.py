# SPDX-License-Identifier: Apache-2.0
"""Keeps the memory that a training step works in from one step to the next.

glibc gives large freed blocks back to the kernel, and a step frees all of its blocks, microbatch by microbatch. Getting
them anew, page by page and zeroed, costs a quarter to two thirds of a step, most where the machine is virtual. So while
a step runs nothing is given back, and between steps its free blocks are held here, out of the reach of the rest of the
program, whose own memory is managed as before. What the program itself frees between steps, the results of the last
step among it, is left to it: were it held, the heap would grow by as much at every step.

Only for the main thread and glibc 2.33 or newer; elsewhere nothing is done. Source: mallopt(3), mallinfo(3).
"""

import contextlib
import ctypes
import functools
import platform
import threading
from collections.abc import Callable, Iterator

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # names of parameters in malloc.h
_NEVER = 2**31 - 1  # bytes; the largest value there is
_USUAL = {_MMAP_THRESHOLD: 2**25, _TRIM_THRESHOLD: 2**26}  # where glibc's own adaptation ends, once blocks are large
_LARGEST, _SMALLEST = 2**30, 2**20  # blocks that are held, bytes
_MAPPED = 2  # flag in the word before a block that does not come from the heap

_held: dict[int, int] = {}  # block: size
_depth = 0
_free = 0  # bytes of the heap that were free when the step began, apart from what was held
_used = 0  # bytes of the heap that were in use then


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
def working_memory(hold: Callable[[ctypes.CDLL], None] | None = None) -> Iterator[None]:
    """Until the block ends, memory comes from what the last such block has used, and stays.

    What the block leaves alive is not held: let all of its large objects die in it. `hold` takes free blocks when it
    ends; None: so many that the heap does not grow.
    """
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
            (hold or _hold)(libc)


def give_back() -> None:
    """Return to the system what is held and free: the next step needs less than the last."""
    libc = _glibc()
    if libc is None or threading.current_thread() is not threading.main_thread():
        return
    _let_go(libc)
    libc.malloc_trim(0)


def _release(libc: ctypes.CDLL) -> None:
    """Large blocks come from the heap from now on and stay in it; what was held is free."""
    global _free, _used
    now = libc.mallinfo2()
    _free, _used = now.fordblks, now.uordblks - sum(_held.values())
    for parameter in _USUAL:
        libc.mallopt(parameter, _NEVER)
    _let_go(libc)


def _hold(libc: ctypes.CDLL) -> None:
    """Take the heap's free blocks, the largest first, without making the heap grow; then let glibc do as usual.

    As much stays free as the program works in between steps: what was free before the step, but for the last step's
    results, which die between steps. A block that fits nowhere in the heap becomes a mapping of its own here.
    """
    libc.mallopt(_MMAP_THRESHOLD, _SMALLEST)
    now = libc.mallinfo2()
    results = max(now.uordblks - _used, 0)
    spare, size = now.fordblks - max(_free - results, 0), _LARGEST
    while size >= _SMALLEST:
        block = libc.malloc(size) if size <= spare else None
        if block and not ctypes.c_size_t.from_address(block - ctypes.sizeof(ctypes.c_size_t)).value & _MAPPED:
            _held[block] = size
            spare -= size
            continue
        libc.free(block)
        size //= 2
    for parameter, value in _USUAL.items():
        libc.mallopt(parameter, value)


def _let_go(libc: ctypes.CDLL) -> None:
    for block in _held:
        libc.free(block)
    _held.clear()


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
    block = libc.malloc(_SMALLEST)
    after = libc.mallinfo2()
    libc.free(block)
    return after.uordblks + after.hblkhd - before.uordblks - before.hblkhd >= _SMALLEST
