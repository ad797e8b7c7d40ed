# SPDX-License-Identifier: Apache-2.0
"""Private records are read and collated a microbatch at a time; each is judged, and draws, by itself."""

import dataclasses
import random

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, default_collate

from dpquant.checks.synthetic import candidates
from dpquant.engine.batches import leaves
from dpquant.errors import DataError, SettingError
from dpquant.training.records import Collated, Records

CPU = torch.device("cpu")
COUNT = 12


class Rows(Dataset):
    """Record i is i everywhere, unless something is done to it."""

    def __init__(self, change=None):
        self.change = change or {}

    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        record = torch.full((3,), float(index)), torch.tensor(index)
        return self.change[index](record) if index in self.change else record


def records_of(data_set, collate=default_collate, kind=Records):
    first = next(iter(candidates([Rows()[0]], collate, CPU)))
    return kind(data_set, collate, CPU, first)


def read(records, ids, size=4, key=1):
    return list(records.microbatches(torch.tensor(ids, dtype=torch.int64), size, key))


def counted(pieces):
    """The ids of the rows that count, and the rows."""
    ids = [int(i) for piece in pieces for i in piece.record_ids[: piece.num_examples]]
    rows = [row for piece in pieces for row in piece.data[0][: piece.num_examples].tolist()]
    return ids, rows


def assert_each_row_is_its_records(pieces, ids, size):
    found, rows = counted(pieces)
    assert found == ids and rows == [[float(i)] * 3 for i in ids]
    for piece in pieces:
        assert len(piece.record_ids) == len(piece.data[0]) == len(piece.data[1]) == size
        assert torch.equal(piece.data[1], piece.record_ids)  # copies too


@pytest.mark.parametrize("ids", [[], [5], [3, 1, 2], [0, 1, 2, 3], [7, 2, 9, 4, 11], list(range(COUNT))])
def test_every_record_is_a_row_of_its_own_and_the_last_fills_up(ids):
    assert_each_row_is_its_records(read(records_of(Rows()), ids), ids, 4)


@pytest.mark.parametrize("planted", [lambda ids: ids.roll(1), lambda ids: ids * 0], ids=["moved", "all the first"])
def test_rows_that_are_not_their_records_are_caught(planted):
    honest = read(records_of(Rows()), [3, 1, 2])
    moved = [dataclasses.replace(piece, record_ids=planted(piece.record_ids)) for piece in honest]
    assert_each_row_is_its_records(honest, [3, 1, 2], 4)
    with pytest.raises(AssertionError):
        assert_each_row_is_its_records(moved, [3, 1, 2], 4)


# Broken records.


def raises(error):
    def change(record):
        raise error("record 5: private words")

    return change


BROKEN = {
    "an error": raises(OSError),
    "an index": raises(IndexError),
    "a refusal": raises(DataError),
    "the end": raises(StopIteration),
    "nothing": lambda record: None,
    "another shape": lambda record: (record[0][:2], record[1]),
    "another type": lambda record: (record[0].double(), record[1]),
    "one value more": lambda record: (*record, torch.tensor(0)),
}


def assert_without(broken, pieces, ids):
    assert_each_row_is_its_records(pieces, [i for i in ids if i not in broken], 4)


@pytest.mark.parametrize("change", BROKEN.values(), ids=BROKEN)
def test_a_broken_record_is_left_out_and_the_others_stay(change):
    ids = [1, 5, 2, 8, 3]
    assert_without({5}, read(records_of(Rows({5: change})), ids), ids)
    assert_without({1, 5}, read(records_of(Rows({5: change, 1: change})), ids), ids)
    assert read(records_of(Rows(dict.fromkeys(ids, change))), ids) == []


class AllSound(Records):
    def _is_sound(self, record):
        return True


def test_a_broken_record_that_counts_is_caught():
    with pytest.raises((AssertionError, DataError)):
        rows = records_of(Rows({5: BROKEN["another type"]}), kind=AllSound)
        assert_without({5}, read(rows, [1, 5, 2]), [1, 5, 2])


def test_want_of_memory_is_no_broken_record():
    with pytest.raises(MemoryError):
        read(records_of(Rows({5: raises(MemoryError)})), [1, 5])

    def collate(records):
        raise MemoryError

    with pytest.raises(MemoryError):
        read(Records(Rows(), collate, CPU, records_of(Rows())._specimens), [1, 5])


