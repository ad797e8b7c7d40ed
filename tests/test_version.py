# SPDX-License-Identifier: Apache-2.0
"""A record names the code that made it, also in a checkout that was installed many commits ago."""

import importlib.metadata
import re
import subprocess

import pytest

import dpquant
from dpquant.version import version

INSTALLED = importlib.metadata.version("dpquant")


def git(folder, *words):
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    return subprocess.run(
        ["git", "-C", folder, *who, *words], capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.fixture
def checkout(tmp_path):
    """A repository with a package in it, and one commit."""
    (tmp_path / "src" / "dpquant").mkdir(parents=True)
    (tmp_path / "src" / "dpquant" / "a.py").write_text("A = 1\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "one")
    return tmp_path


def fresh(*arguments, **given):
    return version.__wrapped__(*arguments, **given)


def test_a_checkout_is_named_by_its_commit_of_now(checkout):
    package = checkout / "src" / "dpquant"
    first = fresh(package)
    assert first.endswith(f"+g{git(checkout, 'rev-parse', '--short=9', 'HEAD')}")
    git(checkout, "commit", "-qm", "two", "--allow-empty")
    second = fresh(package)
    assert second != first and second.endswith(f"+g{git(checkout, 'rev-parse', '--short=9', 'HEAD')}")
    assert re.fullmatch(r"\d+(\.\d+)*(\.dev0)?\+g[0-9a-f]{9}", second), "and no count of commits of another time"


def test_a_change_that_is_in_no_commit_shows(checkout):
    package = checkout / "src" / "dpquant"
    assert not fresh(package).endswith(".dirty")
    (package / "a.py").write_text("A = 2\n")
    assert fresh(package).endswith(".dirty")


def test_a_tag_does_not_hide_the_commit(checkout):
    git(checkout, "tag", "v9.9")
    assert "9.9" not in fresh(checkout / "src" / "dpquant")


def test_an_installed_package_has_the_version_of_its_build(checkout, tmp_path):
    assert fresh(tmp_path / "lib" / "site-packages" / "dpquant") == INSTALLED
    assert fresh(checkout / "src" / "dpquant", git="no-such-program") == INSTALLED


def test_the_repository_of_a_hook_is_not_asked(checkout, monkeypatch, tmp_path):
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "other"))
    assert fresh(checkout / "src" / "dpquant") != INSTALLED


def test_the_face_has_it():
    assert dpquant.__version__ == version()
