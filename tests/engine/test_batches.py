# SPDX-License-Identifier: Apache-2.0
import collections
import types

import pytest
import torch

from dpquant.engine import batches
from dpquant.engine.batches import (
    check_rows,
    filled_up,
    is_numbers,
    leaves,
    microbatches,
    num_rows,
    take_rows,
    to_device,
    with_leaves,
)
from dpquant.errors import DataError, SettingError

Pair = collections.namedtuple("Pair", "x y")


class Encoding(collections.UserDict):
    """A mapping that is no dict and carries something else, as tokenizers return."""

    def __init__(self, *arguments, extra=None, **keywords):
        super().__init__(*arguments, **keywords)
        self.extra = extra


def tensor(start=0, rows=4):
    return torch.arange(start, start + rows)


TREES = {
    "a tensor": tensor(),
    "a tuple": (tensor(), tensor(4)),
    "a list": [tensor(), (tensor(4),)],
    "a named tuple": Pair(tensor(), tensor(4)),
    "a dict": {"x": tensor(), "y": {"z": tensor(4)}},
    "a mapping": Encoding({"x": tensor(), "y": [tensor(4)]}, extra="kept"),
    "an ordered dict": collections.OrderedDict(b=tensor(), a=tensor(4)),
}


def assert_walks(tree, change=with_leaves):
    """Every tensor is changed once, in the order of `leaves`; structure, types and the tree itself stay."""
    before = [leaf.clone() for _, leaf in leaves(tree)]
    changed = change(tree, lambda leaf: leaf + 100)
    assert type(changed) is type(tree) or isinstance(tree, dict)
    paths, after = zip(*leaves(changed), strict=True)
    assert paths == tuple(path for path, _ in leaves(tree))
    assert all(torch.equal(old + 100, new) for old, new in zip(before, after, strict=True))
    assert all(torch.equal(old, leaf) for old, (_, leaf) in zip(before, leaves(tree), strict=True))


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_leaves_are_changed_in_any_tree_of_tuples_lists_and_mappings(tree):
    assert_walks(tree)


def test_a_walk_that_writes_into_the_tree_is_caught():
    def planted(tree, change):
        for key in tree:
            tree[key] = change(tree[key])
        return tree

    with pytest.raises(AssertionError):
        assert_walks(Encoding({"x": tensor()}), planted)


def test_a_walk_that_loses_the_type_is_caught():
    with pytest.raises(AssertionError):
        assert_walks(TREES["a named tuple"], lambda tree, change: tuple(map(change, tree)))


def test_a_copy_of_a_mapping_keeps_what_else_it_carries_and_one_that_cannot_be_written_becomes_a_dict():
    assert with_leaves(TREES["a mapping"], lambda leaf: leaf).extra == "kept"
    frozen = types.MappingProxyType({"x": tensor()})
    assert type(with_leaves(frozen, lambda leaf: leaf)) is dict


def test_a_list_of_numbers_is_one_leaf_and_other_lists_are_trees():
    record = {"ids": [1, 2, 3], "flags": [True], "pair": [tensor(), 2.0], "none": []}
    assert [path for path, _ in leaves(record)] == ["['ids']", "['flags']", "['pair'][0]", "['pair'][1]"]
    assert with_leaves(record, lambda leaf: "leaf")["ids"] == "leaf"
    assert is_numbers([1, 2.5, True]) and not any(map(is_numbers, ([], (1, 2), [tensor()], ["a"])))


def test_paths_name_places():
    batch = {"a": [tensor(), tensor()]}, tensor()
    assert [path for path, _ in leaves(batch)] == ["[0]['a'][0]", "[0]['a'][1]", "[1]"]


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_the_same_rows_of_every_tensor_are_taken(tree):
    taken = take_rows(tree, torch.tensor([2, 0]))
    for (_, whole), (_, part) in zip(leaves(tree), leaves(taken), strict=True):
        assert torch.equal(part, whole[[2, 0]])
    assert num_rows(taken) == 2 and num_rows(to_device(tree, torch.device("cpu"))) == 4


@pytest.mark.parametrize("other", ["a name", 3, None, [1, 2]])
def test_what_is_no_tensor_is_refused_by_its_type(other):
    for refuse in (lambda batch: take_rows(batch, slice(0, 1)), lambda batch: check_rows(batch, 4)):
        with pytest.raises(SettingError, match=f"got a {type(other).__name__}"):
            refuse((tensor(), other))


def test_to_device_leaves_other_things_alone():
    assert to_device({"x": tensor(), "name": "a"}, torch.device("cpu"))["name"] == "a"


WRONG = {
    "one row too few": (tensor(), tensor(rows=3)),
    "one too many": {"x": tensor(rows=5)},
    "no rows": (tensor(rows=0),),
    "a number": (tensor(), torch.tensor(3)),
    "a matrix of no record": [tensor(), torch.rand(7, 7)],
}


@pytest.mark.parametrize("batch", WRONG.values(), ids=WRONG)
def test_another_number_of_rows_is_refused_without_telling_any(batch):
    with pytest.raises(DataError, match="one row for each record") as refused:
        check_rows(batch, 4)
    assert not any(character.isdigit() for character in str(refused.value))


def test_as_many_rows_as_records_are_accepted_and_nothing_is_refused_as_empty():
    for tree in TREES.values():
        check_rows(tree, 4)
    for empty in ((), {}, []):
        with pytest.raises(SettingError, match="empty"):
            check_rows(empty, 4)


def assert_filled_up(count, size, positions):
    """Microbatches of exactly `size` rows; each example counts once, in order, and copies of the last do not."""
    counted = []
    for rows, num_examples in positions:
        assert len(rows) == size and 0 < num_examples <= size
        assert rows[num_examples:].tolist() == [rows[num_examples - 1].item()] * (size - num_examples)
        counted += rows[:num_examples].tolist()
    assert counted == list(range(count))


@pytest.mark.parametrize(("count", "size"), [(0, 3), (1, 3), (2, 3), (3, 3), (4, 3), (7, 1), (5, 9)])
def test_every_example_counts_once_in_microbatches_of_one_size(count, size):
    assert_filled_up(count, size, filled_up(count, size))


def shorter(count, size):
    return [(torch.arange(count)[start : start + size], min(size, count - start)) for start in range(0, count, size)]


def with_copies_that_count(count, size):
    return [(rows, size) for rows, _ in batches.filled_up(count, size)]


def without_the_rest(count, size):
    return list(batches.filled_up(count, size))[:-1]


@pytest.mark.parametrize("planted", [shorter, with_copies_that_count, without_the_rest])
def test_microbatches_that_are_filled_up_otherwise_are_caught(planted):
    with pytest.raises(AssertionError):
        assert_filled_up(4, 3, planted(4, 3))


def test_a_batch_is_cut_with_its_record_ids():
    ids = torch.tensor([30, 10, 20])
    pieces = list(microbatches({"x": ids * 2}, ids, 2))
    assert [piece.record_ids.tolist() for piece in pieces] == [[30, 10], [20, 20]]
    assert [piece.data["x"].tolist() for piece in pieces] == [[60, 20], [40, 40]]
    assert [piece.num_examples for piece in pieces] == [2, 1]
    assert list(microbatches({"x": ids[:0]}, ids[:0], 2)) == []
