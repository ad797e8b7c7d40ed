# SPDX-License-Identifier: Apache-2.0
"""Build the site, or write the page of the command line.

python -m website              builds the site into build/site and checks its links
python -m website reference    writes docs/command-line.md anew, from verbs and settings
"""

import shutil
import subprocess
import sys

from website.check import flaws
from website.reference import PAGE, reference
from website.stage import ROOT, stage

PAGES, SITE = ROOT / "build" / "pages", ROOT / "build" / "site"


def build() -> int:
    """Build the site and return the exit code: 1 if a page or a link is wrong."""
    for folder in (PAGES, SITE):
        shutil.rmtree(folder, ignore_errors=True)
    stage(PAGES)
    config = shutil.copy(ROOT / "website" / "zensical.toml", SITE.with_suffix(".toml"))  # pages have to lie beside it
    zensical = [sys.executable, "-m", "zensical", "build", "--strict", "--clean", "--config-file", config]
    code = subprocess.run(zensical, check=False).returncode
    found = flaws(SITE)
    for flaw in found:
        print(flaw)
    pages = len(list(SITE.rglob("*.html")))
    print(f"{SITE.relative_to(ROOT)}: {pages} pages, {len(found)} wrong links")
    return int(bool(code or found))


def main(arguments: list[str]) -> int:
    """Do what the arguments say and return the exit code."""
    match arguments:
        case []:
            return build()
        case ["reference"]:
            PAGE.write_text(reference(), encoding="utf-8")
            return 0
        case _:
            print(__doc__, file=sys.stderr)
            return 2


sys.exit(main(sys.argv[1:]))
