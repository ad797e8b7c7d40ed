# SPDX-License-Identifier: Apache-2.0
"""The verb `dpquant ledger`. Loads no torch."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from dpquant.app.console import print_account
from dpquant.app.options import WRONG_RESULT, Json, refuse
from dpquant.errors import LedgerError


def ledger(
    runs: Annotated[list[Path], typer.Argument(help="run directories or ledger files, on the same data")],
    delta: Annotated[float | None, typer.Option(help="at which epsilon is stated [that of the plans]")] = None,
    as_json: Json = False,
) -> int:
    """Verify the ledgers of runs and print what each has spent; of several, also what all have spent together.

    Exit code 1: a ledger is not as it was written. A torn last line is no error: nothing was done under it.

    With --json: epsilon, delta, steps, analyses, attempts, research (true: a seed was given, not private) of all runs
    together; head, the hash of a single ledger's last line; and runs, a list with the same of each run, its events, its
    planned_epsilon, format, run, dpquant and torn_bytes.

    Example: dpquant ledger runs/fashion
    """
    from dpquant.app.spent import account

    try:
        found = account(runs, delta)
    except LedgerError as error:
        return refuse(str(error), WRONG_RESULT)
    if as_json:
        print(found.to_json(), end="")
    else:
        print_account(Console(), found)
    return 0
