# SPDX-License-Identifier: Apache-2.0
"""A mechanism's parts follow from one secret; what can be repeated is marked as research, and cannot hide it."""

import dataclasses
import pickle

import pytest
import torch

from dpquant.errors import LedgerError, SettingError
from dpquant.privacy.ledger import Ledger
from dpquant.privacy.mechanism import Mechanism
from dpquant.privacy.noise import NoiseSource
from dpquant.privacy.sampling import PoissonSampler
from dpquant.privacy.secret import SecretKey

FOR = {"stream": "train", "step": 2, "attempt": 1}


def drawn(mechanism):
    """A number of each part."""
    noise = mechanism.noise.gaussian((4,), 1.0, **FOR, name="w")
    return tuple(mechanism.sampler.draw(200, 0.5, **FOR).tolist()), tuple(noise.tolist()), mechanism.record_key


def assert_all_parts_are_secret(make):
    """No two mechanisms have anything in common, and each says that it is secure."""
    made = [make() for _ in range(20)]
    for part in zip(*map(drawn, made), strict=True):
        assert len(set(part)) == len(made)
    assert all(one.secure and not one.ledger.research for one in made)


def test_all_parts_are_secret():
    assert_all_parts_are_secret(lambda: Mechanism.secret(None))


@pytest.mark.parametrize(
    "public",
    [
        {"sampler": PoissonSampler(SecretKey(bytes(16)))},
        {"noise": NoiseSource(SecretKey(bytes(16)))},
        {"record_key": 5},
    ],
)
def test_a_part_that_is_not_secret_would_be_seen(public):
    with pytest.raises(AssertionError):
        assert_all_parts_are_secret(lambda: dataclasses.replace(Mechanism.secret(None), **public))


def test_a_seed_repeats_all_parts_and_the_ledger_says_so(tmp_path):
    first, second = (Mechanism.repeatable(7, path) for path in (None, tmp_path / "ledger"))
    assert drawn(first) == drawn(second) != drawn(Mechanism.repeatable(8, None))
    second.ledger.charge(kind="train", sample_rate=0.1, noise_multiplier=1.0)
    (event,) = Ledger.read(tmp_path / "ledger")
    assert event.research and not second.secure


def test_a_run_that_continues_has_another_key_and_the_same_ledger(tmp_path):
    first = Mechanism.secret(tmp_path / "ledger")
    first.ledger.charge(kind="train", sample_rate=0.1, noise_multiplier=1.0)
    first.ledger.close()
    second = Mechanism.secret(Ledger.resumed(tmp_path / "ledger"))
    assert second.ledger.attempt == 2 and second.ledger.events() == first.ledger.events()
    assert drawn(second) != drawn(first) and second.secure
    second.ledger.close()
    with pytest.raises(SettingError, match="marked as research"):
        Mechanism.repeatable(7, Ledger.resumed(tmp_path / "ledger"))
    assert not Mechanism.repeatable(7, Ledger.resumed(tmp_path / "ledger", research=True)).secure
    assert not Mechanism.secret(Ledger.resumed(tmp_path / "ledger")).secure  # what was charged stays as it was


def test_a_key_from_elsewhere_gives_the_same_mechanism_in_every_process():
    first, second = (Mechanism.keyed(SecretKey(b"sent by the first"[:16]), None) for _ in range(2))
    assert drawn(first) == drawn(second) and first.secure


@pytest.mark.parametrize("part", ["sampler", "noise"])
def test_what_can_be_repeated_needs_a_ledger_that_says_so(part):
    repeatable = getattr(Mechanism.repeatable(7, None), part)
    with pytest.raises(SettingError, match="marked as research"):
        dataclasses.replace(Mechanism.secret(None), **{part: repeatable})
    marked = dataclasses.replace(Mechanism.secret(None), **{part: repeatable, "ledger": Ledger(research=True)})
    assert not marked.secure


def test_a_ledger_for_research_makes_a_run_that_is_not_private():
    assert not dataclasses.replace(Mechanism.secret(None), ledger=Ledger(research=True)).secure


def test_the_ledgers_folder_is_made_and_a_place_that_cannot_be_used_is_refused(tmp_path):
    assert Mechanism.secret(tmp_path / "a" / "b" / "ledger").ledger.events() == []
    assert (tmp_path / "a" / "b" / "ledger").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(LedgerError, match="ledger that can be written"):
        Mechanism.secret(tmp_path / "file" / "ledger")


def test_a_mechanism_shows_no_secret_and_cannot_be_written_down():
    mechanism = Mechanism.secret(None)
    assert str(mechanism.record_key) not in repr(mechanism)
    with pytest.raises(SettingError, match="stay in memory"):
        pickle.dumps(mechanism)


def test_the_key_of_records_is_no_number_of_another_stream():
    key = SecretKey(b"a key for tests!")
    others = [key.integer(), key.integer("step"), int(key.stream("records").words(1)[0])]
    assert Mechanism.keyed(key, None).record_key not in others
    assert torch.equal(Mechanism.keyed(key, None).sampler.draw(9, 1.0, **FOR), torch.arange(9))
