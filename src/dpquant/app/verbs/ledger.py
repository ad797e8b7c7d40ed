# SPDX-License-Identifier: Apache-2.0
"""The verb `dpquant ledger`. Loads no torch."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from dpquant.app.options import WRONG_RESULT, Json, refuse
from dpquant.errors import LedgerError

if TYPE_CHECKING:
    from dpquant.app.spent import Account


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


def print_account(console: Console, account: "Account") -> None:
    """Print what each ledger says and, of several, what all runs have spent together."""
    from dpquant.privacy.plan import rounded_up

    for path, contents in account.ledgers.items():
        spent, table = account.runs[path], Table(show_header=False, box=None, pad_edge=False)
        planned = "" if contents.budget is None else f", of {rounded_up(contents.budget.epsilon)} planned"
        table.add_row("ledger", f"{path}: sound")
        if contents.run:
            table.add_row("run", f"{contents.run}, dpquant {contents.version}")
        table.add_row("attempts", f"{contents.attempts}")
        for event in contents.events:
            what = f"{event.count} {'steps' if event.kind == 'train' else 'analyses'}"
            table.add_row("charged", f"{what}, sample rate {event.sample_rate:.6g}, noise {event.noise_multiplier:.4f}")
        table.add_row("epsilon", f"{rounded_up(spent.epsilon)} (delta {spent.delta:g}){planned}")
        table.add_row("head", contents.head)
        if contents.torn:
            table.add_row("torn", f"a last line of {contents.torn} bytes, which charges nothing")
        if contents.research:
            table.add_row("NOT PRIVATE", "sampling or noise came from a given seed")
        console.print(table, highlight=False)
        console.print()
    if len(account.ledgers) > 1:
        together = account.together
        console.print(
            f"All runs together, if on the same data: epsilon = {rounded_up(together.epsilon)} at delta = "
            f"{together.delta:g}, {together.count('train')} steps and {together.count('analysis')} analyses. Runs "
            "that only tuned settings count.",
            markup=False,
            highlight=False,
        )
