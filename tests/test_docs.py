# SPDX-License-Identifier: Apache-2.0
"""The documents name files that are there, and every local link leads somewhere."""

import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dpquant.app.cli import _command

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "dpquant"
ROOMS = [folder for folder in PACKAGE.iterdir() if (folder / "__init__.py").exists()]
PAGES = [ROOT / "README.md", *(page for page in (ROOT / "docs").glob("*.md") if page.name != "log.md")]
PAGES += [room / "README.md" for room in ROOMS]  # the log tells of files as they were


def missing(text: str, folder: Path) -> list[str]:
    """Files and folders that a page in this folder names or links to, and which are not there."""
    named = re.findall(r"`((?:[\w.]+/)*\w+\.(?:py|cpp|sh))`|`(tests(?:/\w+)*)`", text)
    linked = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)
    places = [folder, ROOT, PACKAGE]
    lost = [name for pair in named for name in pair if name and not any((place / name).exists() for place in places)]
    lost = [name for name in lost if "NAME" not in name]  # a placeholder
    return lost + [link for link in linked if not (folder / link).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_names_what_is_there(page):
    assert not missing(page.read_text(), page.parent)


@pytest.mark.parametrize("text", ["`engine/missing.py`", "`tests/nowhere`", "[a link](nowhere.md)", "`native/luq.cpp`"])
def test_what_is_not_there_is_seen(text):
    assert missing(text, ROOT)


def test_every_room_has_a_page():
    assert len(ROOMS) == 9 and all((room / "README.md").exists() for room in ROOMS)


LINKS = ROOT / "scripts" / "links"


def test_links_to_code_name_the_lines_where_it_is():
    checked = subprocess.run([sys.executable, LINKS, "--check"], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout
    assert (ROOT / "docs" / "how-it-works.md").read_text().count(".py#L") >= 20


def test_a_link_to_another_line_is_seen(tmp_path):
    links = runpy.run_path(str(LINKS))
    (tmp_path / "one.py").write_text("X = 1\n\n\nclass A:\n    def b(self): ...\n")
    right = "[`A.b`](one.py#L5) and [`X`](one.py#L1)"
    assert links["relinked"](right, tmp_path) == right
    assert links["relinked"](right.replace("L5", "L4"), tmp_path) == right
    with pytest.raises(LookupError):
        links["relinked"]("[`A.c`](one.py#L5)", tmp_path)


def manifests():
    """The YAML and the shell scripts of docs/distributed.md."""
    text = (ROOT / "docs" / "distributed.md").read_text()
    return [re.findall(rf"```{kind}\n(.*?)```", text, re.DOTALL) for kind in ("yaml", "(?:bash|console)")]


def problems_of_job(text):
    """What is wrong with a PyTorchJob: its form, and options that dpquant does not have."""
    yaml = pytest.importorskip("yaml")
    job = yaml.safe_load(text)
    worker = job["spec"]["pytorchReplicaSpecs"]["Worker"]
    (container,) = worker["template"]["spec"]["containers"]
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    told = [] if (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob") else ["another kind"]
    told += [] if all(isinstance(word, str) for word in container["command"]) else ["a word that is a number"]
    told += [] if mounted == {one["name"] for one in worker["template"]["spec"]["volumes"]} else ["a volume is missing"]
    told += [] if container["name"] == "pytorch" else ["the operator looks for a container that is named pytorch"]
    return told + unknown_options(container["command"])


def unknown_options(words):
    """Options of `dpquant train` in a command line that it does not have."""
    options = {option for parameter in _command().commands["train"].params for option in parameter.opts}
    own = [str(word) for word in words[words.index("dpquant") + 1 :]]
    return [word for word in own if word.startswith("--") and word not in options]


def test_what_is_to_be_pasted_for_clusters_is_of_its_form():
    (job,), scripts = manifests()
    assert problems_of_job(job) == []
    for script in scripts:
        assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
        assert unknown_options(shlex.split(script.replace("\\\n", " "), comments=True)) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"40000000"', "40000000"),
        ("--records", "--recrods"),
        ("kind: PyTorchJob", "kind: Job"),
        ("- {name: runs,", "- {name: run,"),
        ("name: pytorch\n", "name: dpquant\n"),
    ],
)
def test_a_mistake_in_a_manifest_is_seen(old, new):
    (job,), _ = manifests()
    assert old in job and problems_of_job(job.replace(old, new, 1))
