# SPDX-License-Identifier: Apache-2.0
"""Look for every link of a built site: its file, its anchor, and that nothing is loaded from elsewhere."""

import functools
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

_LOADED = {("img", "src"), ("script", "src"), ("link", "href"), ("iframe", "src"), ("source", "src"), ("video", "src")}
_STYLE_LOADS = re.compile(r"""(?:url\(|@import)\s*["']?((?:https?:)?//[^"')\s]+)""")
_NAMES = {"canonical", "sitemap"}  # kinds of <link> that load nothing


class Page(HTMLParser):
    """The links, the loaded addresses and the anchors of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.anchors |= {value for name in ("id", "name") if (value := given.get(name))}
        for name in ("href", "src"):
            address = given.get(name)
            if address is None or given.get("rel") in _NAMES:
                continue
            loads = (tag, name) in _LOADED
            (self.loaded if loads else self.links).append(address)


def flaws(site: Path) -> list[str]:
    """Return what is wrong with the links of a site, a line each; empty if nothing is."""

    @functools.cache
    def page_of(path: Path) -> Page:
        return Page(path.read_text(encoding="utf-8"))

    found = [
        f"{style.relative_to(site)}: loads {address} from elsewhere"
        for style in sorted(site.rglob("*.css"))
        for address in _STYLE_LOADS.findall(style.read_text(encoding="utf-8"))
    ]
    for path in sorted(site.rglob("*.html")):
        page, name = page_of(path), path.relative_to(site)
        for address in page.loaded:
            if urlsplit(address).netloc:
                found.append(f"{name}: loads {address} from elsewhere")
        for address in [*page.links, *page.loaded]:
            url = urlsplit(address)
            if url.scheme or url.netloc:
                continue
            target = path if not url.path else _file_of(site, path, unquote(url.path))
            if not target.is_file():
                found.append(f"{name}: {address} leads nowhere")
            elif url.fragment and target.suffix == ".html" and unquote(url.fragment) not in page_of(target).anchors:
                found.append(f"{name}: {address} has no such anchor")
    return found


def _file_of(site: Path, page: Path, address: str) -> Path:
    """Return the file that a server would give for a path."""
    target = site / address.lstrip("/") if address.startswith("/") else page.parent / address
    return target / "index.html" if address.endswith("/") or target.is_dir() else target
