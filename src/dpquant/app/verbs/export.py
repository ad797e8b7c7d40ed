# SPDX-License-Identifier: Apache-2.0
"""The verb `dpquant export`. Loads no torch."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from dpquant.app.options import WRONG_RESULT, Json, refuse
from dpquant.errors import LedgerError

if TYPE_CHECKING:
    from dpquant.app.export import Export


def export(
    run: Annotated[Path, typer.Argument(help="directory of a run that has ended")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="folder to make; it must be missing or empty")],
    as_json: Json = False,
) -> int:
    """Copy what a run releases into a folder of its own, and say what was copied and what was left.

    Copied: the model, the record and the settings (without folders of this machine and without training accuracy), the
    privacy statement, what the ledger has charged with its head, and the report, if there is one. Left: what belongs to
    the operator, as times, checkpoints, and the fingerprint of the records. The ledger is verified first. SHA256SUMS
    lists the files: sha256sum -c SHA256SUMS.

    Exit code 1: the ledger is not as it was written, or has charged more than the record says. 2: the run has not
    ended, or the folder cannot be made.

    With --json: folder, epsilon, delta, head and statement; copied, a list of name, what, bytes and sha256; and left,
    an object of names and reasons.

    Example: dpquant export runs/fashion release/fashion
    """
    from dpquant.app.export import export as export_of

    try:
        done = export_of(run, folder)
    except LedgerError as error:
        return refuse(str(error), WRONG_RESULT)
    if as_json:
        print(done.to_json(), end="")
    else:
        print_export(Console(), done)
    return 0


def print_export(console: Console, done: "Export") -> None:
    """Print what was copied and what was left, with reasons."""
    table = Table(box=None, pad_edge=False)
    for title in ("file", "", "what it is, or why it was left"):
        table.add_column(title)
    for one in done.copied:
        table.add_row(one.name, "copied", one.what)
    for name, why in done.left.items():
        table.add_row(name, "left", why)
    console.print(table, highlight=False)
    console.print(f"\n{done.told}\n\n{done.statement}", markup=False, highlight=False)
