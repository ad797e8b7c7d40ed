# SPDX-License-Identifier: Apache-2.0
"""Counter-based random bits for stochastic rounding: each draw is a function of a key and an index, without state.

    key       = derive_key(seed, "step", step, layer, role, ...)      one per tensor that is quantized
    row key   = row_keys(key, record ids)                             one per example
    line key  = line_keys(row keys, number of lines)                  one per line of an example's map `(C, H, W)`
    23 bits   = element_bits(row or line keys, element index)         one draw per element

A record's draws therefore do not depend on batch, order, thread or device. They must not depend on the length of other
records either: batches are padded to their longest record, and otherwise removing the longest one would change the
codes of all others. So element (c, h, w) of a map draws by index w * C + c under the key of line h. Padding the map at
the end of H or W changes neither, while it would change a row-major index. A row that is not a map draws by row-major
index under its row key.

Construction. A row key is splitmix64 at counter record_id + 1 from state `key` (Steele, Lea, Flood 2014, "Fast
splittable pseudorandom number generators"); a line key is splitmix64 at counter h + 1 from the row key as state. The
finalizer is a bijection and the counter's step is odd, so keys are distinct for distinct counters under one state. A
draw hashes the 32-bit element index i under the two halves (low, high) of its row or line key:

    h = i ^ low;     h ^= h >> 16;     h *= 0x7FEB352D;
    h ^= high;       h ^= h >> 15;     h *= 0x846CA68B;     h ^= h >> 16;     draw = h >> 9

It is the two-multiply 32-bit finalizer `lowbias32` (C. Wellons, "Prospecting for hash functions", 2018) with a key word
in front of each half. Every step is invertible, so h is a bijection of i, of low and of high, the others held fixed:
over the whole range of any of them each of the 2^23 draws occurs exactly 2^9 times. Two 32-bit multiplies vectorise
well; the native kernel computes the same bits.

Privacy. The key must be secret and fresh for each run; `privacy/mechanism.py` derives it from the run's secret. Record
ids are positions in the data set: without record k, all later records move by one position and get other draws. Under a
secret key draws are exchangeable over records: the distribution of a run without k does not change if each remaining
record is given the draws that it had in the run with k. The sums then differ by the clipped contribution of record k
alone. Under a public key the guarantee would hold only between data sets in which all other records keep their ids.
The hash is fast, not cryptographic. That suffices because draws are never released; they only enter sums that are
clipped per record and noised. The Poisson sampler and the noise must not use it.
"""

import hashlib

import numpy as np
import torch
from torch import Tensor

from dpquant.errors import SettingError

DRAW_BITS = 23  # a draw is uniform on 0 .. 2^23 - 1; 23 is the number of mantissa bits of a float32
MAX_ELEMENTS = 2**32  # under one key; draws are indexed by 32 bits, so more would repeat

_LOW_32 = 0xFFFFFFFF
_STEP = 0x9E3779B97F4A7C15 - 2**64  # increment of splitmix64's state, as a signed integer with these 64 bits


def derive_key(*parts: int | str | bytes) -> int:
    """Return a 64-bit key, 0 <= key < 2^64, for `parts`; other parts, types or grouping give another key.

    Args:
      parts: any mixture of integers (of any size), strings and bytes.

    Returns: the 8-byte blake2b hash of the parts, each preceded by its type and length, as an integer.

    Raises:
      SettingError: a part has another type.

    Privacy: post-processing.
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        match part:
            case int():
                tag, data = b"i", part.to_bytes(part.bit_length() // 8 + 1, "little", signed=True)
            case str():
                tag, data = b"s", part.encode()
            case bytes():
                tag, data = b"b", part
            case _:
                raise SettingError(
                    f"Expected every part of a key to be an int, str or bytes; got a {type(part).__name__}. "
                    "Only these have one encoding. Convert it."
                )
        digest.update(tag + len(data).to_bytes(8, "little") + data)
    return int.from_bytes(digest.digest(), "little")


def row_keys(key: int, record_ids: Tensor) -> Tensor:
    """Return one 64-bit key per record: splitmix64 at counter `record_id + 1` from state `key`.

    Args:
      key: 0 <= key < 2^64, from `derive_key`.
      record_ids: int64 `(B,)`.

    Returns: int64 `(B,)`, the key's 64 bits; distinct for distinct ids.

    Raises:
      SettingError: the key is out of range, or the ids have another shape or dtype.

    Privacy: per example, reads no other row.
    """
    if not 0 <= key < 2**64:
        raise SettingError(
            f"Expected key in 0 .. 2^64 - 1; got key={key}. A stream's state has 64 bits. Make it by derive_key."
        )
    if record_ids.dtype != torch.int64 or record_ids.ndim != 1:
        raise SettingError(
            f"Expected record_ids of type int64 and shape (B,); got record_ids of {record_ids.dtype}, "
            f"{record_ids.ndim} axes. Every example needs one id. Give a vector of int64 ids."
        )
    return _finalized((record_ids + 1) * _STEP + _as_int64(key))


def line_keys(row_keys: Tensor, num_lines: int) -> Tensor:
    """Return one 64-bit key per line of each row: splitmix64 at counter `line + 1`, with the row key as state.

    Args:
      row_keys: int64 `(B,)`.
      num_lines: the number H of lines.

    Returns: int64 `(B, H)`, the keys' 64 bits; distinct for distinct lines of one row. They do not depend on H.

    Privacy: per example, reads no other row.
    """
    counter = torch.arange(1, num_lines + 1, device=row_keys.device)
    return _finalized(row_keys[:, None] + counter * _STEP)


def element_bits(row_keys: Tensor, index: Tensor) -> Tensor:
    """Return one 23-bit draw for each key and element index.

    Args:
      row_keys: int64 `(B,)`, of rows or of lines.
      index: int64 `(n,)`, 0 <= index < 2^32: positions inside a row or line.

    Returns: int64 `(B, n)`, values in 0 .. 2^23 - 1.

    Privacy: per example, reads no other row.
    """
    low = (row_keys & _LOW_32)[:, None]
    high = _shifted_right(row_keys, 32)[:, None]
    h = index[None, :] ^ low
    h = ((h ^ (h >> 16)) * 0x7FEB352D) & _LOW_32
    h = h ^ high
    h = ((h ^ (h >> 15)) * 0x846CA68B) & _LOW_32
    return (h ^ (h >> 16)) >> (32 - DRAW_BITS)


def _finalized(z: Tensor) -> Tensor:
    """Apply splitmix64's finalizer, a bijection of 64 bits."""
    if z.device.type == "cpu":  # a product of a small layer takes as long as these operators would
        return torch.from_numpy(_finalized_words(z.numpy().view(np.uint64)).view(np.int64))
    z = (z ^ _shifted_right(z, 30)) * _as_int64(0xBF58476D1CE4E5B9)
    z = (z ^ _shifted_right(z, 27)) * _as_int64(0x94D049BB133111EB)
    return z ^ _shifted_right(z, 31)


def _finalized_words(z: np.ndarray) -> np.ndarray:
    """As `_finalized`, on numbers without sign; NumPy takes a third of torch's time for some hundred of them."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _as_int64(bits: int) -> int:
    """Return the signed integer with these 64 bits, because torch has no arithmetic on uint64."""
    return bits - 2**64 if bits >= 2**63 else bits


def _shifted_right(z: Tensor, count: int) -> Tensor:
    """Shift int64 bits to the right logically: zeros are shifted in."""
    return (z >> count) & (2 ** (64 - count) - 1)
