# SPDX-License-Identifier: Apache-2.0
"""Workflows, forms, citation and container are valid, actions are pinned by hash, owners own files that are there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GITHUB = ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
FORMS = [path for path in (GITHUB / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml"]
BIN = Path(sys.executable).parent


def run(*command):
    return subprocess.run(command, capture_output=True, text=True, check=False)


def valid(kind, *files):
    return run(BIN / "check-jsonschema", "--builtin-schema", f"vendor.{kind}", *files).returncode == 0


def safe(path):
    """Whether zizmor, which asks nobody, finds nothing to say against workflows."""
    return run(BIN / "zizmor", "--offline", "--no-progress", "--quiet", path).returncode == 0


@pytest.mark.parametrize(
    ("kind", "files"),
    [
        ("github-workflows", WORKFLOWS),
        ("github-issue-forms", FORMS),
        ("github-issue-config", [GITHUB / "ISSUE_TEMPLATE" / "config.yml"]),
        ("dependabot", [GITHUB / "dependabot.yml"]),
        ("citation-file-format", [ROOT / "CITATION.cff"]),
    ],
)
def test_a_file_follows_its_schema(kind, files):
    assert files and valid(kind, *files)


def test_a_file_that_does_not_would_be_seen(tmp_path):
    text = (GITHUB / "workflows" / "ci.yml").read_text()
    (tmp_path / "wrong.yml").write_text(text.replace("runs-on:", "runs-at:"))
    assert not valid("github-workflows", tmp_path / "wrong.yml")


def test_workflows_are_safe_and_pin_actions_by_hash():
    assert safe(GITHUB)
    used = [one for path in WORKFLOWS for one in re.findall(r"uses: (\S+)", path.read_text()) if one[0] != "$"]
    assert len(used) >= 10 and all(re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", one) for one in used)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("@3d3c42e5aac5ba805825da76410c181273ba90b1 # v7.0.1", "@v7"),
        ("          persist-credentials: false\n", ""),
        ("    permissions:\n      contents: read\n", "    permissions: write-all\n"),
    ],
)
def test_a_workflow_that_is_not_safe_would_be_seen(tmp_path, right, wrong):
    text = (GITHUB / "workflows" / "nightly.yml").read_text()
    assert right in text
    (tmp_path / "nightly.yml").write_text(text.replace(right, wrong))
    assert not safe(tmp_path / "nightly.yml")


def lint_container(text):
    linted = subprocess.run([BIN / "hadolint", "-"], input=text, capture_output=True, text=True, check=False)
    return linted.returncode == 0


def test_the_container_is_sound_runs_as_a_user_and_starts_dpquant():
    text = (ROOT / "Dockerfile").read_text()
    assert lint_container(text)
    last = text.split("\nFROM ")[-1]
    assert "--uid 1000" in last and "\nUSER 1000\n" in last and 'ENTRYPOINT ["dpquant"]' in last


def test_a_container_that_is_not_would_be_seen():
    text = (ROOT / "Dockerfile").read_text()
    assert not lint_container(text.replace("python:3.12-slim-bookworm", "python"))


def unowned(text):
    """Patterns of owners that match no file."""
    patterns = [line.split()[0] for line in text.splitlines() if line and not line.startswith("#")]
    return [pattern for pattern in patterns if not (ROOT / pattern.lstrip("/")).exists()]


def test_owners_own_what_is_there():
    text = (GITHUB / "CODEOWNERS").read_text()
    assert not unowned(text) and "/src/dpquant/privacy/" in text
    assert unowned("/src/dpquant/secrets/ @a/b") == ["/src/dpquant/secrets/"]


def test_the_only_records_of_a_clone_are_of_runs_that_were_made_there():
    """Who looks for the record of a first run in a clone finds no other one."""
    tracked = run("git", "-C", ROOT, "ls-files").stdout.split()
    if not tracked:
        pytest.skip("not a checkout")
    assert not [path for path in tracked if Path(path).name == "record.json"]
