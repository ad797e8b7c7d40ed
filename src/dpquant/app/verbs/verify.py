# SPDX-License-Identifier: Apache-2.0
"""The verb `dpquant verify`. Loads no torch."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from dpquant.app.options import WRONG_RESULT, Json

if TYPE_CHECKING:
    from dpquant.app.verify import Verification


def verify(
    run: Annotated[Path, typer.Argument(help="directory of a run that has ended")], as_json: Json = False
) -> int:
    """Recompute everything that a run directory says and that can be recomputed without its data.

    The ledger's chain and head, the counts, epsilon by both accountants from the ledger, the plan from the settings,
    the statement's numbers, the hash of the model, and whether record, metrics and report agree. One line each.

    Exit code 1: something is not as it should be. 2: there is no run that has ended.

    With --json: holds (true: everything does), run, findings, a list of what, holds and detail, and skipped, what the
    record of an earlier version does not hold.

    Example: dpquant verify runs/fashion
    """
    from dpquant.app.verify import verify as verified

    found = verified(run)
    if as_json:
        print(found.to_json(), end="")
    else:
        print_verification(Console(), found)
    return 0 if found.holds else WRONG_RESULT


def print_verification(console: Console, found: "Verification") -> None:
    """Print one line for each thing that was checked, then the verdict."""
    for one in found.findings:
        line = f"{'ok    ' if one.holds else 'WRONG '} {one.what}: {' '.join(one.detail.split())}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    for name in found.skipped:
        line = f"-      {name}: not recorded by this version of dpquant"
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    wrong = sum(not one.holds for one in found.findings)
    verdict = f"{found.run}: {len(found.findings)} checks, all hold." if found.holds else f"{found.run}: {wrong} WRONG."
    console.print(verdict, markup=False, highlight=False, soft_wrap=True)