class Several(Rows):
    """Reads several records at once."""

    def __init__(self, change=None, extra=0):
        super().__init__(change)
        self.extra, self.asked = extra, []

    def __getitems__(self, indices):
        self.asked.append(list(indices))
        return [self[index] for index in indices] + [self[0]] * self.extra


def test_a_data_set_that_reads_several_records_at_once_is_asked_for_them():
    rows = Several()
    assert_each_row_is_its_records(read(records_of(rows), [4, 6, 1]), [4, 6, 1], 4)
    assert rows.asked == [[4, 6, 1]]


@pytest.mark.parametrize("rows", [Several({5: raises(OSError)}), Several({5: BROKEN["nothing"]}), Several(extra=1)])
def test_where_that_fails_each_is_read_by_itself(rows):
    ids = [4, 5, 1]
    assert_without({5} if rows.change else set(), read(records_of(rows), ids), ids)


def picky(records):
    if any(int(record[1]) == 5 for record in records):
        raise ValueError("label 5")
    return default_collate(records)


def test_a_record_on_which_the_collate_function_raises_is_left_out():
    ids = [1, 5, 2, 8]
    assert_without({5}, read(records_of(Rows(), picky), ids), ids)
    assert read(records_of(Rows(), picky), [5]) == []


def comparing(records):
    if len({int(record[1]) for record in records}) > 3:
        raise ValueError("too many labels")
    return default_collate(records)


def test_a_collate_function_that_takes_records_alone_but_not_together_is_refused():
    assert len(read(records_of(Rows(), comparing), [1, 2, 3])) == 1
    with pytest.raises(DataError, match="collates alone") as refused:
        read(records_of(Rows(), comparing), [1, 2, 3, 4])
    assert not any(character.isdigit() for character in str(refused.value))


def dropping(records):
    return default_collate([record for record in records if int(record[1]) != 5])


def test_rows_that_are_missing_are_refused_without_a_number():
    with pytest.raises(DataError, match="one row for each record") as refused:
        read(records_of(Rows(), dropping), [1, 5, 2])
    assert not any(character.isdigit() for character in str(refused.value))


def test_a_collate_function_that_returns_no_tensors_is_refused():
    with pytest.raises(SettingError, match="got a str"):
        read(Records(Rows(), lambda records: ["a"] * len(records), CPU, records_of(Rows())._specimens), [1])


# Random numbers of a data set and of a collate function.

GENERATOR = torch.Generator().manual_seed(0)
DRAWS = {
    "torch": lambda record: (record[0] + torch.rand(3), record[1]),
    "torch in place": lambda record: (torch.empty(3).normal_(), record[1]),
    "numpy": lambda record: (record[0] + float(np.random.rand()), record[1]),
    "python": lambda record: (record[0] + random.random(), record[1]),
    "a generator of its own": lambda record: (record[0] + torch.rand(3, generator=GENERATOR), record[1]),
}


def drawing(change):
    return Rows(dict.fromkeys(range(COUNT), change))


def by_id(pieces):
    ids, rows = counted(pieces)
    return dict(zip(ids, map(tuple, rows), strict=True))


def assert_draws_follow_key_and_record(make, kind=Records):
    """The same record in other company, at another place and after others is the same; others and other keys differ."""
    records = records_of(make(), kind=kind)
    found = by_id(read(records, [3, 1, 2, 8]))
    elsewhere = by_id(read(records, [9, 8, 4, 0, 3, 2]))
    assert all(elsewhere[i] == found[i] for i in (8, 3, 2))
    assert by_id(read(records_of(make(), kind=kind), [8])) == {8: found[8]}
    others = by_id(read(records, [3, 1, 2, 8], key=2))
    assert all(others[i] != found[i] for i in found)
    offsets = {tuple(round(value - i, 4) for value in row) for i, row in found.items()}
    assert len(offsets) == 4


@pytest.mark.parametrize("change", DRAWS.values(), ids=DRAWS)
def test_a_data_sets_random_numbers_follow_from_key_and_record(change):
    assert_draws_follow_key_and_record(lambda: drawing(change))


class ByPlace(Records):
    """Records draw one after the other from the step's stream."""

    def _with_draws_of_its_own(self, index, key):
        return self._one(index)


def test_random_numbers_that_follow_places_are_caught():
    with pytest.raises(AssertionError):
        assert_draws_follow_key_and_record(lambda: drawing(DRAWS["numpy"]), ByPlace)


