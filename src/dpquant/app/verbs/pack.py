# SPDX-License-Identifier: Apache-2.0
"""The verb `dpquant pack`. Loads no torch before it runs."""

import functools
from pathlib import Path
from typing import Annotated, Any

import typer

from dpquant.app.options import OF_SOURCES, with_settings, written_path
from dpquant.data.manifest import Manifest
from dpquant.errors import SettingError
from dpquant.runs.named import check_named
from dpquant.runs.settings import TrainSettings


@functools.partial(with_settings, names=OF_SOURCES)
def pack(
    source: Annotated[str | None, typer.Argument(help="data set, as for train --data", show_default=False)] = None,
    out: Annotated[
        Path | None, typer.Argument(parser=written_path, help="Folder to write, new.", metavar="[OUT]")
    ] = None,
    verify: Annotated[
        Path | None, typer.Option(parser=written_path, help="instead: check a packed folder", metavar="PATH")
    ] = None,
    *,
    given: dict[str, Any],
) -> None:
    """Write a data set as files of which a run reads what a microbatch needs, for data that do not fit into memory.

    The images of a folder are decoded file by file; tables and texts must fit into memory while they are packed. Record
    ids are rows of the files. Train on them by --data packed:OUT, without the options of their source. NOT PRIVATE: the
    folder holds the records.

    --verify reads a packed folder whole, and compares its files with the hashes in its manifest. Sizes are compared
    whenever a run starts.

    Example: dpquant pack image-folder:photos photos.packed --image-size 224
    """
    if verify is not None:
        if source is not None or given:
            raise SettingError("Expected verify alone; got it beside a source. It packs nothing. Give one of them.")
        Manifest.read(verify).check(verify, verify=True)
        print(f"{verify} is as it was packed.")
        return
    if source is None or out is None:
        raise SettingError("Expected a source and a folder to write; got fewer. Give dpquant pack SOURCE OUT.")
    settings = TrainSettings.chosen({"data": source, **given})
    check_named(settings)
    from dpquant.data.pack import pack as packed
    from dpquant.runs.sources import dataset_of

    packed(lambda store: dataset_of(settings, store), out)
    print(f"{out} is written. Train on it by: dpquant train --data packed:{out} --records N")
