# SPDX-License-Identifier: Apache-2.0
"""The verb `dpquant init`. Loads no torch."""

from pathlib import Path
from typing import Annotated

import typer

from dpquant.errors import SettingError


def init(
    table: Annotated[Path, typer.Option(help="CSV or Parquet file")],
    label_column: Annotated[str, typer.Option(help="column of the label")],
    out: Annotated[Path | None, typer.Option(help="file to write, which must not exist [standard output]")] = None,
) -> None:
    """Draft the spec of a table: what its columns hold, for you to replace by what is publicly known.

    NOT PRIVATE: the draft names values of the records, marked with (read), and no run accepts it until you have deleted
    its line draft = true. Keep it to yourself until then.

    Example: dpquant init --table loans.csv --label-column defaulted --out spec.toml
    """
    from dpquant.data.draft import drafted

    if out is not None and (out.exists() or not out.absolute().parent.is_dir()):
        found = "which exists" if out.exists() else "in a folder that is not there"
        raise SettingError(
            f"Expected out to be a new file in a folder that exists; got out={out}, {found}. Nothing is overwritten. "
            "Name another one."
        )
    draft = drafted(table, label_column)
    if out is None:
        print(draft, end="")
    else:
        out.write_text(draft, encoding="utf-8")
