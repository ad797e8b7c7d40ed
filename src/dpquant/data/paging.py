# SPDX-License-Identifier: Apache-2.0
"""What is asked of the operating system for files of which parts are read, and for files that will be filled.

Linux has all of these calls, macOS and Windows some. Where one is missing, the file is read all the same, more slowly.
"""

import mmap
import os
from typing import Any

_BLOCK = 1 << 20  # bytes


class Paging:
    """The calls of an operating system for the pages of a file."""

    def __init__(self, calls: Any = os, advice: Any = mmap):
        """Use what a system has.

        Args:
          calls: has posix_fadvise and posix_fallocate, or lacks them.
          advice: has MADV_RANDOM and MADV_DONTNEED, or lacks them.
        """
        self._calls, self._advice = calls, advice

    def advise(self, mapped: mmap.mmap, name: str) -> None:
        """Tell how a mapped file will be used.

        Args:
          mapped: the file.
          name: RANDOM, if what is not asked for should not be read, or DONTNEED, if the process gives its pages back.
        """
        advice = getattr(self._advice, f"MADV_{name}", None)
        if advice is not None:
            mapped.madvise(advice)

    def will_need(self, descriptor: int, begin: int, size: int) -> None:
        """Have the device begin to read bytes of a file."""
        if hasattr(self._calls, "posix_fadvise"):
            self._calls.posix_fadvise(descriptor, begin, size, self._calls.POSIX_FADV_WILLNEED)

    def reserve(self, descriptor: int, size: int) -> None:
        """Have the place of a file on the disk reserved; elsewhere than on Linux it is filled with zeros.

        Raises:
          OSError: the disk is full.
        """
        if hasattr(self._calls, "posix_fallocate"):
            self._calls.posix_fallocate(descriptor, 0, size)
            return
        begin = os.lseek(descriptor, 0, os.SEEK_CUR)  # what lies before is written
        for start in range(begin, size, _BLOCK):
            os.write(descriptor, bytes(min(_BLOCK, size - start)))


PAGING = Paging()
