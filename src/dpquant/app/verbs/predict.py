# SPDX-License-Identifier: Apache-2.0
"""The verb `dpquant predict`."""

import contextlib
import io
import sys
from pathlib import Path
from typing import Annotated

import typer

from dpquant.app.completion import run_directories
from dpquant.app.options import BAD_INPUT, refuse


def predict(
    run: Annotated[Path, typer.Argument(autocompletion=run_directories, help="directory of a run that has ended")],
    files: Annotated[
        list[str],
        typer.Argument(metavar="FILE...", help="images; tables of rows; files of one text a line, or - for such lines"),
    ],
    top: Annotated[int | None, typer.Option(help="also name so many classes, the likeliest first")] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV with a header, and not JSON lines.")] = False,
) -> int:
    """Print what a run's model says of files, one JSON object a line.

    Needs the run's directory alone: how an image, a row or a text becomes an input is in its model.json. A row needs no
    label, and columns that the spec does not name are left aside. Texts of a pair have a tab between them.

    Each line has file and, of tables and texts, row or line, from 1; then label and probability, or value. Where
    positives are rare also positive, the rare class's probability, by which to rank. With --top also top, a list of
    label and probability.

    Exit code 2: something could not be read, each told in one line on standard error; all others are predicted.

    Example: dpquant predict runs/fashion photos/*.png --top 3
    """
    from dpquant.app.predict import predict as predicted

    standard_input = (
        io.TextIOWrapper(sys.stdin.buffer, encoding="utf-8", errors="replace") if "-" in files else sys.stdin
    )
    code = 0
    with contextlib.suppress(BrokenPipeError):  # whoever reads the lines has read enough
        for line, is_result in predicted(run, files, top=top, as_csv=as_csv, standard_input=standard_input):
            if is_result:
                print(line)
            else:
                code = refuse(line, BAD_INPUT)
    return code
