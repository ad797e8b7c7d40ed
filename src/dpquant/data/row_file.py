# SPDX-License-Identifier: Apache-2.0
"""Reads chosen rows of a .npy file, whatever its size.

The file is mapped into memory. All rows of a batch are first asked for at once, since a device answers many requests
together sooner than one after another; then they are copied; then the mapped pages are given back, as they would count
as the process' own memory. The kernel keeps them as long as it has room.
"""

import mmap
import os
import weakref
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dpquant.data.paging import PAGING, Paging
from dpquant.errors import DataError


class RowFile:
    """The rows of a .npy file, which must stay as it is while they are read. Threads may read at the same time.

    Attributes:
      shape: of the whole array.
      dtype: of its elements.
    """

    def __init__(self, path: Path, paging: Paging = PAGING):
        """Open a file.

        Args:
          path: of the file.
          paging: what the operating system does for it.
        Raises:
          DataError: it is no array in C order, of at least one dimension, that is whole.
        """
        self._path, self._paging = path, paging
        try:
            with path.open("rb") as file:
                version = np.lib.format.read_magic(file)
                if version != (1, 0):
                    raise ValueError("another version")
                self.shape, in_columns, self.dtype = np.lib.format.read_array_header_1_0(file)
                self._begin = file.tell()
            self._size = self._begin + self.dtype.itemsize * int(np.prod(self.shape, dtype=np.int64))
            whole = path.stat().st_size == self._size and len(self.shape) > 0
            if in_columns or self.dtype.hasobject or not whole:
                raise ValueError("another layout")
            self._descriptor = os.open(path, os.O_RDONLY)
        except (OSError, ValueError) as error:
            raise DataError(
                f"Expected {path} to be an array as dpquant pack writes them; got another file. It is damaged or "
                "something else. Pack the records again."
            ) from error
        weakref.finalize(self, os.close, self._descriptor)
        self._map = mmap.mmap(self._descriptor, 0, access=mmap.ACCESS_READ)
        paging.advise(self._map, "RANDOM")
        self._array = np.ndarray(self.shape, self.dtype, buffer=self._map, offset=self._begin)

    def __len__(self) -> int:
        return self.shape[0]

    def rows(self, ids: Tensor) -> Tensor:
        """Return the rows with these ids, int64 (B,), in 0 .. N - 1, as a tensor of shape (B, ...).

        Raises:
          DataError: the file has become another one.
        """
        self._ask_for((row, row + 1) for row in ids.tolist())
        return self._taken(self._array[ids.numpy()])

    def runs(self, begins: Tensor, ends: Tensor) -> Tensor:
        """Return the rows begins[0] .. ends[0], begins[1] .. ends[1] and so on, one after another.

        Raises:
          DataError: the file has become another one.
        """
        runs = list(zip(begins.tolist(), ends.tolist(), strict=True))
        self._ask_for(runs)
        return self._taken(np.concatenate([self._array[begin:end] for begin, end in runs] or [self._array[:0]]))

    def _ask_for(self, runs: Iterable[tuple[int, int]]) -> None:
        """Have the device begin with all rows that come next, after a check that the file has not become shorter.

        To read beyond the end of a mapped file would end the process by a signal.

        Raises:
          DataError: it has.
          IndexError: a row is out of range.
        """
        if os.fstat(self._descriptor).st_size != self._size:
            raise DataError(
                f"Expected {self._path} to stay as it was when the run began; it has another size. Records would be "
                "missing. Restore the file, or pack the records again."
            )
        row = self._array.nbytes // max(len(self), 1)
        for begin, end in runs:
            if not 0 <= begin <= end <= len(self):
                raise IndexError(f"row out of range of {self._path.name}")
            self._paging.will_need(self._descriptor, self._begin + begin * row, (end - begin) * row)

    def _taken(self, found: np.ndarray) -> Tensor:
        """Return rows that were copied, after the process has given the mapped pages back."""
        self._paging.advise(self._map, "DONTNEED")
        return torch.from_numpy(found)
