# SPDX-License-Identifier: Apache-2.0
"""Leaving out long tests: those in the file, and no others. Counting what was tried."""

from collections import Counter
from types import SimpleNamespace

import pytest

from durations import chosen, long_tests
from tried import Counting, told

IDS = ["a::short", "a::long", "b::central"]


def everything(ids, always, long, only_long=False):
    return ids


def without_the_central_ones(ids, always, long, only_long=False):
    return [one for one in ids if (one in long) == only_long]


def assert_leaves_out_what_is_long(choose):
    long = frozenset({"a::long", "b::central", "gone::long"})
    assert choose(IDS, {"b::central"}, long) == ["a::short", "b::central"]
    assert choose(IDS, {"b::central"}, long, only_long=True) == ["a::long"]


def test_long_tests_are_left_out_unless_they_run_always():
    assert_leaves_out_what_is_long(chosen)


@pytest.mark.parametrize("planted", [everything, without_the_central_ones])
def test_another_choice_would_be_seen(planted):
    with pytest.raises(AssertionError):
        assert_leaves_out_what_is_long(planted)


def test_the_file_names_a_minority():
    assert 0 < len(long_tests()) < 500  # of more than 6,000


def test_what_was_tried_is_added_up_once_a_test():
    counting = Counting()
    for when in ("setup", "call", "teardown"):
        properties = [("tried", ("crash points", 70)), ("tried", ("draws", 1000)), ("processor", 2.0)]
        counting.pytest_runtest_logreport(SimpleNamespace(when=when, user_properties=properties))
    assert counting.counts == Counter({"crash points": 70, "draws": 1000})
    assert told(counting.counts) == "70 crash points, 1,000 draws"
