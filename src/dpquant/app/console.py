# SPDX-License-Identifier: Apache-2.0
"""What several verbs print: the privacy budget and what it means.

Importing this file loads neither torch nor the accountant, so that `dpquant --help` answers at once.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from dpquant.privacy.plan import PrivacyPlan
    from dpquant.runs.defaults import Default
    from dpquant.runs.settings import TrainSettings


def print_defaults(console: Console, settings: "TrainSettings", usual: Mapping[str, "Default"]) -> None:
    """Print the defaults that depend on other settings, and where each comes from."""
    from dpquant.runs.effects import has_effect

    table = Table(title="defaults", show_header=False)
    for name, default in usual.items():
        value = getattr(settings, name)
        if value == default.value and has_effect(name, vars(settings)):
            text = f"{value:,g}" if isinstance(value, int | float) else str(value)
            table.add_row(name.replace("_", " "), text, default.origin)
    if table.row_count:
        console.print(table)


def print_budget(console: Console, budget: "PrivacyPlan") -> None:
    """Print the table of a privacy plan."""
    _print_rows(console, "privacy budget", budget.table())


def print_meaning(console: Console, budget: "PrivacyPlan", records: int | None) -> None:
    """Print what the budget means in risk, and a warning if delta is too large for a public number of records."""
    from dpquant.privacy.meaning import too_large

    if rows := budget.meaning_table():
        _print_rows(console, "what it means", rows)
    if warning := too_large(budget.delta, records):
        console.print(f"Warning: {warning}", markup=False, highlight=False)


def _print_rows(console: Console, title: str, rows: Iterable[tuple[str, str]]) -> None:
    table = Table(title=title, show_header=False)
    for what, how_much in rows:
        table.add_row(what, how_much)
    console.print(table)
