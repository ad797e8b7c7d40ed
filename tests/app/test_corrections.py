# SPDX-License-Identifier: Apache-2.0
"""The command that an error ends with: what was meant, as it can be pasted."""

import shlex

import pytest

from dpquant.app.cli import run
from dpquant.app.corrections import corrected


@pytest.mark.parametrize(
    ("typed", "right"),
    [
        ("plan --model cnnn", "plan --model cnn"),
        ("plan --policy=dpquan --epochs 3", "plan --policy=dpquant --epochs 3"),
        ("plan --epslon 3", "plan --epsilon 3"),
        ("plan --epslon=3 --lr 1", "plan --epsilon=3 --lr 1"),
        ("trian --epochs 2", "train --epochs 2"),
        ("train --data digit", "train --data digits"),
        ("plan --data image-folder:x --records 480 --batch-size 1024",
         "plan --data image-folder:x --records 480 --batch-size 48"),
        ("plan --data image-folder:x --batch-size=900 --records 5",
         "plan --data image-folder:x --records 5 --batch-size 1"),
    ],
)  # fmt: skip
def test_an_error_ends_with_the_command_that_was_meant(typed, right, capsys):
    assert run(shlex.split(typed)) == 2
    line = capsys.readouterr().err
    assert line.endswith(f" Try: dpquant {right}\n") and line.count("\n") == 1
    if not right.startswith("train"):
        assert run(shlex.split(right)) == 0, "what it proposes is accepted"


@pytest.mark.parametrize("typed", ["plan --epochs 0", "plan --zzzzzzz 3", "plan --policy xyzxyz"])
def test_where_it_is_not_known_none_is_proposed(typed, capsys):
    assert run(shlex.split(typed)) == 2
    assert "Try:" not in capsys.readouterr().err


def test_a_word_that_stands_twice_is_not_replaced():
    assert corrected("got model=cnnn. Did you mean cnn?", ["plan", "--model", "cnnn", "--data", "cnnn"], {}) is None
    assert corrected("got nothing of it. Did you mean cnn?", ["plan", "--model", "cnnn"], {}) is None


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("Expected kind in good.toml to be one; got categori. Did you mean category?", ["--spec", "good.toml"]),
        ("Expected my:frz to be there; got model=my:frz. Did you mean frozen?", ["--model", "my:frz"]),
    ],
)
def test_a_word_that_is_not_on_the_command_line_replaces_nothing(message, arguments):
    assert corrected(message, ["train", *arguments], {}) is None


def test_words_of_a_shell_are_quoted():
    assert corrected("got a=xyz. Did you mean xyy?", ["plan", "--a", "xyz", "--data", "my data"], {}).endswith(
        "'my data'"
    )
