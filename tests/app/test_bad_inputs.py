# SPDX-License-Identifier: Apache-2.0
"""Every bad input is refused in one line, with exit code 2, and leaves nothing; any other end would be seen."""

import sys
from pathlib import Path

import pytest

from bad_inputs import TABLE, Bad, as_process, changes, contents, file, in_process, problems_of
from dpquant.app.cli import run


@pytest.mark.parametrize("name", TABLE)
def test_a_bad_input_is_refused_in_one_line(name, tmp_path, tried):
    tried("bad inputs")
    assert problems_of(TABLE[name], tmp_path, in_process(run)) == []


def test_the_table_is_as_large_as_it_should_be():
    assert len(TABLE) >= 300 and len({bad.arguments for bad in TABLE.values()}) > 250
    for verb in ("plan", "train", "resume", "ledger", "assess", "compare", "bench"):
        assert sum(bad.arguments.split()[0] == verb for bad in TABLE.values()) >= 5, verb


# What the check must not let through: verbs that refuse in some other way.

GOOD = "error: Expected width > 0; got width=0. It multiplies."


def refuses(*lines, code=2):
    """A verb that prints lines on standard error and ends with an exit code."""

    def verb(arguments):
        for line in lines:
            print(line, file=sys.stderr)
        return code

    return verb


def raises(arguments):
    raise KeyError("width")


def writes(arguments):
    Path("left.txt").write_text("")
    return refuses(GOOD)(arguments)


def overwrites(arguments):
    Path("mine.txt").write_text("theirs")
    return refuses(GOOD)(arguments)


def removes(arguments):
    Path("mine.txt").unlink()
    return refuses(GOOD)(arguments)


def makes_a_folder(arguments):
    Path("runs").mkdir()
    return refuses(GOOD)(arguments)


def prints(arguments):
    print("privacy budget")
    return refuses(GOOD)(arguments)


def problems_with(verb, folder):
    return problems_of(Bad("train --width 0", "width=0", file("mine.txt", "mine")), folder, in_process(verb))


def test_a_refusal_in_one_line_passes(tmp_path):
    assert problems_with(refuses(GOOD), tmp_path) == []


@pytest.mark.parametrize(
    ("verb", "seen"),
    [
        (refuses(GOOD, GOOD), "2 lines"),
        (refuses("looking at the model", GOOD), "2 lines"),
        (refuses(), "0 lines"),
        (refuses(GOOD, code=0), "exit code 0"),
        (refuses(GOOD, code=1), "exit code 1"),
        (refuses(GOOD.removeprefix("error: ")), "no error"),
        (refuses("error: width=0 is bad."), "words of its own"),
        (refuses("error: Expected another width."), "does not say"),
        (raises, "raised KeyError"),
        (writes, "left.txt"),
        (overwrites, "mine.txt"),
        (removes, "mine.txt"),
        (makes_a_folder, "runs"),
        (prints, "on standard output"),
    ],
)
def test_any_other_end_would_be_seen(verb, seen, tmp_path):
    assert any(seen in problem for problem in problems_with(verb, tmp_path))


def test_one_is_refused_in_a_process_of_its_own_too(tmp_path):
    assert problems_of(TABLE["verb: unknown"], tmp_path, as_process) == []
    assert problems_of(Bad("--version", "Expected"), tmp_path, as_process) != []


def test_what_changes_in_a_folder_is_seen(tmp_path):
    file("a/b.txt", "one")(tmp_path)
    before = contents(tmp_path)
    file("a/b.txt", "two")(tmp_path)
    file("c.txt", "")(tmp_path)
    assert changes(before, contents(tmp_path)) == ["a/b.txt", "c.txt"]


# What is no error: a warning is one line without a place in the source, and -h is --help.


@pytest.mark.filterwarnings("default")
def test_a_warning_is_one_line_without_a_place_in_the_source(capsys):
    assert run(["plan", "--delta", "0.4", "--policy", "none", "--noise-multiplier", "1"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("warning: delta=0.4 is large") and ".py" not in lines[0]


@pytest.mark.parametrize("arguments", [["-h"], ["plan", "-h"], ["ledger", "-h"]])
def test_h_is_help(arguments, capsys):
    assert run(arguments) == 0
    assert "Usage: dpquant" in capsys.readouterr().out


def test_what_an_option_overrides_in_a_file_is_not_refused(tmp_path, capsys):
    (tmp_path / "c.toml").write_text("fraction = 0.5\nanalysis_every = 2\n")
    assert run(["plan", "--config", str(tmp_path / "c.toml"), "--policy", "none", "--json"]) == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_standard_output_is_one_line(tmp_path):
    outcome = as_process(Bad("--version", ""), tmp_path, out="/dev/full")
    assert outcome.code == 2 and outcome.err.count("\n") == 1 and "No space left" in outcome.err
