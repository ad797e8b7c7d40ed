# SPDX-License-Identifier: Apache-2.0
"""Writes the tables of results into docs/paper.md, with the paper's figures next to ours.

The text between `<!-- results: NAME -->` and `<!-- end -->` is generated from results/NAME.json; the rest is written by
hand.
"""

import itertools
import json
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from experiments.published import PAPER
from experiments.runner import RESULTS, Site, spread_of

PAGE = Path(__file__).parents[1] / "docs" / "paper.md"
PLACES = re.compile(r"(<!-- results: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)

METRICS = {  # beside accuracy, of tables whose positives are rare
    "average_precision": "average precision, %",
    "roc_auc": "area under the ROC curve, %",
    "recall_at_1_percent_fpr": "recall at 1 % false positives, %",
}


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
    metrics = [name for name in METRICS if all(name in f.get("metrics", {}) for f in results["summary"].values())]
    head = ["", *([METRICS[name] for name in metrics] or ["test accuracy, %"])]
    head += ["seeds", "MACs quantized", "in four bits", "analyses' share of epsilon"]
    lines = [head + ["the paper"] * bool(theirs) + ["options"]]
    lines += [
        _line(row, facts, metrics)
        + [theirs.get(row, "")] * bool(theirs)
        + [f"`{options[row]}`" if options[row] else ""]
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


def _line(row: str, facts: dict, metrics: Sequence[str]) -> list[str]:
    pairs = [(statistics.mean(values), spread_of(values)) for values in (facts["metrics"][name] for name in metrics)]
    return [
        row,
        *(_with_spread(*pair) for pair in pairs or [(facts["accuracy_mean"], facts["accuracy_spread"])]),
        str(len(facts["accuracies"])),
        f"{facts['quantized_fraction_macs']:.0%}",
        f"{facts['four_bit_fraction_macs']:.0%}",
        "NOT PRIVATE" if facts["epsilon"] is None else f"{facts['epsilon_analysis_share']:.2%}",
    ]


def _with_spread(mean: float, spread: float | None) -> str:
    return f"{mean:.2f}" if spread is None else f"{mean:.2f} ± {spread:.2f}"
