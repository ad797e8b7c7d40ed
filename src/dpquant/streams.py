# SPDX-License-Identifier: Apache-2.0
"""Random bits for stochastic rounding, as a function of what they are for: no generator, no state, nothing to store.

    key       = derive_key(seed, "step", step, layer, role, ...)      one per tensor that is quantized
    row key   = row_keys(key, record ids)                             one per example
    23 bits   = element_bits(row keys, element index)                 one draw per element

A record therefore gets the same draws whatever batch, order, thread or device handles it.

Construction. A row key is splitmix64 at counter record_id + 1 from state `key` (Steele, Lea, Flood 2014, "Fast
splittable pseudorandom number generators"). A draw hashes the 32-bit element index i under the two halves (low, high)
of the row key:

    h = i ^ low;     h ^= h >> 16;     h *= 0x7FEB352D;
    h ^= high;       h ^= h >> 15;     h *= 0x846CA68B;     h ^= h >> 16;     draw = h >> 9

It is the two-multiply 32-bit finalizer `lowbias32` (C. Wellons, "Prospecting for hash functions", 2018) with a key word
in front of each half. Every step is invertible, so h is a bijection of i, of low and of high, the others held fixed:
over the whole range of any of them each of the 2^23 draws occurs exactly 2^9 times. Two 32-bit multiplies vectorise
well; the native kernel computes the same bits.

This is no cryptographic source and needs to be none: differential privacy holds for any fixed rounding stream, because
each example is rounded by itself and clipped afterwards. The Poisson sampler and the noise must never draw from here.
"""

import hashlib

import torch
from torch import Tensor

from dpquant.errors import SettingError

DRAW_BITS = 23  # a draw is uniform on 0 .. 2^23 - 1: as many bits as a float32 has mantissa
MAX_ELEMENTS = 2**32  # of one row; beyond it element indices would repeat

_LOW_32 = 0xFFFFFFFF


def derive_key(*parts: int | str | bytes) -> int:
    """A 64-bit key, 0 <= key < 2^64, that names `parts`: other parts, types or grouping give another key.

    Args:
      parts: any mixture of integers (of any size), strings and bytes.

    Returns: an integer from blake2b over the parts, each with its type and length in front.

    Raises:
      SettingError: a part is of another type.

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
    """One 64-bit key per record: splitmix64 at counter `record_id + 1` from state `key`.

    Args:
      key: 0 <= key < 2^64, as `derive_key` makes it.
      record_ids: int64 `(B,)`.

    Returns: int64 `(B,)`, the key's 64 bits; distinct for distinct ids.

    Raises:
      SettingError: the key is out of range, or the ids have another shape or type.

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
    z = (record_ids + 1) * _as_int64(0x9E3779B97F4A7C15) + _as_int64(key)
    z = (z ^ _shifted_right(z, 30)) * _as_int64(0xBF58476D1CE4E5B9)
    z = (z ^ _shifted_right(z, 27)) * _as_int64(0x94D049BB133111EB)
    return z ^ _shifted_right(z, 31)


def element_bits(row_keys: Tensor, index: Tensor) -> Tensor:
    """One 23-bit draw for each row and element index.

    Args:
      row_keys: int64 `(B,)`.
      index: int64 `(n,)`, 0 <= index < 2^32: positions inside a row.

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


def _as_int64(bits: int) -> int:
    """The signed integer with the same 64 bits, as torch wants them."""
    return bits - 2**64 if bits >= 2**63 else bits


def _shifted_right(z: Tensor, count: int) -> Tensor:
    """Logical shift of int64 bits: zeros come in from the left."""
    return (z >> count) & (2 ** (64 - count) - 1)
