# SPDX-License-Identifier: Apache-2.0
"""The verb `dpquant total`. Loads no torch."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from dpquant.app.options import WRONG_RESULT, Json, refuse
from dpquant.errors import LedgerError

if TYPE_CHECKING:
    from dpquant.app.spent import Total


def total(
    runs: Annotated[list[Path], typer.Argument(help="run directories or ledger files, on the same people")],
    delta: Annotated[float | None, typer.Option(help="at which epsilon is stated [that of the plans]")] = None,
    as_json: Json = False,
) -> int:
    """State what all runs on the same people cost together, in one line and in risk.

    Verifies the ledgers and composes them as `dpquant ledger` does, which lists them one by one. A run that is given
    twice, or as a copy, counts once, and a note says so.

    Exit code 1: a ledger is not as it was written.

    With --json: epsilon (null: infinite), delta, runs (a list of ledger, run and epsilon), steps, analyses, attempts,
    research, meaning (null, or attacks, even_odds and mu) and notes (a list of texts).

    Example: dpquant total runs/fashion runs/fashion-again
    """
    from dpquant.app.spent import total as total_of

    try:
        found = total_of(runs, delta)
    except LedgerError as error:
        return refuse(str(error), WRONG_RESULT)
    if as_json:
        print(found.to_json(), end="")
    else:
        print_total(Console(), found)
    return 0


def print_total(console: Console, found: "Total") -> None:
    """Print what runs on the same people cost together."""
    from dpquant.privacy.plan import rounded_up

    table = Table(box=None, pad_edge=False)
    for number, title in enumerate(("run", "epsilon", "steps", "analyses")):
        table.add_column(title, justify="right" if number else "left")
    for path, spent in found.account.runs.items():
        table.add_row(str(path), rounded_up(spent.epsilon), f"{spent.count('train')}", f"{spent.count('analysis')}")
    console.print(table, highlight=False)
    console.print(f"\n{found.told} Runs that only tuned settings count.", markup=False, highlight=False)
