# SPDX-License-Identifier: Apache-2.0
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
