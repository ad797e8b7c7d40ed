# SPDX-License-Identifier: Apache-2.0
"""Lay out the pages of the site: those of `docs/`, and those that lie beside the code, with all that they link to.

A page links as in a checkout, `../src/dpquant/privacy/plan.py#L12`. On the site a Markdown file is a page, a text file
is shown with numbered lines, and every other file is copied.
"""

import re
import shutil
from pathlib import Path, PurePosixPath

from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import TextLexer, get_lexer_for_filename
from pygments.util import ClassNotFound

ROOT = Path(__file__).parents[1]
_LINK = re.compile(r'(\]\(|(?:src|href)=")(?!https?:|mailto:|#)([^)#"\s]+)(#[^)"\s]*)?')
_CODE = re.compile(r"(^ *```.*?^ *```$|``.+?``|`[^`]+`)", re.DOTALL | re.MULTILINE)
_LINE = re.compile(r"#L(\d+)$")
_COPIED = {".png", ".svg", ".json"}


class PageError(Exception):
    """Raised for a page that links to something that is not there, or that no page can show."""


def places() -> dict[Path, PurePosixPath]:
    """Return where every Markdown page of the repository lies on the site: {path in the repository: path there}."""
    found = {
        Path("README.md"): PurePosixPath("index.md"),
        Path("CHANGELOG.md"): PurePosixPath("changelog.md"),
        Path("CONTRIBUTING.md"): PurePosixPath("contributing.md"),
        Path("SECURITY.md"): PurePosixPath("security.md"),
        Path("experiments/README.md"): PurePosixPath("experiments.md"),
        Path("tests/invariants/README.md"): PurePosixPath("invariants.md"),
        Path("src/dpquant/app/explanations/terms.md"): PurePosixPath("words.md"),
    }
    for readme in sorted(ROOT.glob("src/dpquant/*/README.md")):
        found[readme.relative_to(ROOT)] = PurePosixPath("rooms", f"{readme.parent.name}.md")
    for readme in sorted(ROOT.glob("examples/*/README.md")):
        found[readme.relative_to(ROOT)] = PurePosixPath("examples", f"{readme.parent.name}.md")
    for page in sorted(ROOT.glob("docs/*.md")):
        found[page.relative_to(ROOT)] = PurePosixPath(page.name)
    return {page: place for page, place in found.items() if (ROOT / page).exists()}


def stage(out: Path) -> None:
    """Write all pages, and the files that they link to, into a new folder.

    Raises:
      PageError: a page links to what is not in the repository, or to a folder without a README.md.
    """
    pages = places()
    linked: set[Path] = set()
    for page, place in pages.items():
        target = out / place
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(relinked((ROOT / page).read_text(encoding="utf-8"), page, pages, linked), encoding="utf-8")
    for path in linked:
        _show(ROOT / path, out / _place_of(path, pages))
    shutil.copytree(ROOT / "website" / "assets", out / "assets")


def relinked(text: str, page: Path, pages: dict[Path, PurePosixPath], linked: set[Path]) -> str:
    """Return a page whose links lead to where their targets lie on the site.

    Args:
      text: of the page.
      page: its path in the repository.
      pages: where pages lie on the site.
      linked: gets the files that the page links to and that are no pages.
    """

    def moved(found: re.Match[str]) -> str:
        before, link, anchor = found.groups(default="")
        path = Path(_normal(page.parent / link))
        if (ROOT / path).is_dir():
            path /= "README.md"
        if not (ROOT / path).is_file() or path.is_absolute() or path.parts[0] == "..":
            raise PageError(f"{page}: Expected a link to a file of the repository; got {link}. Mend the link.")
        if path not in pages:
            linked.add(path)
            anchor = _LINE.sub(r"#L-\1", anchor)
        return before + _from(pages[page].parent, _place_of(path, pages)) + anchor

    parts = _CODE.split(text)  # every second one is code
    return "".join(part if number % 2 else _LINK.sub(moved, part) for number, part in enumerate(parts))


def _place_of(path: Path, pages: dict[Path, PurePosixPath]) -> PurePosixPath:
    if path in pages:
        return pages[path]
    shown = path.suffix in _COPIED
    return PurePosixPath("files", path) if shown else PurePosixPath("files", f"{path}.html")


def _show(path: Path, target: Path) -> None:
    """Copy a file, or write a page of its lines, which have the anchors L-1, L-2, ..."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix in _COPIED:
        shutil.copy(path, target)
        return
    text = path.read_text(encoding="utf-8")
    try:
        lexer = get_lexer_for_filename(path.name)
    except ClassNotFound:
        lexer = TextLexer()
    name = str(path.relative_to(ROOT))
    lines = HtmlFormatter(full=True, title=name, linenos="inline", lineanchors="L", anchorlinenos=True)
    target.write_text(highlight(text, lexer, lines), encoding="utf-8")


def _normal(path: Path) -> str:
    """Return the path without .. as far as it can be."""
    parts: list[str] = []
    for part in path.parts:
        if part == ".." and parts and parts[-1] != "..":
            parts.pop()
        elif part != ".":
            parts.append(part)
    return "/".join(parts)


def _from(folder: PurePosixPath, place: PurePosixPath) -> str:
    """Return the link from a page in this folder of the site to a place."""
    common = 0
    for one, other in zip(folder.parts, place.parts, strict=False):
        if one != other:
            break
        common += 1
    return "/".join([".."] * (len(folder.parts) - common) + list(place.parts[common:]))
