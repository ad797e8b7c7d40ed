# SPDX-License-Identifier: Apache-2.0
"""Keep the heap pages of a training step for the next step, rather than returning them to the operating system.

glibc returns large freed blocks to the operating system, and a step frees all of its blocks after each microbatch.
Mapping them again, page by page and zeroed, was measured to take a quarter to two thirds of a step, most on virtual
machines (docs/performance.md, "Memory of the process"). So while a step runs, no page is returned. Between steps, its
free blocks are held by this module, where the rest of the program cannot allocate them; the program's own memory is
managed as before. Memory that the program frees between steps, for instance the results of the last step, is not held:
if it were, the heap would grow by that much at every step.

Works for the main thread and glibc 2.33 or newer; elsewhere it does nothing. Source: mallopt(3), mallinfo(3).
"""

import contextlib
import ctypes
import functools
import platform
import threading
from collections.abc import Callable, Iterator

import torch

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # parameters of mallopt, from malloc.h
_NEVER = 2**31 - 1  # bytes; the largest value that mallopt accepts
_USUAL = {_MMAP_THRESHOLD: 2**25, _TRIM_THRESHOLD: 2**26}  # the maxima of glibc's dynamic thresholds
_LARGEST, _SMALLEST = 2**30, 2**20  # bytes of a held block
_MAPPED = 2  # flag in the word before a block: it is a mapping of its own, not in the heap

_held: dict[int, int] = {}  # {address of a held block: its size}
_depth = 0
_free = 0  # free bytes of the heap when the step began, held blocks excluded
_used = 0  # used bytes of the heap then, held blocks excluded


class _Info(ctypes.Structure):
    """The struct mallinfo2 of malloc.h."""

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
    """Reuse the memory of the last block under this context, and keep it for the next one.

    Objects that outlive the block are not held, so free all large objects inside it. Blocks can be nested.

    Args:
      hold: takes free blocks from the heap when the block ends; None: as many as possible without growing the heap.
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
    """Return all held and free memory to the system and the GPU: call it if the next step needs less than the last."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    libc = _glibc()
    if libc is None or threading.current_thread() is not threading.main_thread():
        return
    _let_go(libc)
    libc.malloc_trim(0)


def _release(libc: ctypes.CDLL) -> None:
    """Free the held blocks, allocate large blocks from the heap from now on, and return none to the system."""
    global _free, _used
    now = libc.mallinfo2()
    _free, _used = now.fordblks, now.uordblks - sum(_held.values())
    for parameter in _USUAL:
        libc.mallopt(parameter, _NEVER)
    _let_go(libc)


def _hold(libc: ctypes.CDLL) -> None:
    """Allocate the heap's free blocks, the largest first, without growing the heap; then restore glibc's thresholds.

    Some memory stays free for the program between steps: as much as was free before this step, less the results of the
    step, which are freed between steps. A block that fits nowhere in the heap becomes a mapping of its own; it is freed
    at once, and a smaller block is tried.
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
    """Return the process's C library if it is a glibc that this module supports, else None."""
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
    """Return whether malloc is glibc's own: another allocator may be preloaded."""
    before = libc.mallinfo2()
    block = libc.malloc(_SMALLEST)
    after = libc.mallinfo2()
    libc.free(block)
    return after.uordblks + after.hblkhd - before.uordblks - before.hblkhd >= _SMALLEST