def test_a_data_set_that_draws_for_some_records_only_does_so_by_record():
    def rows():
        return Rows({3: DRAWS["numpy"], 8: DRAWS["numpy"]})

    early, late = records_of(rows()), records_of(rows())
    read(late, [1, 2])
    assert by_id(read(early, [3, 1, 8])) == by_id(read(late, [8, 1, 3]))


def noisy(records):
    x, y = default_collate(records)
    return x + torch.rand(len(x), 1), y


def test_the_global_generators_stay_as_they_are():
    for records in (*(records_of(drawing(change)) for change in DRAWS.values()), records_of(Rows(), noisy)):
        before = random.getstate(), np.random.get_state()[1].tolist(), torch.random.get_rng_state().tolist()
        read(records, [3, 1, 2])
        assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.random.get_rng_state().tolist())


def test_a_collate_functions_random_numbers_follow_from_key_and_record():
    records = records_of(Rows(), noisy)
    found = by_id(read(records, [3, 1, 2]))
    elsewhere = by_id(read(records, [2, 9, 3]))
    assert all(elsewhere[i] == found[i] for i in (2, 3))
    assert by_id(read(records, [3, 1, 2], key=2)) != found


# A record in two companies.


def test_a_record_is_put_among_others_and_among_synthetic_ones():
    records = records_of(drawing(DRAWS["numpy"]))
    piece, elsewhere = records.batchmates(torch.tensor([6, 2, 9]), 4, 1)
    assert [leaf[0].tolist() for _, leaf in leaves(piece.data)] == [
        leaf[0].tolist() for _, leaf in leaves(elsewhere.data)
    ]
    assert piece.record_ids.tolist() == [6, 2, 9, 9] and elsewhere.record_ids[0] == 6
    assert bool((elsewhere.record_ids[1:] < 0).all()) and len(elsewhere.data[0]) == 4
    assert not torch.equal(piece.data[0][1:], elsewhere.data[0][1:])


def test_the_record_in_two_companies_is_a_sound_one():
    records = records_of(Rows({6: BROKEN["nothing"]}))
    piece, elsewhere = records.batchmates(torch.tensor([6, 2]), 3, 1)
    assert piece.record_ids[0] == elsewhere.record_ids[0] == 2
    assert records.batchmates(torch.tensor([6]), 3, 1) is None


# A data set that collates by itself.


class Self(Rows):
    def dpquant_batch(self, record_ids):
        return torch.stack([self[int(i)][0] for i in record_ids]), record_ids.clone()


class Short(Self):
    def dpquant_batch(self, record_ids):
        return tuple(leaf[:-1] for leaf in super().dpquant_batch(record_ids))


class Other(Self):
    def dpquant_batch(self, record_ids):
        return tuple(leaf.double() for leaf in super().dpquant_batch(record_ids))


class Unlike(Rows):
    def dpquant_batch(self, name, size):
        return name, size


def test_a_data_set_that_collates_itself_is_asked_for_full_microbatches():
    assert isinstance(Self(), Collated) and not isinstance(Rows(), Collated)
    records = records_of(Self())
    records.check()
    assert_each_row_is_its_records(read(records, [7, 2, 9, 4, 11]), [7, 2, 9, 4, 11], 4)
    piece, elsewhere = records.batchmates(torch.tensor([6, 2]), 4, 1)
    assert torch.equal(piece.data[0][0], elsewhere.data[0][0]) and len(elsewhere.data[1]) == 4
    assert records.batchmates(torch.zeros(0).long(), 4, 1) is None


@pytest.mark.parametrize(
    ("data_set", "words"), [(Short(), "one row for each"), (Other(), "other tensors"), (Unlike(), "another name")]
)
def test_one_that_collates_into_something_else_is_refused(data_set, words):
    records_of(Rows()).check()
    with pytest.raises(DataError, match=words):
        records_of(data_set).check()


def padded(records):
    return pad_sequence([r[0] for r in records], batch_first=True), torch.stack([r[1] for r in records])


def test_records_of_other_lengths_are_sound_where_the_collate_function_takes_them():
    rows = Rows({2: lambda record: (record[0].repeat(3), record[1]), 3: lambda record: (record[0][:1], record[1])})
    (piece,) = read(records_of(rows, padded), [1, 2, 3])
    assert piece.num_examples == 3 and piece.data[0].shape == (4, 9)
