# SPDX-License-Identifier: Apache-2.0
"""What scripts/release-check relies on: its lists and clean rooms see what is too many, missing or not asked for."""

import ast
import re
import runpy
import subprocess
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONTENTS = runpy.run_path(str(ROOT / "scripts" / "contents"))
ROOM = runpy.run_path(str(ROOT / "scripts" / "clean-room"))
LISTED = ["wheel dpquant/py.typed", "wheel dpquant.dist-info/METADATA", "sdist src/dpquant/py.typed", "sdist PKG-INFO"]
CODE = ["src/dpquant/a.py", "src/dpquant/b/c.py"]
WHEEL = ["dpquant/a.py", "dpquant/b/c.py", "dpquant/py.typed", "dpquant-1.0.dist-info/METADATA"]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())


def wheel_of(folder, names, tag="cp312-abi3-linux_x86_64", metadata=""):
    path = folder / f"dpquant-1.0-{tag}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, metadata)
    return path


def sdist_of(folder, names):
    (folder / "x").write_text("")
    path = folder / "dpquant-1.0.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name in names:
            archive.add(folder / "x", f"dpquant-1.0/{name}")
    return path


def wrong_in(path):
    return CONTENTS["differences"](path, LISTED, CODE)


def test_archives_that_hold_what_they_should_are_accepted(tmp_path):
    assert wrong_in(wheel_of(tmp_path, [*WHEEL, "dpquant/_native.abi3.so"])) == []
    assert wrong_in(wheel_of(tmp_path, WHEEL, "py3-none-any")) == []
    assert wrong_in(sdist_of(tmp_path, [*CODE, "src/dpquant/py.typed", "PKG-INFO"])) == []


@pytest.mark.parametrize(
    ("names", "wrong"),
    [
        (WHEEL[1:], "missing: dpquant/a.py"),
        (WHEEL[:2] + WHEEL[3:], "missing: dpquant/py.typed"),
        ([*WHEEL, "dpquant/scratch.py"], "too many: dpquant/scratch.py"),
        ([*WHEEL, "tests/test_a.py"], "too many: tests/test_a.py"),
    ],
)
def test_a_file_too_many_or_missing_is_seen(tmp_path, names, wrong):
    assert wrong_in(wheel_of(tmp_path, names)) == [wrong]


def test_kernels_in_a_wheel_for_any_platform_are_seen(tmp_path):
    path = wheel_of(tmp_path, [*WHEEL, "dpquant/_native.abi3.so"], "py3-none-any")
    assert wrong_in(path) == ["too many: dpquant/_native.*"]


def test_the_list_names_every_other_file_of_the_package():
    """A template or a page of explanations that was added stands in scripts/contents.txt."""
    listed = (ROOT / "scripts" / "contents.txt").read_text().splitlines()
    tracked = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "src", "native"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert {f"sdist {name}" for name in tracked if not name.endswith(".py")} <= set(listed)


def test_a_room_has_what_is_asked_for_and_nothing_else():
    found = ROOM["asked_for"](["jinja2>=3.1"])
    assert found.keys() == {"jinja2", "markupsafe"}


@pytest.mark.parametrize("line", ["no-such-package-of-anybody", "jinja2>=1000"])
def test_what_cannot_be_had_is_refused(line):
    with pytest.raises(LookupError):
        ROOM["asked_for"]([line])


def test_a_wheel_asks_without_its_extras(tmp_path):
    metadata = (
        'Requires-Dist: jinja2>=3.1\nRequires-Dist: opacus; extra == "bench"\nRequires-Dist: x; python_version<"3"\n'
    )
    path = wheel_of(tmp_path, WHEEL, metadata=metadata)
    assert ROOM["requirements_of"](path) == ["jinja2>=3.1"]


def on_the_package_index(text):
    """README.md as a wheel describes itself."""
    for one in SETTINGS["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]:
        text = re.sub(one["pattern"], one["replacement"], text)
    return text


def led_astray(text):
    """Links and pictures that lead into the repository."""
    links = re.findall(r"\]\(([^)]*)\)", text) + re.findall(r'(?:src|href)="([^"]*)"', text)
    return [link for link in links if not link.startswith("https://")]


def test_the_package_index_shows_no_link_that_leads_nowhere():
    text = (ROOT / "README.md").read_text()
    assert led_astray(text), "it has some where it stands"
    shown = on_the_package_index(text)
    assert led_astray(shown) == [] and "arxiv.org" in shown and "bash scripts/demo" in shown
    assert led_astray(on_the_package_index("[a](<b c.md>)")), "one of another form would be seen"


def without_encoding(source):
    """Lines on which a text file is read or written in the encoding of the system, which is not UTF-8 everywhere."""
    found = []
    for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        given = {keyword.arg for keyword in call.keywords}
        modes = [one.value for one in call.args if isinstance(one, ast.Constant) and isinstance(one.value, str)]
        opens = name == "open" and ast.unparse(call.func) in ("open", "path.open", "draft.open")
        text = name in ("read_text", "write_text") or (opens and not any("b" in mode for mode in modes))
        if text and "encoding" not in given:
            found.append(call.lineno)
    return found


@pytest.mark.parametrize("path", sorted((ROOT / "src").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_text_is_utf8_on_every_system(path):
    assert without_encoding(path.read_text()) == []


def test_text_in_another_encoding_would_be_seen():
    assert without_encoding('path.read_text()\npath.open("a")\nopen(name)\nos.open(path, 0)\npath.open("rb")') == [
        1,
        2,
        3,
    ]
