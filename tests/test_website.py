# SPDX-License-Identifier: Apache-2.0
"""Pages lead where they say on the site too, say what the program says, and all are in the contents.

`scripts/docs` builds the site itself and looks for every link of it, which takes longer.
"""

import re
import tomllib
from pathlib import Path

import pytest
from website.check import flaws
from website.reference import PAGE, reference
from website.stage import ROOT, PageError, places, relinked, stage

from dpquant.app.cli import app
from dpquant.app.explain import settings
from dpquant.runs.pages.answers import answers
from runs.test_pages import facts


def named(contents) -> list[str]:
    """The pages of a list of contents, at any depth."""
    if isinstance(contents, str):
        return [contents]
    inner = contents.values() if isinstance(contents, dict) else contents
    return [page for one in inner for page in named(one)]


def test_every_page_is_in_the_contents_once():
    with (ROOT / "website" / "zensical.toml").open("rb") as file:
        pages = named(tomllib.load(file)["project"]["nav"])
    assert sorted(pages) == sorted(map(str, places().values())), "website/zensical.toml has the contents"


def test_all_pages_are_laid_out_with_what_they_link_to(tmp_path):
    stage(tmp_path / "pages")
    assert (tmp_path / "pages" / "rooms" / "privacy.md").exists()
    source = tmp_path / "pages" / "files" / "src" / "dpquant" / "privacy" / "noise.py.html"
    assert 'id="L-49"' in source.read_text() or 'name="L-49"' in source.read_text()


@pytest.mark.parametrize(
    ("link", "there"),
    [
        ("data.md#images", "data.md#images"),
        ("../README.md", "index.md"),
        ("../src/dpquant/app/README.md", "rooms/app.md"),
        ("../src/dpquant/privacy", "rooms/privacy.md"),
        ("../src/dpquant/errors.py#L9", "files/src/dpquant/errors.py.html#L-9"),
        ("pictures/result.png", "files/docs/pictures/result.png"),
        ("https://arxiv.org/abs/2509.03472", "https://arxiv.org/abs/2509.03472"),
    ],
)
def test_a_link_leads_to_the_same_thing_on_the_site(link, there):
    linked: set[Path] = set()
    assert relinked(
        f"[a]({link}) `](no.md)`", Path("docs/x.md"), {**places(), Path("docs/x.md"): Path("x.md")}, linked
    ) == (f"[a]({there}) `](no.md)`")
    assert bool(linked) == there.startswith("files")


@pytest.mark.parametrize("link", ["nowhere.md", "../src/dpquant/nowhere.py", "../scripts", "../../elsewhere.md"])
def test_a_link_to_nothing_is_refused(link):
    with pytest.raises(PageError):
        relinked(f"[a]({link})", Path("docs/data.md"), places(), set())


GOOD = '<h1 id="top">A</h1><a href="b/#part">b</a><img src="p.png"><a href="https://example.org">out</a>'


@pytest.mark.parametrize(
    ("page", "flaw"),
    [
        (GOOD, None),
        (GOOD.replace("b/", "c/"), "leads nowhere"),
        (GOOD.replace("#part", "#other"), "no such anchor"),
        (GOOD.replace("p.png", "q.png"), "leads nowhere"),
        (GOOD + '<script src="https://example.org/x.js"></script>', "from elsewhere"),
        (GOOD + '<link rel="stylesheet" href="//fonts.example.org/css">', "from elsewhere"),
        (GOOD + '<a href="/b/#part">b</a>', None),
        (GOOD + '<a href="#down">b</a>', "no such anchor"),
    ],
)
def test_a_wrong_link_of_the_site_is_seen(page, flaw, tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "index.html").write_text(page)
    (tmp_path / "b" / "index.html").write_text('<h2 id="part">B</h2>')
    (tmp_path / "p.png").touch()
    found = flaws(tmp_path)
    assert (not found) if flaw is None else (len(found) == 1 and flaw in found[0]), found


@pytest.mark.parametrize(
    ("style", "flawed"),
    [("a{background:url(b.png)}", False), ("a{src:url('https://x.org/f')}", True), ("@import '//x.org/a.css';", True)],
)
def test_a_style_that_loads_from_elsewhere_is_seen(style, flawed, tmp_path):
    (tmp_path / "s.css").write_text(style)
    assert bool(flaws(tmp_path)) == flawed


def test_the_page_of_the_command_line_is_what_the_program_says():
    text = reference()
    assert PAGE.read_text(encoding="utf-8") == text, "run scripts/docs reference"
    for command in app.registered_commands:
        assert f"## dpquant {command.name}\n" in text
    assert all(f"\n### {name}\n" in text for name in settings())


def test_the_review_has_the_questions_of_the_report():
    page = (ROOT / "docs" / "review.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| (.+?) \|", page, re.MULTILINE)
    assert [question for _, question in rows] == [one.question for one in answers(facts())]
    assert [int(number) for number, _ in rows] == list(range(1, len(rows) + 1))


@pytest.mark.parametrize("script", ["before", "after"])
def test_coming_from_opacus_shows_the_scripts_as_they_are(script):
    page = (ROOT / "docs" / "opacus.md").read_text(encoding="utf-8")
    code = (ROOT / "examples" / "opacus" / f"{script}.py").read_text(encoding="utf-8").split('"""\n\n', 1)[1]
    assert f'```py title="{script}.py"\n{code}```' in page
