# SPDX-License-Identifier: Apache-2.0
"""Prints what `dpquant evaluate` found. Loads no torch."""

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from dpquant.runs.evaluated import Evaluation

_MOST_COLUMNS = 10  # of a confusion matrix that is printed; the report and --json have larger ones


def print_evaluation(console: Console, found: "Evaluation") -> None:
    """Print what was measured, and whether and how the test records are protected."""
    facts = Table(show_header=False, box=None, pad_edge=False)
    for name, value in _facts(found):
        facts.add_row(name, value)
    console.print(facts, highlight=False)
    if found.classes is not None:
        console.print()
        console.print(_classes(found), highlight=False)
    if found.confusion is not None and len(found.confusion) <= _MOST_COLUMNS:
        console.print("\nConfusion: a row for each true class, a column for what it was taken for", highlight=False)
        console.print(_confusion(found), highlight=False)
    console.print(f"\n{found.statement}", markup=False, highlight=False)


def _facts(found: "Evaluation") -> list[tuple[str, str]]:
    rows = [("test records", found.data)]
    if found.records is not None:
        unreadable = f", {found.unreadable:,} of them unreadable" if found.unreadable else ""
        rows.append(("number", f"{found.records:,}{unreadable}"))
    if found.accuracy is not None and found.accuracy_low is not None and found.accuracy_high is not None:
        interval = f"{found.accuracy_low:.2%} to {found.accuracy_high:.2%}"
        rows.append(("accuracy", f"{found.accuracy:.2%} (95 % interval {interval})"))
    if (noisy := found.protected) is not None:
        rows.append(("accuracy, with noise", f"{noisy.accuracy:.2%} (95 % of the noise within {noisy.half_width:.2%})"))
    if (ranking := found.ranking) is not None:
        named = {
            "average precision": ranking.average_precision,
            "ROC AUC": ranking.roc_auc,
            "recall at 1 % false positives": ranking.recall_at_1_percent_fpr,
            "calibration error": ranking.calibration_error,
        }
        rows += [
            (name, "- (records of one class)" if value is None else f"{value:.4f}") for name, value in named.items()
        ]
    rows += [(name.replace("_", " "), f"{value:.4g}") for name, value in (found.errors or {}).items()]
    return rows


def _classes(found: "Evaluation") -> Table:
    table = Table(box=None, pad_edge=False)
    for number, title in enumerate(("class", "precision", "recall", "records")):
        table.add_column(title, justify="right" if number else "left")
    for one in found.classes or ():
        table.add_row(_plain(one.name), _share(one.precision), _share(one.recall), f"{one.support:,}")
    return table


def _confusion(found: "Evaluation") -> Table:
    table = Table(box=None, pad_edge=False)
    names = [_plain(one.name) for one in found.classes or ()]
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right")
    for name, row in zip(names, found.confusion or (), strict=True):
        table.add_row(name, *(f"{count}" for count in row))
    return table


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _plain(name: str) -> str:
    """Return a class's name as rich shows it, without taking brackets in it for markup."""
    return name.replace("[", "\\[")
