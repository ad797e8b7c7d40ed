# SPDX-License-Identifier: Apache-2.0
"""The verb `dpquant verify`. Loads no torch."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from dpquant.app.console import print_verification
from dpquant.app.options import WRONG_RESULT, Json


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
