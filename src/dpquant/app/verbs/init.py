# SPDX-License-Identifier: Apache-2.0
"""The verb `dpquant init`. Loads no torch."""

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from dpquant.app.options import with_settings
from dpquant.app.output import say
from dpquant.errors import SettingError

CONFIG = Path("config.toml")


@with_settings
def init(
    given: dict[str, Any],
    table: Annotated[Path | None, typer.Option(help="CSV or Parquet file, of which a spec is drafted instead")] = None,
    out: Annotated[
        Path | None, typer.Option(help="file to write, which must not exist [config.toml; of a table standard output]")
    ] = None,
) -> None:
    """Draft a file of settings: every setting with its default, where that comes from, and what it means.

    The settings that you give are set, and all others are comments. dpquant train --config config.toml runs it.

    With --table, draft the spec of a table instead: what its columns hold, for you to replace by what is publicly
    known. NOT PRIVATE: the draft names values of the records, marked with (read), and no run accepts it until you have
    deleted its line draft = true. Keep it to yourself until then.

    Example: dpquant init --data image-folder:photos --records 40000 --epsilon 8

    Example: dpquant init --table loans.csv --label-column defaulted --out spec.toml
    """
    if table is not None:
        _draft(_spec(table, given), out)
        if out is not None:
            command = ["--data", f"table:{table}", "--label-column", given["label_column"], "--spec", str(out)]
            say(
                f"{out} names values of the records. Replace what is marked (read) by what is publicly known, and "
                f"delete the line draft = true. Next: dpquant plan {shlex.join(command)} --test FILE --records N"
            )
        return
    from dpquant.runs.draft import drafted

    path = out or CONFIG
    _check_new(path)
    _draft(drafted(given), path)
    say(f"{path} has all settings. Next: dpquant plan --config {path}, then dpquant train --config {path}")


def _spec(table: Path, given: dict[str, Any]) -> str:
    """Return the draft of a table's spec."""
    from dpquant.data.draft import drafted

    others = sorted(given.keys() - {"label_column"})
    if others or "label_column" not in given:
        found = f"{others[0]}={given[others[0]]}" if others else "no label_column"
        raise SettingError(
            f"Expected label_column, and no other setting, with table; got {found}. A spec says what the columns of a "
            "table hold. Give --label-column NAME alone."
        )
    return drafted(table, given["label_column"])


def _check_new(path: Path) -> None:
    if path.exists() or not path.absolute().parent.is_dir():
        found = "which exists" if path.exists() else "in a folder that is not there"
        raise SettingError(
            f"Expected out to be a new file in a folder that exists; got out={path}, {found}. Nothing is overwritten. "
            "Name another one."
        )


def _draft(text: str, out: Path | None) -> None:
    """Write a draft to a new file, or print it."""
    if out is None:
        print(text, end="")
        return
    _check_new(out)
    out.write_text(text, encoding="utf-8")
