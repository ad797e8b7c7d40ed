# SPDX-License-Identifier: Apache-2.0
"""Redraws all pictures from the committed results, without a run, and draws the README's."""

import importlib
import json
from pathlib import Path

from experiments.drawing import draw_rows
from experiments.published import published
from experiments.runner import Site, draw_summary

PICTURES = Path(__file__).parents[1] / "docs" / "pictures"
DRAWN = ("damage", "fidelity", "pareto", "ranking", "variance")  # scripts with a picture of their own
RESULT = {
    "full precision": ("baselines-gtsrb", "full precision"),
    "int8 in every layer": ("schedules", "int8, all layers"),
    "four bits (int4-clip) in 75 %, by dpquant": ("schedules", "int4-clip, dpquant 0.75"),
    "FP4 in 50 %, by dpquant": ("baselines-gtsrb", "dpquant 0.5"),
    "FP4 in 50 %, a fixed random set": ("baselines-gtsrb", "static 0.5"),
    "FP4 in 90 %, by dpquant": ("baselines-gtsrb", "dpquant 0.9"),
    "FP4 in 90 %, a fixed random set": ("baselines-gtsrb", "static 0.9"),
}
"""{words in the README's picture: (table, row)}"""
TITLE = "German traffic signs, trained privately (epsilon = 8): layers in low precision"


def run(site: Site, readme: Path = PICTURES / "result.png") -> None:
    """Redraw every picture whose results are there, and the README's."""
    for path in sorted(site.results.glob("*.json")):
        results = json.loads(path.read_text())
        if path.stem in DRAWN:
            importlib.import_module(f"experiments.{path.stem}").draw(results, path.with_suffix(".png"))
        elif "summary" in results:
            draw_summary(results["summary"], path.with_suffix(".png"), results["title"], published(path.stem))
    draw_result(site.results, readme)
    print(f"drew the pictures of {site.results}")


def draw_result(results: Path, path: Path) -> None:
    """Draw the README's picture: what low precision costs, and that it matters which layers have it."""
    tables = {name: json.loads((results / f"{name}.json").read_text())["summary"] for name, _ in RESULT.values()}
    rows = {words: tables[table][row]["accuracies"] for words, (table, row) in RESULT.items()}
    paper = {words: published(table)[row] for words, (table, row) in RESULT.items() if row in published(table)}
    draw_rows(rows, path, TITLE, paper=paper, ordered=False)
