# SPDX-License-Identifier: Apache-2.0
"""The verbs `dpquant train` and `dpquant resume`. Importing this file loads no torch."""

import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from dpquant.app.console import ProgressBar
from dpquant.app.options import Config, InterruptedRun, Json, NoReport, Out, command_line, settings_of, with_settings
from dpquant.errors import SettingError
from dpquant.runs.place import Place
from dpquant.runs.settings import TrainSettings, plan_of

if TYPE_CHECKING:
    from dpquant.runs.record import RunRecord


@with_settings
def train(
    given: dict[str, Any],
    config: Config = None,
    out: Out = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in OUT, if there is one.")] = False,
    no_report: NoReport = False,
    as_json: Json = False,
) -> None:
    """Train a model privately, layers rotating through low precision. Without options: handwritten digits, offline.

    SIGTERM and Ctrl-C end the run between two steps, with a checkpoint; exit code 143 or 130.

    Example: dpquant train --data fashion-mnist --epsilon 3 --policy dpquant --fraction 0.75 --out runs/fashion
    """
    settings = settings_of(given, config)
    if resume and out is None:
        raise SettingError("Expected out with resume; got none. It names the run. Give --out RUN.")
    name = settings.data.rsplit("/", 1)[-1].replace(":", "-")
    folder = out or Path("runs") / f"{datetime.datetime.now():%Y%m%d-%H%M%S}-{name}"
    _train(settings, folder, resume=resume, no_report=no_report, as_json=as_json)


def resume(
    run: Annotated[Path, typer.Argument(help="directory of the run")],
    no_report: NoReport = False,
    as_json: Json = False,
) -> None:
    """Continue a run that was stopped or killed, from its newest checkpoint, with the settings in its directory.

    What was charged stays charged: steps after the checkpoint are lost, and epsilon does not exceed the plan's.

    Example: dpquant resume runs/fashion
    """
    _train(Place(run).settings(), run, resume=True, no_report=no_report, as_json=as_json)


def _train(settings: TrainSettings, folder: Path, *, resume: bool, no_report: bool, as_json: bool) -> None:
    """Train into a run directory and print the result."""
    place = Place(folder)
    with place.taken(settings, resume=resume):  # before torch is imported: a run killed meanwhile can be continued
        from dpquant.runs.directory import charged
        from dpquant.runs.names import LEDGER
        from dpquant.runs.train import train as run_training

        console = Console(quiet=as_json)
        try:
            with ProgressBar(console) as bar:
                record = run_training(settings, place, command=command_line(), sinks=[bar])
        except KeyboardInterrupt as interrupt:
            budget = plan_of(settings)
            raise InterruptedRun(charged(folder / LEDGER, budget).told(budget)) from interrupt
    if not no_report:
        from dpquant.app.report import write_report

        write_report(folder)
    if as_json:
        print(record.to_json(), end="")
        return
    print_run(console, record, folder)


def print_run(console: Console, record: "RunRecord", folder: Path) -> None:
    """Print the results of a training run and its privacy statement."""
    from dpquant.privacy.plan import rounded_up

    result = Table(show_header=False, box=None)
    if record.accuracy_test is not None:
        result.add_row("test accuracy", f"{record.accuracy_test:.2%}")
    for name, value in (record.metrics_test or {}).items():
        if name != "accuracy":
            result.add_row(f"test {name.replace('_', ' ')}", f"{value:.4g}")
    result.add_row("epsilon spent", f"{rounded_up(record.epsilon)} (delta {record.delta:g})")
    result.add_row(
        "ran quantized",
        f"{record.quantized_fraction_layers:.0%} of layers, {record.quantized_fraction_macs:.0%} of MACs",
    )
    result.add_row("execution", record.execution)
    result.add_row("run directory", str(folder))
    console.print(result)
    console.print(f"\n{record.statement}", markup=False, highlight=False)
