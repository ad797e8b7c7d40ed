# SPDX-License-Identifier: Apache-2.0
"""Synthetic records show what they must (they differ in every value), and nothing of the records they stand for."""

import collections
import dataclasses
import itertools

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import default_collate

from dpquant.checks import synthetic
from dpquant.checks.forms import matches
from dpquant.checks.synthetic import candidates, from_examples
from dpquant.engine.batches import leaves, with_leaves
from dpquant.errors import DataError, SettingError

CPU = torch.device("cpu")
Pair = collections.namedtuple("Pair", "x y")

RECORDS = {
    "floats": (torch.zeros(5), torch.tensor(0)),
    "bytes": {"x": torch.zeros(2, 4, 4, dtype=torch.uint8), "y": 1},
    "numbers": (0.5, 3, True),
    "arrays": (np.zeros(3, np.float32), np.int64(2), np.float64(0.5)),
    "masks": Pair(torch.zeros(6).bool(), torch.zeros(6).int()),
    "lists of numbers": {"ids": [1, 2, 3], "weights": [0.5, 0.5], "y": torch.tensor(1)},
    "halves": (torch.zeros(3).half(), torch.zeros(2, dtype=torch.complex64), torch.zeros(1, 3).short()),
}


def all_of(records, collate=default_collate):
    return list(candidates(records, collate, CPU))


def first_of(record, collate=default_collate):
    return next(iter(candidates([record], collate, CPU)))


def values(record):
    return [torch.as_tensor(leaf) for _, leaf in leaves(record)]


def with_values(specimens, change):
    """Specimens in which something is done to every leaf, as a tensor."""
    changed = [with_leaves(record, lambda leaf: change(torch.as_tensor(leaf))) for record in specimens.records]
    return dataclasses.replace(specimens, records=tuple(changed))


def assert_b_and_c_differ_everywhere(specimens):
    """Putting one in the other's place changes every leaf; and a differs from one of them at least."""
    for a, b, c in zip(*map(values, specimens.records), strict=True):
        assert b.shape != c.shape or not torch.equal(b, c)
        assert a.shape != b.shape or not torch.equal(a, b) or not torch.equal(a, c)


@pytest.mark.parametrize("name", RECORDS)
def test_records_of_every_kind_differ_in_every_leaf(name):
    every = all_of([RECORDS[name]])
    assert len(every) > 1
    for specimens in every:
        assert_b_and_c_differ_everywhere(specimens)


@pytest.mark.parametrize("floats", [True, False], ids=["floats", "integers"])
def test_equal_records_are_caught(floats):
    """Of one type of leaf, all records have the same values."""
    honest = first_of(RECORDS["floats"])
    equal = with_values(honest, lambda x: torch.zeros_like(x) if x.is_floating_point() == floats else x)
    assert_b_and_c_differ_everywhere(honest)
    with pytest.raises(AssertionError):
        assert_b_and_c_differ_everywhere(equal)


@pytest.mark.parametrize("name", RECORDS)
def test_records_look_like_the_one_they_stand_for(name):
    record = RECORDS[name]
    for specimens in itertools.islice(candidates([record], default_collate, CPU), 5):
        assert matches(specimens.form, record)
        for made in specimens.records:
            assert matches(specimens.form, made) and type(made) is type(record)
            types = [(type(leaf), getattr(leaf, "dtype", None)) for _, leaf in leaves(made)]
            assert types == [(type(leaf), getattr(leaf, "dtype", None)) for _, leaf in leaves(record)]
        assert len(next(leaf for _, leaf in leaves(specimens.batch((2, 0))))) == 2


def as_text(every):
    return [[leaf.tolist() for record in specimens.records for leaf in values(record)] for specimens in every]


def filled_with(value):
    return torch.full((3,), float(value)), torch.tensor(value), [value, 2], value


def of_form(record):
    return all_of([record])


def of_values(record):
    """A plant: the record's first values are added to the synthetic ones."""
    shifts = values(record)

    def shifted(specimens):
        numbers = itertools.cycle(range(len(shifts)))
        return with_values(specimens, lambda x: (x + shifts[next(numbers)].flatten()[0]).to(x.dtype))

    return map(shifted, all_of([record]))


def assert_no_value_enters(specimens_of):
    assert as_text(specimens_of(filled_with(0))) == as_text(specimens_of(filled_with(1)))


