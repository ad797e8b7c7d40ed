# SPDX-License-Identifier: Apache-2.0
"""Completion: verbs, options, their values and run directories, without anything that takes time to load."""

import os
import subprocess
import sys

import pytest

from dpquant.app.cli import run

HEAVY = ("torch", "numpy", "scipy", "dp_accounting", "matplotlib")


def completed(words, folder, report="pass"):
    """What bash is offered for the last word of a command line, and what the program reports when it ends."""
    program = f"import atexit, sys; from dpquant.cli import main; {report}; sys.argv = ['dpquant']; main()"
    asked = {"_DPQUANT_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, env={**os.environ, **asked}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    return result.stdout.split()


@pytest.fixture
def place(tmp_path):
    for name in ("runs/one", "runs/two", "three", "empty"):
        (tmp_path / name).mkdir(parents=True)
        if name != "empty":
            (tmp_path / name / "config.toml").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("dpquant ver", ["verify"]),
        ("dpquant train --pol", ["--policy"]),
        ("dpquant train --policy r", ["rotate"]),
        ("dpquant plan --format lu", ["luq-fp4", "luq"]),
        ("dpquant train --data fa", ["fashion-mnist"]),
        ("dpquant train --model res", ["resnet18", "resnet18-cifar", "resnet50"]),
        ("dpquant compare --policies none,pri", ["none,prioritise"]),
        ("dpquant resume runs/", ["runs/one", "runs/two"]),
        ("dpquant verify t", ["three"]),
        ("dpquant verify e", []),
    ],
)
def test_values_are_completed(words, expected, place):
    assert completed(words, place) == expected


def loaded(program_of_main, place):
    modules = f"atexit.register(lambda: print(*[name for name in {HEAVY} if name in sys.modules]))"
    return completed("dpquant train --policy r", place, f"{program_of_main}; {modules}")


def test_completion_loads_nothing_that_takes_time(place):
    assert loaded("pass", place) == ["rotate"]


def test_what_it_would_load_is_seen(place):
    assert loaded("import numpy", place) == ["rotate", "numpy"]


def test_exit_codes_are_in_the_help(capsys):
    assert run(["--help"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for words in ("0 done", "2 bad input", "3 alert", "4 a run that diverged", "130 and 143", "-qq nothing"):
        assert words in printed


def test_dpquant_runs_as_a_module():
    command = [sys.executable, "-m", "dpquant", "plan", "--zzz"]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 2
