# SPDX-License-Identifier: Apache-2.0
import ast
import inspect
import subprocess
import sys

import pytest

import dpquant


def test_every_public_name_resolves_and_is_what_its_name_says():
    for name in dpquant.__all__:
        assert getattr(dpquant, name).__name__ == name


def test_public_names_are_sorted_and_listed():
    assert dpquant.__all__ == sorted(dpquant.__all__)
    assert set(dpquant.__all__) <= set(dir(dpquant))


def imports_for_type_checkers(source):
    """{name: module below dpquant} of the imports that only a type checker sees."""
    (block,) = (node for node in ast.parse(source).body if isinstance(node, ast.If))
    return {
        name.name: line.module.removeprefix("dpquant.")
        for line in block.body
        if isinstance(line, ast.ImportFrom) and line.module
        for name in line.names
    }


def homes(source=None):
    """{public name: module below dpquant}, in which the three lists of the face have to agree."""
    found = imports_for_type_checkers(inspect.getsource(dpquant) if source is None else source)
    assert found == dpquant._HOMES and found.keys() == set(dpquant.__all__)
    return found


def test_the_three_lists_of_public_names_agree():
    assert homes()["clipped_sum"] == "engine.clip"


def test_a_public_name_that_is_missing_from_a_list_or_has_moved_would_be_seen():
    source = inspect.getsource(dpquant)
    for planted in (
        source.replace("    from dpquant.privacy.ledger import Ledger\n", ""),
        source.replace("from dpquant.runs.sinks import Sink", "from dpquant.runs.train import Sink"),
    ):
        assert planted != source
        with pytest.raises(AssertionError):
            homes(planted)


def test_what_a_runs_files_and_listeners_need_is_public():
    assert {"Ledger", "Precision", "RunRecord", "Sink"} <= set(dpquant.__all__)


def test_records_and_ledgers_are_read_without_torch():
    code = (
        "import sys, dpquant; dpquant.RunRecord, dpquant.Ledger, dpquant.Precision, dpquant.PrivacyPlan; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'train_privately'"):
        _ = dpquant.train_privately


def test_importing_the_package_loads_no_torch():
    code = "import sys, dpquant; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_public_names_survive_the_import_of_every_module():
    code = "import dpquant.training.private, dpquant; assert callable(dpquant.quantize), dpquant.quantize"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    "code", ["from dpquant.cli import main", "from dpquant import data; data.load('digits').train"]
)
def test_doors_that_scripts_of_others_use_do_not_move(code):
    subprocess.run([sys.executable, "-c", code], check=True)
