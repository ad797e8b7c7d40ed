# SPDX-License-Identifier: Apache-2.0
"""The verb `dpquant export`. Loads no torch for a folder."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from dpquant.app.completion import run_directories
from dpquant.app.options import WRONG_RESULT, Json, refuse, written_path
from dpquant.app.output import results
from dpquant.errors import LedgerError, SettingError

if TYPE_CHECKING:
    from dpquant.app.export import Export


def export(
    run: Annotated[Path, typer.Argument(autocompletion=run_directories, help="directory of a run that has ended")],
    folder: Annotated[
        Path | None, typer.Argument(metavar="[DIR]", help="folder to make; it must be missing or empty")
    ] = None,
    to: Annotated[
        str | None, typer.Option(help="write the model alone, for other programs: safetensors, pt2 or onnx")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(parser=written_path, metavar="FILE", help="with --to: file to write")
    ] = None,
    as_json: Json = False,
) -> int:
    """Copy what a run releases into a folder of its own, or write its model as one file for other programs.

    A folder: the model, the record and the settings (without folders of this machine and without training accuracy),
    the privacy statement, what the ledger has charged with its head, and the report, if there is one. Left: what
    belongs to the operator, as times, checkpoints, and the fingerprint of the records. The ledger is verified first.
    SHA256SUMS lists the files: sha256sum -c SHA256SUMS.

    A file (--to and --out): the model with its privacy statement inside, and FILE.privacy.txt beside it. pt2 is torch's
    exported program; onnx needs pip install 'dpquant[onnx]'. The file is run on random inputs beside the model, and the
    largest difference is told. Batches of any size are accepted.

    Exit code 1: the ledger is not as it was written, or has charged more than the record says; a file computes
    something else than the model. 2: the run has not ended, or the folder or file cannot be made.

    With --json: of a folder: folder, epsilon, delta, head and statement; copied, a list of name, what, bytes and
    sha256; and left, an object of names and reasons. Of a file: path, bytes, sha256, difference and inputs.

    Example: dpquant export runs/fashion release/fashion
    Example: dpquant export runs/fashion --to onnx --out fashion.onnx
    """
    if (to is None) != (out is None) or (to is None) == (folder is None):
        raise SettingError(
            f"Expected a folder, or to and out; got folder={folder}, to={to} and out={out}. A folder gets all that is "
            "released, a file the model alone. Give DIR, or --to FORMAT --out FILE."
        )
    try:
        if folder is not None:
            return _export_folder(run, folder, as_json=as_json)
        assert to is not None and out is not None
        return _write_file(run, to, out, as_json=as_json)
    except LedgerError as error:
        return refuse(str(error), WRONG_RESULT)


def _export_folder(run: Path, folder: Path, *, as_json: bool) -> int:
    from dpquant.app.export import export as export_of

    done = export_of(run, folder)
    if as_json:
        print(done.to_json(), end="")
    else:
        print_export(results(), done)
    return 0


def _write_file(run: Path, to: str, out: Path, *, as_json: bool) -> int:
    from dpquant.app.model_file import DiffersError, write_model

    try:
        written = write_model(run, to, out)
    except DiffersError as error:
        return refuse(str(error), WRONG_RESULT)
    print(written.to_json() if as_json else f"{written.told}\n", end="")
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
