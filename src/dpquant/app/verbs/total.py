# SPDX-License-Identifier: Apache-2.0
"""The verb `dpquant total`. Loads no torch."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from dpquant.app.console import print_total
from dpquant.app.options import WRONG_RESULT, Json, refuse
from dpquant.errors import LedgerError


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
