# SPDX-License-Identifier: Apache-2.0
"""T20: the table of planted bugs is whole: each still applies, and the page of what killed them is of this table."""

import collections
import json
from pathlib import Path

import pytest

from mutants.mutant import ROOT, Mutant
from mutants.page import page_of
from mutants.table import MUTANTS

RESULTS = json.loads((ROOT / "tests" / "mutants" / "results.json").read_text())
TEXTS = {file: (ROOT / file).read_text() for file in {one.file for one in MUTANTS}}


def test_every_planted_bug_applies_and_its_python_compiles(tried):
    for one in MUTANTS:
        planted = one.planted_in(TEXTS[one.file])
        if not one.native:
            compile(planted, one.file, "exec")
    tried("planted bugs that apply and were killed", len(MUTANTS))


@pytest.mark.parametrize("change", [{"old": "no such text"}, {"old": "\n"}, {"new": MUTANTS[0].old}])
def test_a_bug_that_no_longer_applies_is_seen(change):
    facts = {name: getattr(MUTANTS[0], name) for name in ("name", "kind", "file", "old", "new", "tests")}
    with pytest.raises(ValueError, match="exactly once"):
        Mutant(**{**facts, **change}).planted_in(TEXTS[MUTANTS[0].file])


def test_there_are_as_many_as_promised_and_no_two_alike():
    assert len(MUTANTS) >= 130 and sum(one.native for one in MUTANTS) >= 10
    for facts in ("key", "digest"):
        assert [text for text, n in collections.Counter(getattr(one, facts) for one in MUTANTS).items() if n > 1] == []


def test_the_tests_that_have_to_notice_a_bug_are_there():
    for test in {test for one in MUTANTS for test in one.tests}:
        file, _, name = test.partition("::")
        assert (ROOT / file).exists(), test
        assert f"def {name.partition('[')[0]}(" in Path(ROOT / file).read_text() if name else True, test


def test_every_planted_bug_was_killed_as_it_stands():
    left = [one.key for one in MUTANTS if RESULTS.get(one.key, {}).get("outcome") != "killed"]
    changed = [one.key for one in MUTANTS if one.key in RESULTS and RESULTS[one.key]["digest"] != one.digest]
    assert not left and not changed, "run scripts/mutants"


def test_the_page_is_of_this_table():
    assert (ROOT / "docs" / "mutations.md").read_text() == page_of(MUTANTS, RESULTS)
