# SPDX-License-Identifier: Apache-2.0
"""The verb `dpquant compare`. Importing this file loads no torch."""

import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from dpquant.app.completion import policies as completed
from dpquant.app.options import Config, Json, Out, settings_of, with_settings
from dpquant.app.output import results, say
from dpquant.errors import SettingError
from dpquant.runs.named import check_named

if TYPE_CHECKING:
    from dpquant.app.compare import Comparison


@with_settings
def compare(
    given: dict[str, Any],
    policies: Annotated[
        str, typer.Option(help="with commas between them", autocompletion=completed)
    ] = "none,static,rotate,dpquant",
    seeds: Annotated[int, typer.Option(help="runs of each policy")] = 3,
    config: Config = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Train under several policies and print their accuracies with confidence intervals.

    Runs that are in the directory already are not repeated. One that was interrupted is moved aside and repeated; what
    it had charged counts. Progress goes to standard error.

    Example: dpquant compare --data fashion-mnist --epsilon 3 --fraction 0.5 --seeds 3 --out runs/compare
    """
    for name in ("policy", "seed"):
        if name in given:
            raise SettingError(
                f"Expected no {name} for compare; got {name}={given[name]}. Runs differ in it. Give --policies and "
                "--seeds."
            )
    settings = settings_of({"policy": "dpquant", **given}, config)
    folder = out or Path("runs") / f"{datetime.datetime.now():%Y%m%d-%H%M%S}-compare"
    names = [name.strip() for name in policies.split(",") if name.strip()]
    check_named(settings)
    from dpquant.app.compare import compare as comparison_of

    comparison = comparison_of(settings, names, seeds, folder, watch=say)
    if as_json:
        print(comparison.to_json(), end="")
    else:
        print_comparison(results(), comparison, folder)


def print_comparison(console: Console, comparison: "Comparison", folder: Path) -> None:
    """Print one row per policy, and the epsilon of all runs together."""
    from dpquant.privacy.plan import rounded_up

    table = Table(box=None, pad_edge=False)
    for number, title in enumerate(("policy", "test accuracy, %", "MACs quantized", "in 4 bits", "epsilon", "seconds")):
        table.add_column(title, justify="right" if number else "left")
    for policy, row in comparison.rows.items():
        interval = "" if row.half_width is None else f" +- {100 * row.half_width:.2f}"
        table.add_row(
            policy,
            f"{100 * row.mean:.2f}{interval}",
            f"{row.quantized_fraction_macs:.0%}",
            f"{row.four_bit_fraction_macs:.0%}",
            rounded_up(row.epsilon),
            "-" if row.seconds is None else f"{row.seconds:,.0f}",
        )
    console.print(table)
    together = rounded_up(comparison.epsilon_together)
    console.print(
        f"\nMeans over seeds, with 95 % confidence intervals. Epsilon is one run's, at delta = {comparison.delta:g}; "
        f"whoever sees all runs has epsilon = {together} for them together, interrupted ones included. Seconds are the "
        f"operator's, not for release.\nPicture and record: {folder}",
        markup=False,
        highlight=False,
    )
