# SPDX-License-Identifier: Apache-2.0
"""The documents name files that are there, and every local link leads somewhere."""

import re
from pathlib import Path

import pytest

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
    assert len(ROOMS) == 8 and all((room / "README.md").exists() for room in ROOMS)
