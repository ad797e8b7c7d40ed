# SPDX-License-Identifier: Apache-2.0
"""Every setting, every verb and every word that matters is explained, with what the settings say themselves."""

import dataclasses
import re

import pytest

from dpquant.app.cli import _command
from dpquant.app.cli import run as command
from dpquant.app.explain import _ALSO, explained, facts, settings, texts, words
from dpquant.errors import SettingError
from dpquant.formats import RECIPES
from dpquant.runs.ranges import BACKENDS, POLICIES, RANGES
from dpquant.runs.settings import TrainSettings

VERBS = {name: verb.help or "" for name, verb in _command().commands.items()}
WORDS = (
    *("epsilon", "delta", "format", "policy", "ledger", "noise_multiplier", "sample_rate", "max_grad_norm", "analysis"),
    *("impact", "backend", "checkpoint", "report", "verify", "exit codes", "clipping", "accountant", "heartbeat"),
    *(*RECIPES, *POLICIES, "full", "alert", "statement", "extras"),
)


def assert_explains_all(found):
    """A text of its own for each setting and each word; the verbs' help for verbs."""
    for name in (field.name for field in dataclasses.fields(TrainSettings)):
        assert name in found or name in texts("terms"), name
    for name in WORDS:
        assert name in {**texts("terms"), **found, **VERBS}, name


def test_every_setting_and_every_word_has_a_text():
    assert_explains_all(texts("settings"))
    assert set(texts("settings")) <= set(settings()) and all(VERBS.values())
    assert all(len(text.split()) >= 10 for name in ("settings", "terms") for text in texts(name).values())


def test_a_setting_without_a_text_would_be_seen():
    with pytest.raises(AssertionError):
        assert_explains_all({name: text for name, text in texts("settings").items() if name != "beta"})


def test_what_a_setting_says_of_itself_is_there():
    for name, field in settings().items():
        told = explained(name, VERBS)
        assert field.metadata["help"] in told and facts(field) in told
        assert name not in RANGES or RANGES[name][0] in told
    assert "default: 20; 40 for digits; 25 for mnist" in explained("epochs", VERBS)
    assert "default: off" in explained("fix", VERBS) and "default: 3" in explained("beta", VERBS)
    assert "depends on optimizer" in explained("momentum", VERBS)
    assert "**[declared]**" in explained("declared", VERBS)


def test_a_verb_is_explained_by_its_help_without_the_fields_for_programs():
    for name in VERBS:
        told = explained(name, VERBS)
        assert f"dpquant {name}: " in told and f"dpquant {name} --help" in told and "With --json" not in told


@pytest.mark.parametrize("name", [*dict.fromkeys((*WORDS, *settings(), *VERBS, *_ALSO))])
def test_an_explanation_is_short(name):
    told = explained(name, VERBS)
    wrapped = sum(1 + len(line) // 100 for line in told.splitlines() if line)
    assert 2 <= wrapped <= 24, wrapped
    assert not re.search(r"—|\bTODO\b", told)


def test_spelling_makes_no_difference_and_what_is_unknown_gets_the_nearest():
    assert explained("--Noise-Multiplier", VERBS) == explained("noise_multiplier", VERBS)
    assert explained("exitcodes", VERBS) == explained("exit codes", VERBS)
    with pytest.raises(SettingError, match="Did you mean epsilon"):
        explained("epsylon", VERBS)
    assert set(_ALSO.values()) <= set(words(VERBS))


def test_a_word_that_is_named_in_see_is_explained():
    for name in ("settings", "terms"):
        for text in texts(name).values():
            for listed in re.findall(r"\bSee ([^.]*)\.", text):
                for one in re.findall(r"[\w-]+", listed.split(" for ")[0].replace(" and ", ", ")):
                    explained(one, VERBS)


def test_the_verb_prints_a_word_or_the_list(capsys):
    assert command(["explain", "exit", "codes"]) == 0
    assert "143: ended by SIGTERM" in " ".join(capsys.readouterr().out.split())
    assert command(["explain"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in words(VERBS))
    assert all(one in listed for one in BACKENDS if one in words(VERBS))
