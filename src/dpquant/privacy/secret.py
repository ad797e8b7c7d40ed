# SPDX-License-Identifier: Apache-2.0
"""Secret randomness: one key from the operating system, and for every purpose an unpredictable stream of its own.

    stream(purpose) = AES-128(subkey, 0), AES-128(subkey, 1), ...,    subkey = blake2b(secret, purpose)

The sampler and the noise draw from here and from nowhere else. There is no state to store or to repeat by accident: a
stream is a function of the secret and of what it is for. Rounding, dropout and augmentation use fast hashes
(`dpquant.rounding`), under a key from here, because what they draw for a record follows its place in the data set.
Scheduling is public.

AES is the `cryptography` package's, that is OpenSSL's: under a nanosecond for 8 bytes where the processor has
instructions for it.

Sources: AES in counter mode, NIST SP 800-38A, section 6.5; keyed BLAKE2b, RFC 7693.
"""

import hashlib
import json
import os
from typing import NoReturn, Self

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from dpquant.errors import SettingError

SECRET_BYTES = 16
_ZEROS = bytes(2**19)  # counter mode adds the stream to a message; added to zeros, it is the stream


class RandomStream:
    """The bits for one purpose, read from their beginning. Made by `SecretKey.stream`."""

    def __init__(self, subkey: bytes):
        self._cipher = Cipher(algorithms.AES(subkey), modes.CTR(bytes(16))).encryptor()

    def words(self, count: int) -> np.ndarray:
        """The next `count` words.

        Args:
          count: how many; some ten thousand at a time are quickest.
        Returns: uint64 `(count,)`, uniform on 0 .. 2^64 - 1; may be read-only.
        Privacy: reads no data.
        """
        pieces, num_bytes = [], 8 * count
        while num_bytes > len(_ZEROS):
            pieces.append(self._cipher.update(_ZEROS))
            num_bytes -= len(_ZEROS)
        pieces.append(self._cipher.update(_ZEROS[:num_bytes]))  # a slice of everything is no copy
        stream = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        return np.frombuffer(stream, "<u8").astype(np.uint64, copy=False)


class SecretKey:
    """16 bytes that nobody else knows. Who has them can undo a run's privacy: they stay in memory, for that run only.

    Attributes:
      secure: False if the bytes came from a seed that a person chose, which can be guessed.
    """

    def __init__(self, secret: bytes | None = None):
        """A key.

        Args:
          secret: 16 uniform bytes; None takes fresh ones from the operating system.
        Raises:
          SettingError: another number of bytes.
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
        """A key that can be made again, for research. NOT PRIVATE: whoever guesses the seed knows every draw."""
        key = cls(hashlib.blake2b(str(seed).encode(), digest_size=SECRET_BYTES, person=b"dpquant.seed").digest())
        key.secure = False
        return key

    def integer(self, *purpose: str | int) -> int:
        """64 bits for one purpose, as a number: a key for draws that are hashes (`dpquant.rounding`)."""
        return int(self.stream("integer", *purpose).words(1)[0])

    def __reduce__(self) -> NoReturn:
        """A key stays in memory: a copy of it in a file would undo the run's privacy."""
        raise SettingError("Expected a secret key to stay in memory; got a copy or a pickle of it. Make another key.")

    def stream(self, *purpose: str | int) -> RandomStream:
        """The bits for one purpose, from their beginning.

        Args:
          purpose: what the bits are for. Other parts, types, order or grouping give an independent stream.
        Returns: a stream of AES-128 blocks. Keys and counters are big-endian, as the standard has them; each block is
        two little-endian words.
        Privacy: reads no data.
        """
        message = json.dumps(purpose).encode()  # tells ("a", 11) from ("a1", 1) and from ("a", "11")
        return RandomStream(
            hashlib.blake2b(message, key=self._secret, digest_size=16, person=b"dpquant.stream").digest()
        )


class Keyed:
    """What is random as a function of a secret key: noise, and who takes part in a step."""

    def __init__(self, key: SecretKey | None = None):
        """Take a key; None makes a fresh one."""
        self._key = SecretKey() if key is None else key

    @classmethod
    def from_seed(cls, seed: int) -> Self:
        """Return one whose draws can be repeated, for research. NOT PRIVATE."""
        return cls(SecretKey.from_seed(seed))

    @property
    def secure(self) -> bool:
        """False if the draws follow from a seed that a person chose."""
        return self._key.secure
