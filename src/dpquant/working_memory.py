# SPDX-License-Identifier: Apache-2.0
"""Keeps the memory that a training step works in from one step to the next.

glibc gives large freed blocks back to the kernel, and a step frees all of its blocks, microbatch by microbatch. Getting
them anew, page by page and zeroed, costs a quarter to two thirds of a step, most where the machine is virtual. So while
a step runs nothing is given back, and between steps its free blocks are held here, out of the reach of the rest of the
program, whose own memory is managed as before. Held is by how much steps have made the heap grow: what the program
itself frees between steps, the results of the last step among it, is left to it.

Only for the main thread and glibc 2.33 or newer; elsewhere nothing is done. Source: mallopt(3), malloc_info(3).
"""

import contextlib
import ctypes
import functools
import platform
import re
import threading
from collections.abc import Iterator

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # names of parameters in malloc.h
_NEVER = 2**31 - 1  # bytes; the largest value there is
_USUAL = {_MMAP_THRESHOLD: 2**25, _TRIM_THRESHOLD: 2**26}  # where glibc's own adaptation ends, once blocks are large
_SMALLEST = 2**20  # block that is worth holding, bytes
_MOST_BLOCKS = 1000
_CHUNKS = re.compile(r'<(?:size|unsorted) from="\d+" to="(\d+)"')

_held: list[int] = []
_depth = 0
_free = 0  # bytes of the heap when the step began, apart from what was held
_used = 0  # bytes of the heap when the step began


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
    """Until the block ends, memory comes from what the last such block has used, and stays.

    What the block leaves alive is not held: let all of its large objects die in it.
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
            _hold(libc)


def give_back() -> None:
    """Return to the system what is held and free: the next step needs less than the last."""
    libc = _glibc()
    if libc is None or threading.current_thread() is not threading.main_thread():
        return
    for block in _held:
        libc.free(block)
    _held.clear()
    libc.malloc_trim(0)


def _release(libc: ctypes.CDLL) -> None:
    """Large blocks come from the heap from now on and stay in it; what was held is free."""
    global _free, _used
    _free = libc.mallinfo2().fordblks
    for parameter in _USUAL:
        libc.mallopt(parameter, _NEVER)
    for block in _held:
        libc.free(block)
    _held.clear()
    _used = libc.mallinfo2().uordblks


def _hold(libc: ctypes.CDLL) -> None:
    """Take the heap's free chunks, the largest first, without making the heap grow; then let glibc do as usual.

    As much stays free as the program works in between steps: what was free before the step, but for the last step's
    results, which die between steps.
    """
    results = max(libc.mallinfo2().uordblks - _used, 0)
    between = max(_free - results, 0)
    while len(_held) < _MOST_BLOCKS:
        size = min(_largest_free(libc), libc.mallinfo2().fordblks - between)
        if size < _SMALLEST:
            break
        _held.append(libc.malloc(size))
    for parameter, value in _USUAL.items():
        libc.mallopt(parameter, value)


def _largest_free(libc: ctypes.CDLL) -> int:
    """How much fits into the main heap's largest free chunk, bytes."""
    text, length = ctypes.c_void_p(), ctypes.c_size_t()
    stream = libc.open_memstream(ctypes.byref(text), ctypes.byref(length))
    libc.malloc_info(0, stream)
    libc.fclose(stream)
    report = ctypes.string_at(text.value or 0, length.value).decode()
    libc.free(text)
    main_heap = report[: report.index("</heap>")]  # without the chunk at its top
    chunks = [int(size) & ~15 for size in _CHUNKS.findall(main_heap)]  # the low bits are flags
    return max(*chunks, libc.mallinfo2().top - 4096, 0) - 32


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    """The process's C library, if it is one that this works with."""
    if platform.libc_ver()[0] != "glibc":
        return None
    libc = ctypes.CDLL(None)
    if not all(
        hasattr(libc, name) for name in ("mallopt", "mallinfo2", "malloc_info", "malloc_trim", "open_memstream")
    ):
        return None
    libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    libc.free.argtypes, libc.free.restype = [ctypes.c_void_p], None
    libc.mallinfo2.restype = _Info
    libc.open_memstream.restype = ctypes.c_void_p
    libc.malloc_info.argtypes = [ctypes.c_int, ctypes.c_void_p]
    libc.fclose.argtypes = [ctypes.c_void_p]
    libc.malloc_trim.argtypes = [ctypes.c_size_t]
    return libc if _in_charge(libc) else None


def _in_charge(libc: ctypes.CDLL) -> bool:
    """Whether malloc is glibc's own: another allocator may have been put in its place."""
    before = libc.mallinfo2()
    block = libc.malloc(_SMALLEST)
    after = libc.mallinfo2()
    libc.free(block)
    return after.uordblks + after.hblkhd - before.uordblks - before.hblkhd >= _SMALLEST