def test_no_value_of_a_record_enters():
    assert_no_value_enters(of_form)


def test_a_value_that_enters_is_caught():
    with pytest.raises(AssertionError):
        assert_no_value_enters(of_values)


def test_specimens_repeat_and_leave_the_global_generators_alone():
    state = torch.random.get_rng_state()
    assert as_text(all_of([RECORDS["floats"]])) == as_text(all_of([RECORDS["floats"]]))
    assert torch.equal(state, torch.random.get_rng_state())


# Lengths.


def text(length):
    return torch.zeros(length).long(), torch.tensor(0)


def padded_texts(records):
    return pad_sequence([r[0] for r in records], batch_first=True), torch.stack([r[1] for r in records])


def padded_twice(records):
    return tuple(pad_sequence([r[place] for r in records], batch_first=True) for place in (0, 1))


def to_a_fixed_length(records):
    texts = [torch.nn.functional.pad(r[0][:20], (0, 20 - len(r[0][:20]))) for r in records]
    return torch.stack(texts), torch.stack([r[1] for r in records])


def test_lengths_that_a_collate_function_takes_are_free():
    for specimens in itertools.islice(candidates([text(7)], padded_texts, CPU), 4):
        assert specimens.padded and specimens.form[0].shape == (None,) and specimens.form[1].shape == ()
        assert matches(specimens.form, text(3)) and matches(specimens.form, text(300))
        assert len({len(record[0]) for record in specimens.records}) == 3


def test_what_is_as_long_as_something_else_stays_so():
    record = torch.zeros(7).long(), torch.zeros(7)  # tokens and their mask
    for specimens in itertools.islice(candidates([record], padded_twice, CPU), 4):
        assert all(len(ids) == len(mask) for ids, mask in specimens.records)


def test_where_records_are_stacked_no_length_is_free():
    for specimens in all_of([text(7)]):
        assert not specimens.padded and specimens.form[0].shape == (7,)
        assert not matches(specimens.form, text(6))


def test_padding_to_a_fixed_length_is_no_padding_by_others():
    first = first_of(text(7), to_a_fixed_length)
    assert not first.padded and first.form[0].shape == (None,)


def assert_the_length_is_not_shown(specimens_of):
    assert as_text(specimens_of(text(7))) == as_text(specimens_of(text(11)))


def test_the_first_records_length_does_not_show_where_a_model_runs_on_others():
    count = len(synthetic._LENGTHS) * len(synthetic.INTEGERS)
    assert_the_length_is_not_shown(lambda record: itertools.islice(candidates([record], padded_texts, CPU), count))


def test_a_length_that_shows_is_caught():
    """That of the first record does where records are stacked, so that all have it."""
    with pytest.raises(AssertionError):
        assert_the_length_is_not_shown(of_form)


def first_alone(records):
    return default_collate(records[:1] * len(records))


def largest_of(record, **settings):
    every = candidates([record], first_alone, CPU, **settings)
    return max(made[0].numel() for specimens in every for made in specimens.records)


def test_where_every_axis_is_free_records_stay_small():
    record = (torch.zeros(2, 3, 3),)
    assert 2**15 < largest_of(record) <= synthetic._MOST_VALUES
    assert largest_of(record, most_values=2**14) <= 2**14


# Collate functions.


def drops_the_last(records):
    return default_collate(records[:-1])


def drops_what_is_negative(records):
    return default_collate([r for r in records if r[0][0] >= 0] or records[:1])


@pytest.mark.parametrize("collate", [drops_the_last, drops_what_is_negative])
def test_a_collate_function_that_leaves_records_out_is_refused(collate):
    with pytest.raises(DataError, match="one row for each record"):
        all_of([RECORDS["floats"]], collate)


def test_a_collate_function_that_raises_on_some_kinds_of_values_is_not_refused():
    def picky(records):
        assert all(bool((r[0] > 0).all()) for r in records)
        return default_collate(records)

    assert len(all_of([RECORDS["floats"]], picky)) > 1


# What is a record, and what is a broken one.


@pytest.mark.parametrize("value", [object(), {1, 2}])
def test_records_of_other_things_are_refused(value):
    with pytest.raises(DataError, match=f"got a {type(value).__name__}"):
        all_of([(torch.zeros(2), value)])


