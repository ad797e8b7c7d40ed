# SPDX-License-Identifier: Apache-2.0
"""The verb `dpquant bench`. Importing this file loads no torch."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from dpquant.app.options import WRONG_RESULT, Json, written_path
from dpquant.app.output import results, say
from dpquant.errors import SettingError

if TYPE_CHECKING:
    from dpquant.app.bench import BenchRecord


def bench(
    model: Annotated[
        str,
        typer.Option(
            help="resnet18-cifar, resnet18, resnet50, densenet121, mobilenet-v2, cnn, transformer, mlp, bert-base"
        ),
    ] = "resnet18-cifar",
    batch_size: Annotated[int | None, typer.Option(help="examples a step [32; mlp 4096]")] = None,
    image_size: Annotated[int | None, typer.Option(help="side of the images [the network's own]")] = None,
    format: Annotated[str, typer.Option(help="recipe of the quantized contenders")] = "luq-fp4",
    threads: Annotated[int | None, typer.Option(help="threads to compute with [all cores]")] = None,
    rounds: Annotated[int, typer.Option(help="timed steps of every contender")] = 3,
    physical_batch_size: Annotated[
        int | None, typer.Option(help="physical batch size of Opacus [32; mlp 4096]")
    ] = None,
    memory: Annotated[
        bool, typer.Option("--memory", help="Measure peak memory too, each contender in a process of its own.")
    ] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N")] = "cpu",
    as_json: Json = False,
    out: Annotated[
        Path | None, typer.Option(parser=written_path, help="Write the record here, as JSON.", metavar="PATH")
    ] = None,
) -> int:
    """Time a private step on this machine against PyTorch and Opacus; results are checked first. About a minute.

    Exit code 1: a contender computes wrong gradients. Progress goes to standard error.

    Example: dpquant bench --model cnn --batch-size 256 --memory
    """
    from dpquant.app.bench import BenchSettings, measure
    from dpquant.runs.devices import device_of

    settings = BenchSettings(
        model=model,
        batch_size=batch_size,
        image_size=image_size,
        format=format,
        threads=threads,
        rounds=rounds,
        physical_batch_size=physical_batch_size,
        memory=memory,
        device=str(device_of(device)),
    )
    if out is not None and (out.is_dir() or not out.parent.is_dir() or not os.access(out.parent, os.W_OK)):
        raise SettingError(
            f"Expected out to be a file in a folder that exists and can be written to; got out={out}. The record is "
            "written there after the measurement. Make the folder first."
        )
    record = measure(settings, watch=say)
    return report_bench(record, out, as_json=as_json)


def report_bench(record: "BenchRecord", out: Path | None, *, as_json: bool) -> int:
    """Write a benchmark's record to `out` if it is given, print it, and return the exit code of `dpquant bench`."""
    if out is not None:
        out.write_text(record.to_json(), encoding="utf-8")
    if as_json:
        print(record.to_json(), end="")
    else:
        print_bench(results(), record)
    return WRONG_RESULT if record.wrong else 0


def print_bench(console: Console, record: "BenchRecord") -> None:
    """Print the table of a benchmark, an explanation of its columns, and the machine."""
    settings, side = record.settings, record.settings.image_size
    inputs = "" if side is None else f"{side}x{side}, "
    console.print(f"{settings.model}, {inputs}batch {settings.batch_size}, {settings.format}\n", highlight=False)
    table = Table(box=None, pad_edge=False)
    header, *rows = record.table()
    for number, title in enumerate(header):
        table.add_column(title, justify="left" if number in (0, len(header) - 1) else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    lines = [
        "\nMedian of the rounds, and quartiles. 'plain / this' is plain PyTorch's time over this side's: above 1, this "
        "side is faster. Opacus is its hooks; ours are dpquant in full precision, with 90 % of the multiplications "
        "quantized, and with all.",
        f"\n{record.hardware}; opacus {record.opacus or 'none'}, {record.threads} threads",
    ]
    if record.busy:
        lines.append(
            f"Warning: other work kept {record.hardware.load} processors busy when the measurement began. These "
            "timings are not to be trusted. Run it again on an idle machine."
        )
    console.print("\n".join(lines), markup=False, highlight=False)
