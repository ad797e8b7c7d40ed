# SPDX-License-Identifier: Apache-2.0
"""Writes the tables of results into docs/paper.md, with the paper's figures next to ours.

The text between `<!-- results: NAME -->` and `<!-- end -->` is generated from results/NAME.json; the rest is written by
hand.
"""

import itertools
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from experiments.published import PAPER
from experiments.runner import RESULTS, Site

PAGE = Path(__file__).parents[1] / "docs" / "paper.md"
PLACES = re.compile(r"(<!-- results: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def run(site: Site) -> None:
    """Rewrite the tables of docs/paper.md."""
    PAGE.write_text(refreshed(PAGE.read_text()))
    print(f"wrote {PAGE.name}")


def refreshed(page: str, results: Path = RESULTS) -> str:
    """Return the page with its tables generated from the results in a directory."""
    return PLACES.sub(lambda place: place[1] + _table(place[2], results) + place[3], page)


def _table(name: str, folder: Path) -> str:
    path = folder / f"{name}.json"
    if not path.exists():
        return "Not run yet.\n"
    results = json.loads(path.read_text())
    theirs = PAPER.get(name, {})
    common, options = _commands({row: facts["command"] for row, facts in results["summary"].items()})
    head = ["", "test accuracy, %", "seeds", "MACs quantized", "in four bits", "analyses' share of epsilon"]
    lines = [head + ["the paper"] * bool(theirs) + ["options"]]
    lines += [
        _line(row, facts) + [theirs.get(row, "")] * bool(theirs) + [f"`{options[row]}`" if options[row] else ""]
        for row, facts in results["summary"].items()
    ]
    table = "".join(
        f"| {' | '.join(line)} |\n" + ("|---" * len(line) + "|\n" if i == 0 else "") for i, line in enumerate(lines)
    )
    seeds: dict[str, list[str]] = {}
    for run in results["missing"]:
        row, seed = run.rsplit(", seed ", 1)
        seeds.setdefault(row, []).append(seed)
    missing = "; ".join(f"{row} at seed {', '.join(found)}" for row, found in seeds.items())
    missing = f"\nNot run yet: {missing}.\n" if missing else ""
    return f"{table}\nEvery row is `dpquant train {common} OPTIONS --seed SEED --out RUN`, seeds from 0.\n{missing}"


def _commands(commands: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    """Return the options that all commands begin with, and {row: its other options, with its program if not dpquant}.

    If an option is given twice, the last value counts.
    """
    programs, pairs = {}, {}
    for row, command in commands.items():
        programs[row], _, options = command.partition(" train ")
        words = options.rsplit(" --seed ", 1)[0].split()
        pairs[row] = list(zip(words[::2], words[1::2], strict=True))
    shared = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*pairs.values(), strict=False))
    common = [column[0] for column in shared]
    others = {row: "" if program == "dpquant" else f"({program}) " for row, program in programs.items()}
    return _text(dict(common).items()), {row: others[row] + _text(found[len(common) :]) for row, found in pairs.items()}


def _text(options: Iterable[tuple[str, str]]) -> str:
    return " ".join(itertools.chain.from_iterable(options))


def _line(row: str, facts: dict) -> list[str]:
    spread = "" if facts["accuracy_spread"] is None else f" ± {facts['accuracy_spread']:.2f}"
    return [
        row,
        f"{facts['accuracy_mean']:.2f}{spread}",
        str(len(facts["accuracies"])),
        f"{facts['quantized_fraction_macs']:.0%}",
        f"{facts['four_bit_fraction_macs']:.0%}",
        "NOT PRIVATE" if facts["epsilon"] is None else f"{facts['epsilon_analysis_share']:.2%}",
    ]
