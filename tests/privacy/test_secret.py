# SPDX-License-Identifier: Apache-2.0
"""A key's streams are AES-128 in counter mode, one for each purpose; keys are fresh unless a seed was asked for."""

import copy
import hashlib
import pickle

import numpy as np
import pytest
from randomgen import AESCounter

from dpquant.errors import SettingError
from dpquant.privacy.secret import RandomStream, SecretKey

SECRET = bytes(range(16))
PURPOSES = [("a", 11), ("a1", 1), ("a", "11"), ("a", 1, 1), (11, "a"), ("a",), ("", "a"), (), ('a", 11',), ("ä",)]


def aes_counter_mode(subkey: bytes, num_blocks: int) -> np.ndarray:
    """AES-128 of 0, 1, 2, ..., as 64-bit words, by another library, whose keys and counters are little-endian."""
    key, counters = int.from_bytes(subkey, "little"), [i.to_bytes(16, "big") for i in range(num_blocks)]
    generators = [AESCounter(key=key, counter=int.from_bytes(counter, "little")) for counter in counters]
    return np.concatenate([generator.random_raw(2) for generator in generators])


def assert_stream_is_the_standards(stream) -> None:
    message, person = b'["sampling", "train", 3, 1]', b"dpquant.stream"
    subkey = hashlib.blake2b(message, key=SECRET, digest_size=16, person=person).digest()
    assert np.array_equal(stream("sampling", "train", 3, 1).words(1000), aes_counter_mode(subkey, 500))


def test_a_stream_is_aes_in_counter_mode_under_a_hashed_key():
    assert_stream_is_the_standards(SecretKey(SECRET).stream)


@pytest.mark.parametrize("skipped", [2, 256])
def test_a_stream_that_begins_elsewhere_would_be_seen(skipped):
    def late(*purpose):
        stream = SecretKey(SECRET).stream(*purpose)
        stream.words(skipped)
        return stream

    with pytest.raises(AssertionError):
        assert_stream_is_the_standards(late)


def test_the_first_block_is_the_published_one():
    """AES-128 of the zero block under the zero key: H of test case 1 of the GCM specification."""
    assert RandomStream(bytes(16)).words(2).astype("<u8").tobytes().hex() == "66e94bd4ef8a2c3b884cfa59ca342b2e"


@pytest.mark.parametrize("parts", [(0, 1, 2, 3, 194), (70_000, 130_000), (65_536, 65_536, 1), (65_537, 65_535)])
def test_a_stream_may_be_read_in_parts(parts):
    whole, stream = SecretKey(SECRET).stream("x").words(sum(parts)), SecretKey(SECRET).stream("x")
    read = [stream.words(count) for count in parts]
    assert [len(part) for part in read] == list(parts)
    assert np.array_equal(np.concatenate(read), whole)


def assert_every_purpose_has_its_own_stream(stream) -> None:
    words = np.concatenate([stream(*purpose).words(100) for purpose in PURPOSES])
    assert len(np.unique(words)) == 100 * len(PURPOSES)


def test_every_purpose_has_its_own_stream():
    assert_every_purpose_has_its_own_stream(SecretKey(SECRET).stream)


def test_joining_the_parts_of_a_purpose_would_be_seen():
    with pytest.raises(AssertionError):
        assert_every_purpose_has_its_own_stream(lambda *parts: SecretKey(SECRET).stream("".join(map(str, parts))))


def test_a_stream_is_a_function_of_key_and_purpose():
    assert np.array_equal(SecretKey(SECRET).stream("x").words(8), SecretKey(SECRET).stream("x").words(8))


def test_keys_are_fresh_and_secret_unless_they_come_from_a_seed():
    fresh = [SecretKey().stream("x").words(1)[0] for _ in range(100)]
    assert len(set(fresh)) == 100
    assert SecretKey().secure
    assert not SecretKey.from_seed(0).secure
    seeded = [SecretKey.from_seed(seed).stream("x").words(1)[0] for seed in (-1, 0, 1, 2**200, 0)]
    assert len(set(seeded)) == 4


def test_nothing_shows_the_secret():
    assert not any(word in repr(SecretKey(SECRET)) for word in (SECRET.hex(), repr(SECRET)))


def test_short_secrets_are_refused_without_being_shown():
    with pytest.raises(SettingError, match="16 bytes; got 5") as refusal:
        SecretKey(b"short")
    assert "short" not in str(refusal.value)


def assert_integers_are_64_bits_of_their_own(integer) -> None:
    found = [integer(*purpose) for purpose in PURPOSES]
    assert all(type(number) is int and 0 <= number < 2**64 for number in found) and len(set(found)) == len(PURPOSES)
    assert all(len({number >> bit & 1 for number in map(integer, range(64))}) == 2 for bit in range(64))
    assert found == [integer(*purpose) for purpose in PURPOSES]
    taken = {int(SecretKey(SECRET).stream(*purpose).words(1)[0]) for purpose in PURPOSES}
    assert not taken & set(found)  # what a stream of that purpose begins with


def test_an_integer_is_64_bits_of_its_own_purpose():
    assert_integers_are_64_bits_of_their_own(SecretKey(SECRET).integer)
    assert SecretKey(SECRET).integer("x") == int(SecretKey(SECRET).stream("integer", "x").words(1)[0])


@pytest.mark.parametrize(
    "planted",
    [
        lambda *purpose: int(SecretKey(SECRET).stream(*purpose).words(1)[0]),
        lambda *purpose: int(SecretKey(SECRET).stream("integer", *purpose).words(1)[0]) >> 1,
        lambda *purpose: int(SecretKey().stream("integer", *purpose).words(1)[0]),
        lambda *purpose: int(SecretKey(SECRET).stream("integer").words(1)[0]),
    ],
    ids=["of the same stream", "63 bits", "another each time", "one for all"],
)
def test_integers_of_fewer_bits_or_another_s_stream_would_be_seen(planted):
    with pytest.raises(AssertionError):
        assert_integers_are_64_bits_of_their_own(planted)


def assert_stays_in_memory(key) -> None:
    for leave in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(SettingError, match="stay in memory") as refusal:
            leave(key)
        assert SECRET.hex() not in str(refusal.value)


def test_a_key_cannot_be_copied_or_pickled():
    assert_stays_in_memory(SecretKey(SECRET))


class Pickled(SecretKey):
    __reduce__ = object.__reduce__


def test_a_key_that_can_be_pickled_would_be_seen():
    assert SECRET in pickle.dumps(Pickled(SECRET))
    with pytest.raises(pytest.fail.Exception):
        assert_stays_in_memory(Pickled(SECRET))
