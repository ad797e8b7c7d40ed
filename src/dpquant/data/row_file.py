# SPDX-License-Identifier: Apache-2.0
"""Reads chosen rows of a .npy file, whatever its size.

Rows are read by position and not mapped into memory. What is read of a mapped file counts as the process' own memory
until the kernel takes it back, a row of many pages comes page by page, and a file that becomes shorter meanwhile would
end the process by a signal instead of an error.
"""

import os
import weakref
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dpquant.errors import DataError


class RowFile:
    """The rows of a .npy file, which must stay as it is while they are read. Threads may read at the same time.

    Attributes:
      shape: of the whole array.
      dtype: of its elements.
    """

    def __init__(self, path: Path):
        """Open a file.

        Raises:
          DataError: it is no array in C order, of at least one dimension, that is whole.
        """
        self._path = path
        try:
            with path.open("rb") as file:
                version = np.lib.format.read_magic(file)
                if version != (1, 0):
                    raise ValueError("another version")
                self.shape, in_columns, self.dtype = np.lib.format.read_array_header_1_0(file)
                self._begin = file.tell()
            size = self._begin + self.dtype.itemsize * int(np.prod(self.shape, dtype=np.int64))
            whole = path.stat().st_size == size and len(self.shape) > 0
            if in_columns or self.dtype.hasobject or not whole:
                raise ValueError("another layout")
            self._descriptor = os.open(path, os.O_RDONLY)
        except (OSError, ValueError) as error:
            raise DataError(
                f"Expected {path} to be an array as dpquant pack writes them; got another file. It is damaged or "
                "something else. Pack the records again."
            ) from error
        weakref.finalize(self, os.close, self._descriptor)

    def __len__(self) -> int:
        return self.shape[0]

    def rows(self, ids: Tensor) -> Tensor:
        """Return the rows with these ids, int64 (B,), in 0 .. N - 1, as a tensor of shape (B, ...).

        Raises:
          DataError: the file cannot be read any more.
        """
        return self._read((row, row + 1) for row in ids.tolist())

    def runs(self, begins: Tensor, ends: Tensor) -> Tensor:
        """Return the rows begins[0] .. ends[0], begins[1] .. ends[1] and so on, one after another.

        Raises:
          DataError: the file cannot be read any more.
        """
        return self._read(zip(begins.tolist(), ends.tolist(), strict=True))

    def _read(self, runs: Iterable[tuple[int, int]]) -> Tensor:
        runs = list(runs)
        if any(not 0 <= begin <= end <= len(self) for begin, end in runs):
            raise IndexError(f"row out of range of {self._path.name}")
        found = np.empty((sum(end - begin for begin, end in runs), *self.shape[1:]), dtype=self.dtype)
        if found.size == 0:
            return torch.from_numpy(found)
        flat = found.reshape(-1).view(np.uint8).data
        row = found.nbytes // len(found)
        for begin, end in runs:  # the device gets all requests at once
            os.posix_fadvise(self._descriptor, self._begin + begin * row, (end - begin) * row, os.POSIX_FADV_WILLNEED)
        place = 0
        for begin, end in runs:
            size = (end - begin) * row
            self._fill(flat[place : place + size], self._begin + begin * row)
            place += size
        return torch.from_numpy(found)

    def _fill(self, into: memoryview, offset: int) -> None:
        """Read bytes from an offset on; one call gives at most 2 GiB."""
        while len(into):
            try:
                read = os.preadv(self._descriptor, [into], offset)
            except OSError:
                read = 0
            if read == 0:
                raise DataError(
                    f"Expected {self._path} to stay as it was when the run began; it cannot be read as far. Records "
                    "would be missing. Restore the file, or pack the records again."
                )
            into, offset = into[read:], offset + read
