# SPDX-License-Identifier: Apache-2.0
"""Secret randomness: one key from the operating system, and an unpredictable stream of bits for every purpose.

    stream(purpose) = AES-128(subkey, 0), AES-128(subkey, 1), ...,    subkey = blake2b(secret, purpose)

Sampler and noise take all of their bits from here. There is no state to store, or to repeat by accident: a stream is a
function of the secret and of its purpose. Rounding, dropout and augmentation use fast hashes (`dpquant.rounding`) under
a key that is derived here. The random numbers of a record depend on its position in the data set, so they have to be
secret too. The layer schedule uses a public seed instead.

AES is that of the `cryptography` package, which is OpenSSL's: under a nanosecond for 8 bytes where the processor has
AES instructions.

Sources: AES in counter mode, NIST SP 800-38A, section 6.5; keyed BLAKE2b, RFC 7693.
"""

import hashlib
import json
import os
from collections.abc import Callable
from typing import NoReturn, Self

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from dpquant.errors import SettingError

SECRET_BYTES = 16
_ZEROS = bytes(2**19)  # counter mode XORs the stream with a message; with zeros, the result is the stream itself


class RandomStream:
    """The random bits for one purpose, read in order. Made by `SecretKey.stream`."""

    def __init__(self, subkey: bytes, blocks: int = 0):
        self._cipher = Cipher(algorithms.AES(subkey), modes.CTR(blocks.to_bytes(16, "big"))).encryptor()

    def words(self, count: int) -> np.ndarray:
        """Return the next `count` words.

        Args:
          count: number of words; tens of thousands at a time are fastest.
        Returns: uint64 `(count,)`, uniform on 0 .. 2^64 - 1; may be read-only.
        Privacy: reads no data.
        """
        pieces, num_bytes = [], 8 * count
        while num_bytes > len(_ZEROS):
            pieces.append(self._cipher.update(_ZEROS))
            num_bytes -= len(_ZEROS)
        pieces.append(self._cipher.update(_ZEROS[:num_bytes]))  # no copy where the slice is the whole buffer
        stream = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        return np.frombuffer(stream, "<u8").astype(np.uint64, copy=False)


class SecretKey:
    """A secret key of 16 bytes. Whoever has it can undo a run's privacy, so it stays in memory, for that run only.

    Attributes:
      secure: False if the bytes came from a seed that a person chose, which can be guessed.
    """

    def __init__(self, secret: bytes | None = None):
        """Make a key.

        Args:
          secret: 16 uniform bytes; None takes fresh ones from the operating system.
        Raises:
          SettingError: secret has another length.
        """
        if secret is not None and len(secret) != SECRET_BYTES:
            raise SettingError(
                f"Expected secret of {SECRET_BYTES} bytes; got {len(secret)}. It keys AES-128. "
                "Leave it out for a fresh one."
            )
        self._secret = os.urandom(SECRET_BYTES) if secret is None else secret
        self.secure = True

    @classmethod
    def from_seed(cls, seed: int) -> Self:
        """Return the key of a seed, for research. NOT PRIVATE: whoever guesses the seed knows every draw."""
        key = cls(hashlib.blake2b(str(seed).encode(), digest_size=SECRET_BYTES, person=b"dpquant.seed").digest())
        key.secure = False
        return key

    def integer(self, *purpose: str | int) -> int:
        """Return 64 bits for one purpose as an integer, for use as a key of hashes (`dpquant.rounding`)."""
        return int(self.stream("integer", *purpose).words(1)[0])

    def __reduce__(self) -> NoReturn:
        """Refuse to copy or pickle the key: a copy of it in a file would undo the run's privacy."""
        raise SettingError("Expected a secret key to stay in memory; got a copy or a pickle of it. Make another key.")

    def of_first(self, from_first: Callable[[bytes], bytes]) -> "SecretKey":
        """Return the key of the first process of a run, on each of its processes.

        Args:
          from_first: sends bytes from that process to all.
        Privacy: the key travels between processes, once, and is written nowhere. Whoever can read what they send can
          undo the run's privacy.
        """
        key = SecretKey(from_first(self._secret))
        key.secure = self.secure
        return key

    def stream(self, *purpose: str | int, blocks: int = 0) -> RandomStream:
        """Return the stream of random bits for one purpose.

        Args:
          purpose: names and numbers. Purposes that differ in a part, its type, order or grouping give independent
            streams.
          blocks: number of blocks, of two words each, after which it begins; reaching them takes no time.
        Returns: a stream of AES-128 blocks. Counters are big-endian, as in the standard; each block is two
          little-endian words.
        Privacy: reads no data.
        """
        message = json.dumps(purpose).encode()  # distinguishes ("a", 11) from ("a1", 1) and from ("a", "11")
        return RandomStream(
            hashlib.blake2b(message, key=self._secret, digest_size=16, person=b"dpquant.stream").digest(), blocks
        )


class Keyed:
    """Base class of `PoissonSampler` and `NoiseSource`: randomness as a function of a secret key."""

    def __init__(self, key: SecretKey | None = None):
        """Keep a key; None makes a fresh one."""
        self._key = SecretKey() if key is None else key

    @classmethod
    def from_seed(cls, seed: int) -> Self:
        """Return an instance whose draws can be repeated, for research. NOT PRIVATE."""
        return cls(SecretKey.from_seed(seed))

    @property
    def secure(self) -> bool:
        """False if the draws follow from a seed that a person chose."""
        return self._key.secure
