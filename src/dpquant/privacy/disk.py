# SPDX-License-Identifier: Apache-2.0
"""A file that one process appends to, in which every line is on disk before the next thing happens.

`Disk` is what the file asks of the operating system: tests that crash it, or fill it, pass their own. The lock is
`flock`'s, which a process loses when it ends, however it ends. Where there is no `flock` (Windows, some network file
systems) nothing keeps a second process out: its lines are then found at the next append, by the file's length.
"""

import contextlib
import errno
import os
import time
import weakref
from pathlib import Path
from typing import Any

from dpquant.errors import LedgerError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class Disk:
    """The calls of the operating system that an `AppendFile` makes. All of them may raise OSError.

    Attributes:
      control: the module fcntl, which locks files and flushes devices; None where the system has none.
    """

    control: Any = fcntl

    def make_folders(self, folder: Path) -> None:
        """Make a folder, and those above it, so that they survive a crash."""
        missing = [one for one in (folder, *folder.parents) if not one.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        for one in missing:
            self.sync_folder(one.parent)

    def open(self, path: Path, *, new: bool) -> int:
        """Return a descriptor for reading and appending; `new` makes the file if there is none."""
        binary = getattr(os, "O_BINARY", 0)  # without it, Windows writes an end of line as two bytes
        return os.open(path, os.O_RDWR | os.O_APPEND | binary | (os.O_CREAT if new else 0), 0o666)

    def lock(self, descriptor: int) -> None:
        """Lock the file for this process until the descriptor is closed.

        Raises:
          BlockingIOError: another process has locked it.
        """
        if self.control is None:
            return
        try:
            self.control.flock(descriptor, self.control.LOCK_EX | self.control.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise

    def read(self, descriptor: int) -> bytes:
        """Return all of the file."""
        os.lseek(descriptor, 0, os.SEEK_SET)
        with open(descriptor, "rb", closefd=False) as file:
            return file.read()

    def size(self, path: Path, descriptor: int) -> int:
        """Return the length of the file; -1 if the path has become another file."""
        found = os.fstat(descriptor)
        return found.st_size if os.path.samestat(os.stat(path), found) else -1

    def write(self, descriptor: int, data: bytes) -> int:
        """Append, and return how many bytes were written."""
        return os.write(descriptor, data)

    def cut(self, descriptor: int, length: int) -> None:
        """Shorten the file to a length."""
        os.ftruncate(descriptor, length)

    def sync(self, descriptor: int) -> None:
        """Return once all that was written is on disk."""
        full = getattr(self.control, "F_FULLFSYNC", None)  # macOS: fsync ends when the device has the data in memory
        try:
            if full is not None:
                self.control.fcntl(descriptor, full)
                return
        except OSError:  # a file system without this command, as on a network
            pass
        os.fsync(descriptor)

    def sync_folder(self, folder: Path) -> None:
        """Flush a folder, so that the names of its files survive a crash."""
        if os.name != "posix":  # Windows cannot open folders; there the file system alone keeps the names
            return
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def clock(self) -> float:
        """Return a time in seconds."""
        return time.perf_counter()


DISK = Disk()


class AppendFile:
    """A file that this process alone appends to.

    Attributes:
      path: of the file.
      sound: False once a write has failed, or was interrupted: nobody knows then what is on disk, and nothing more is
        written.
    """

    def __init__(self, path: Path, disk: Disk, *, new: bool):
        """Open and lock a file.

        Args:
          path: of the file.
          disk: makes all calls of the operating system.
          new: make the file, and its folders, if there is none.
        Raises:
          LedgerError: it cannot be opened, or another process has locked it.
        """
        self.path, self.sound, self._disk = path, True, disk
        with self._saying_why():
            if new:
                disk.make_folders(path.absolute().parent)
            self._descriptor = disk.open(path, new=new)
            self._close = weakref.finalize(self, os.close, self._descriptor)
            try:
                disk.lock(self._descriptor)
            except BlockingIOError as error:
                self._close()
                raise LedgerError(
                    f"Expected {path} to belong to one run; got a second one that wants to write to it, while the "
                    "first is still running. Both would spend the same budget. Wait for the first, or stop it."
                ) from error
            self._length = disk.size(path, self._descriptor)

    @property
    def length(self) -> int:
        """Length that the file has if nobody else wrote to it."""
        return self._length

    def read(self) -> bytes:
        """Return all of the file."""
        with self._saying_why():
            return self._disk.read(self._descriptor)

    def append(self, data: bytes) -> float:
        """Append, return once it is on disk, and return how many seconds that took.

        Raises:
          LedgerError: it is not safely on disk, another program wrote to the file, or an earlier write failed.
        """
        began = self._disk.clock()
        with self._saying_why():
            if not (self.sound and self._close.alive):
                raise LedgerError(
                    f"Expected {self.path} to be open and sound; got it closed, or after a write that failed half-way. "
                    "Nobody knows what is on disk. Stop, and read it with Ledger.read."
                )
            if self._disk.size(self.path, self._descriptor) != self._length:
                raise LedgerError(
                    f"Expected {self.path} as this run left it; got another length, or another file. Another program "
                    "wrote to it. Stop, and read it with Ledger.read."
                )
            self.sound = False
            if self._disk.write(self._descriptor, data) != len(data):
                raise OSError(0, "the line was written in part")
            self._disk.sync(self._descriptor)
            self.sound = True
        self._length += len(data)
        return self._disk.clock() - began

    def cut(self, length: int) -> None:
        """Shorten the file to a length, and return once that is on disk."""
        with self._saying_why():
            self._disk.cut(self._descriptor, length)
            self._disk.sync(self._descriptor)
        self._length = length

    def keep_name(self) -> None:
        """Return once the file's name is on disk."""
        with self._saying_why():
            self._disk.sync_folder(self.path.absolute().parent)

    def close(self) -> None:
        """Close the file and unlock it. Twice does no harm."""
        self._close()

    @contextlib.contextmanager
    def _saying_why(self):
        """Context: turns an OSError into a LedgerError."""
        try:
            yield
        except OSError as error:
            raise LedgerError(
                f"Expected a ledger that can be written; got {self.path}: {error.strerror or error}. No data may be "
                "used without it. Make room, or choose another place."
            ) from error
