# SPDX-License-Identifier: Apache-2.0
"""Reads IDX files, the format of MNIST and of the data sets that follow it."""

import gzip
import math
import zlib
from pathlib import Path

import torch
from torch import Tensor

from dpquant.errors import DataError


def read_idx(path: Path, *, dimensions: int) -> Tensor:
    """Read an IDX file of unsigned bytes, plain or .gz.

    Args:
      path: The file.
      dimensions: Their required number: 3 for images, 1 for labels.
    Returns: uint8, of the shape in the header.
    Raises: DataError: unreadable, of another type, of another size than its header states, or empty.
    Source: Y. LeCun, "The MNIST database": magic 0x000008DD (DD dimensions), DD sizes, all big-endian, then the data.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"Expected {path} to be a readable file; got {type(error).__name__}. Images and labels of both splits are "
            "needed. Fetch it again."
        ) from error
    header = 4 + 4 * dimensions
    shape = [int.from_bytes(content[start : start + 4], "big") for start in range(4, header, 4)]
    whole = content[:4] == bytes((0, 0, 8, dimensions)) and len(content) == header + math.prod(shape)
    if not whole or 0 in shape:
        raise DataError(
            f"Expected {path} to be a whole IDX file of unsigned bytes with {dimensions} dimension(s), none of them 0; "
            "its header or its size says otherwise. It is damaged or another kind of file. Fetch it again."
        )
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=header).reshape(shape)