def test_names_that_the_collate_function_leaves_out_are_kept_out():
    record = torch.zeros(2), "a file", None
    first = first_of(record, lambda records: default_collate([r[0] for r in records]))
    assert matches(first.form, record) and matches(first.form, (torch.ones(2), "another", None))
    assert first.batch((0, 2)).shape == (2, 2) and "a file" not in first.records[0]


def test_records_of_different_forms_are_refused():
    with pytest.raises(DataError, match="same structure, types and shapes"):
        all_of([(torch.zeros(3),), (torch.zeros(4),)])
    assert all_of([text(3), text(9)], padded_texts)


SOUND = (torch.zeros(3), np.zeros(2, np.float32), [1, 2], 4, {"a": 0.5})
BROKEN = {
    "another length": (torch.zeros(4), *SOUND[1:]),
    "another axis": (torch.zeros(3, 1), *SOUND[1:]),
    "another tensor type": (torch.zeros(3).double(), *SOUND[1:]),
    "not dense": (torch.zeros(3).to_sparse(), *SOUND[1:]),
    "no tensor": (None, *SOUND[1:]),
    "an array of another type": (SOUND[0], np.zeros(2), *SOUND[2:]),
    "an array instead of a tensor": (np.zeros(3, np.float32), *SOUND[1:]),
    "a list of another type": (*SOUND[:2], [1, 2.5], *SOUND[3:]),
    "a list with a string": (*SOUND[:2], [1, "2"], *SOUND[3:]),
    "a list of another length": (*SOUND[:2], [1, 2, 3], *SOUND[3:]),
    "a number too large": (*SOUND[:2], [1, 2**70], *SOUND[3:]),
    "a float for an int": (*SOUND[:3], 4.0, SOUND[4]),
    "a bool for an int": (*SOUND[:3], True, SOUND[4]),
    "another key": (*SOUND[:4], {"b": 0.5}),
    "a key more": (*SOUND[:4], {"a": 0.5, "b": 0.5}),
    "one value less": SOUND[:4],
    "one value more": (*SOUND, 1),
    "a list for a tuple": list(SOUND),
    "nothing": None,
}  # fmt: skip


@pytest.mark.parametrize("record", BROKEN.values(), ids=BROKEN)
def test_a_record_of_another_form_is_told_from_a_sound_one(record):
    form = first_of(SOUND).form
    assert matches(form, SOUND) and not matches(form, record)


def test_a_pair_with_names_is_not_one_without():
    form = first_of(RECORDS["masks"]).form
    assert matches(form, RECORDS["masks"]) and not matches(form, tuple(RECORDS["masks"]))


# Records that the user gives.


def test_examples_are_used_as_they_are():
    examples = [(torch.full((2,), float(i)), torch.tensor(i)) for i in range(5)]
    specimens = from_examples(examples, default_collate, CPU)
    assert [int(record[1]) for record in specimens.records] == [0, 1, 2] and not specimens.padded
    assert specimens.batch((1, 2))[0].tolist() == [[1, 1], [2, 2]]
    assert [int(record[1]) for record in from_examples(examples[:2], default_collate, CPU).records] == [0, 1, 0]


def test_lengths_in_which_examples_differ_are_free():
    specimens = from_examples([text(3), text(5), text(4)], padded_texts, CPU)
    assert specimens.padded and specimens.form[0].shape == (None,) and matches(specimens.form, text(9))
    assert not matches(from_examples([text(3), text(3)], padded_texts, CPU).form, text(9))


@pytest.mark.parametrize(
    ("examples", "error", "words"),
    [
        ((torch.zeros(2, 3), torch.zeros(2)), SettingError, "a tuple"),
        (iter([1, 2]), SettingError, "list_iterator"),
        ([text(3)], SettingError, "at least two"),
        ([(torch.zeros(2),), (torch.zeros(2).double(),)], DataError, "same structure"),
        ([(torch.zeros(2),), (torch.zeros(2), 1)], DataError, "same structure"),
        ([(torch.zeros(2), 1), (torch.zeros(2),)], DataError, "same structure"),
        ([{"a": 1, "b": 1}, {"a": 1, "c": 1}], DataError, "same structure"),
    ],
)
def test_examples_that_cannot_be_used_are_refused(examples, error, words):
    with pytest.raises(error, match=words):
        from_examples(examples, default_collate, CPU)
