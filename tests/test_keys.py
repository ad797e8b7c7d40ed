# SPDX-License-Identifier: Apache-2.0
"""A key's streams are AES-128 in counter mode, one for each purpose; keys are fresh unless a seed was asked for."""

import hashlib

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from dpquant.errors import SettingError
from dpquant.keys import SecretKey

SECRET = bytes(range(16))
PURPOSES = [("a", 11), ("a1", 1), ("a", "11"), ("a", 1, 1), (11, "a"), ("a",), ("", "a"), (), ('a", 11',), ("ä",)]


def aes_counter_mode(subkey: bytes, num_blocks: int) -> np.ndarray:
    """AES-128 of 0, 1, 2, ..., as 64-bit words; block, key and counter in little-endian order."""
    cipher = Cipher(algorithms.AES(subkey), modes.ECB()).encryptor()
    return np.frombuffer(b"".join(cipher.update(i.to_bytes(16, "little")) for i in range(num_blocks)), "<u8")


def test_a_stream_is_aes_in_counter_mode_under_a_hashed_key():
    message, person = b'["sampling", "train", 3, 1]', b"dpquant.stream"
    subkey = hashlib.blake2b(message, key=SECRET, digest_size=16, person=person).digest()
    raw = SecretKey(SECRET).stream("sampling", "train", 3, 1).random_raw(1000)
    assert np.array_equal(raw, aes_counter_mode(subkey, 500))


def assert_every_purpose_has_its_own_stream(stream) -> None:
    words = np.concatenate([stream(*purpose).random_raw(100) for purpose in PURPOSES])
    assert len(np.unique(words)) == 100 * len(PURPOSES)


def test_every_purpose_has_its_own_stream():
    assert_every_purpose_has_its_own_stream(SecretKey(SECRET).stream)


def test_joining_the_parts_of_a_purpose_would_be_seen():
    with pytest.raises(AssertionError):
        assert_every_purpose_has_its_own_stream(lambda *parts: SecretKey(SECRET).stream("".join(map(str, parts))))


def test_a_stream_is_a_function_of_key_and_purpose():
    assert np.array_equal(SecretKey(SECRET).stream("x").random_raw(8), SecretKey(SECRET).stream("x").random_raw(8))


def test_keys_are_fresh_and_secret_unless_they_come_from_a_seed():
    fresh = [SecretKey().stream("x").random_raw(1)[0] for _ in range(100)]
    assert len(set(fresh)) == 100
    assert SecretKey().secure
    assert not SecretKey.from_seed(0).secure
    seeded = [SecretKey.from_seed(seed).stream("x").random_raw(1)[0] for seed in (-1, 0, 1, 2**200, 0)]
    assert len(set(seeded)) == 4


def test_nothing_shows_the_secret():
    assert not any(word in repr(SecretKey(SECRET)) for word in (SECRET.hex(), repr(SECRET)))


def test_short_secrets_are_refused_without_being_shown():
    with pytest.raises(SettingError, match="16 bytes; got 5") as refusal:
        SecretKey(b"short")
    assert "short" not in str(refusal.value)
