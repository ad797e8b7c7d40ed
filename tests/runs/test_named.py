# SPDX-License-Identifier: Apache-2.0
"""What is missing is said before torch is imported, and what is there is not refused."""

import subprocess
import sys
from pathlib import Path

import pytest

from dpquant.app.cli import run
from dpquant.data.model_names import check_module
from dpquant.errors import DPQuantError, ModelError
from dpquant.runs.named import check_named
from dpquant.runs.settings import TrainSettings
from sources import as_options, images, pretrained, table, texts

MISSING = {  # what a run names, and what is taken away
    "a table's records": (table, "t.csv"),
    "its spec": (table, "spec.toml"),
    "texts": (texts, "t.jsonl"),
    "their test": (texts, "test.jsonl"),
    "their tokenizer": (texts, "tokenizer.json"),
    "a pretrained network": (pretrained, "config.json"),
    "a class of images": (images, "photos/test/dark"),
}
WITHOUT_TORCH = """
import importlib.abc
import sys

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            raise ImportError("torch was imported")

sys.meta_path.insert(0, Blocked())
from dpquant.app.cli import run
sys.exit(run(sys.argv[1:]))
"""


@pytest.mark.parametrize("what", MISSING)
def test_what_is_missing_is_refused_and_what_is_there_is_not(what, tmp_path):
    make, name = MISSING[what]
    settings = TrainSettings.chosen(make(tmp_path))
    check_named(settings)
    (tmp_path / name).rename(tmp_path / "away")
    with pytest.raises(DPQuantError):
        check_named(settings)


@pytest.mark.parametrize("verb", ["train", "compare"])
def test_what_is_missing_is_said_before_torch_is_imported(verb, tmp_path):
    given = texts(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    found = tried(verb, given, tmp_path)
    assert found.returncode == 2 and found.stderr.startswith("error: Expected tokenizer") and not found.stdout


UNKNOWN = {  # strings that are refused, and how the error begins
    "data": ({"data": "nonsense", "records": 50}, "Expected data to be one of"),
    "a folder of published data": ({"data": "mnist", "data_dir": "nowhere"}, "Expected data_dir to be a folder"),
    "a module": ({"model": "nowhere:build"}, "Expected model=nowhere:build to name a function"),
    "a module's file": ({"model": "nowhere.py:build"}, "Expected model=module:function"),
    "choices": ({"choices": "nowhere.json"}, "Expected choices to be a file"),
}


@pytest.mark.parametrize("what", UNKNOWN)
def test_what_nothing_has_the_name_of_is_said_before_torch_is_imported(what, tmp_path):
    given, error = UNKNOWN[what]
    found = tried("train", given, tmp_path)
    assert found.returncode == 2 and found.stderr.startswith(f"error: {error}") and found.stderr.count("\n") == 1


def test_a_module_is_found_in_the_folder_in_a_package_and_where_python_looks(tmp_path):
    (tmp_path / "mine.py").write_text("raise SystemExit('it was imported')")
    (tmp_path / "package").mkdir()
    for name in ("mine:build", "package.part:build", "json:loads"):
        check_module(name, tmp_path)
    for name in ("yours:build", ":build", ".mine:build"):
        with pytest.raises(ModelError, match="no module"):
            check_module(name, tmp_path)


def test_a_budget_of_unknown_data_is_refused(capsys):
    assert run(["plan", "--data", "nonsense", "--records", "50"]) == 2
    assert "Expected data to be one of" in capsys.readouterr().err


def test_that_torch_is_imported_would_be_seen(tmp_path):
    """Twin of the test above: nothing is missing, so that torch is imported."""
    assert "torch was imported" in tried("train", texts(tmp_path), tmp_path).stderr


def tried(verb, given, folder: Path):
    options = {name: value for name, value in given.items() if name != "policy"}
    command = [sys.executable, "-c", WITHOUT_TORCH, verb, *as_options(options)]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
