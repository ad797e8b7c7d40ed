# SPDX-License-Identifier: Apache-2.0
"""Leaving out long tests: those in the file, and no others."""

import pytest

from durations import chosen, long_tests

IDS = ["a::short", "a::long", "b::central"]


def everything(ids, always, long):
    return ids


def without_the_central_ones(ids, always, long):
    return [one for one in ids if one not in long]


def assert_leaves_out_what_is_long(choose):
    assert choose(IDS, {"b::central"}, frozenset({"a::long", "b::central", "gone::long"})) == ["a::short", "b::central"]


def test_long_tests_are_left_out_unless_they_run_always():
    assert_leaves_out_what_is_long(chosen)


@pytest.mark.parametrize("planted", [everything, without_the_central_ones])
def test_another_choice_would_be_seen(planted):
    with pytest.raises(AssertionError):
        assert_leaves_out_what_is_long(planted)


def test_the_file_names_a_minority():
    assert 0 < len(long_tests()) < 400
