# SPDX-License-Identifier: Apache-2.0
"""The verbs `dpquant train` and `dpquant resume`. Importing this file loads no torch."""

import datetime
import shlex
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from dpquant.app.completion import run_directories
from dpquant.app.options import (
    Config,
    InterruptedRun,
    Json,
    NoReport,
    Out,
    command_line,
    defaults_of,
    settings_of,
    with_settings,
)
from dpquant.app.output import current, results, say, tell_native
from dpquant.app.progress import RunProgress, tell_budget, tell_processes, tell_settings
from dpquant.errors import SettingError
from dpquant.runs.defaults import Default
from dpquant.runs.launched import Launch
from dpquant.runs.named import check_named
from dpquant.runs.names import LEDGER, RECORD, REPORT
from dpquant.runs.place import Place
from dpquant.runs.record import RunRecord
from dpquant.runs.settings import TrainSettings, plan_of
from dpquant.runs.trackers.registry import check_trackers


@with_settings
def train(
    given: dict[str, Any],
    config: Config = None,
    out: Out = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in OUT, if there is one.")] = False,
    no_report: NoReport = False,
    as_json: Json = False,
) -> None:
    """Train a model privately, in low precision where it pays. Without options: handwritten digits, offline.

    Layers that get faster in int8 on this machine run in it (--format auto). --format luq-fp4 is the method of the
    paper: four bits, in layers that are chosen again for each epoch.

    SIGTERM and Ctrl-C end the run between two steps, with a checkpoint; exit code 143 or 130.

    Under torchrun all processes train one model, and those that it starts again continue the run: torchrun
    --standalone --nproc-per-node 2 --max-restarts 3 -m dpquant train --out RUN

    Example: dpquant train --data fashion-mnist --epsilon 3 --policy dpquant --fraction 0.75 --out runs/fashion
    """
    settings = settings_of(given, config)
    if resume and out is None:
        raise SettingError("Expected out with resume; got none. It names the run. Give --out RUN.")
    launch, name = Launch.here(), settings.data.rsplit("/", 1)[-1].replace(":", "-")
    folder = out or Path("runs") / f"{datetime.datetime.now():%Y%m%d-%H%M%S}-{name}"
    if launch.size > 1:
        folder, resume = out or launch.folder(name), resume or launch.attempt > 0
    usual = defaults_of(given, config)
    _train(settings, _place(folder), resume=resume, no_report=no_report, as_json=as_json, usual=usual)


def resume(
    run: Annotated[Path, typer.Argument(autocompletion=run_directories, help="directory of the run")],
    no_report: NoReport = False,
    as_json: Json = False,
) -> None:
    """Continue a run that was stopped or killed, from its newest checkpoint, with the settings in its directory.

    What was charged stays charged: steps after the checkpoint are lost, and epsilon does not exceed the plan's.

    Of a run that has ended the result is printed again, with exit code 0: a job may be started until it succeeds.

    Example: dpquant resume runs/fashion
    """
    place = _place(run)
    _train(place.settings(), place, resume=True, no_report=no_report, as_json=as_json)


def _place(folder: Path) -> Place:
    """Return the place of a run's files; under torchrun that of all processes, which meet here."""
    launch = Launch.here()
    if launch.size == 1:
        return Place(folder)
    from dpquant.runs.shared import SharedPlace
    from dpquant.training.distributed import group_here

    return SharedPlace(folder, group_here())


def _train(
    settings: TrainSettings,
    place: Place,
    *,
    resume: bool,
    no_report: bool,
    as_json: bool,
    usual: Mapping[str, Default] = MappingProxyType({}),
) -> None:
    """Train into a run directory and print the result; `usual` are defaults, whose origin is told."""
    check_trackers(settings.track)
    folder, console = place.path, current().console(results=False, quiet=as_json)
    if resume and place.has_ended(settings):  # whatever starts a job again until it succeeds has to see that it has
        record = RunRecord.read(folder / RECORD)
        say(f"{folder} has ended already; nothing is trained or charged.")
        if Launch.here().rank == 0:
            _print(record, folder, reported=(folder / REPORT).exists(), as_json=as_json)
        return
    check_named(settings)
    with place.taken(settings, resume=resume):  # before torch is imported: a run killed meanwhile can be continued
        if not as_json:
            tell_processes(Launch.here(), settings.threads)
            tell_settings(settings, usual)
            tell_native()
        plan = plan_of(settings)
        if not as_json:
            tell_budget(plan)
        try:
            with RunProgress(console, quiet=as_json) as progress:
                progress.preparing("loading torch")
                from dpquant.app.reporting import ReportAtEnd
                from dpquant.runs.directory import charged
                from dpquant.runs.train import train as run_training

                reports = [] if no_report else [ReportAtEnd(folder)]
                record = run_training(settings, place, plan=plan, command=command_line(), sinks=[progress, *reports])
        except KeyboardInterrupt as interrupt:
            from dpquant.runs.directory import charged

            raise InterruptedRun(charged(folder / LEDGER, plan).told(plan)) from interrupt
    if Launch.here().rank > 0:
        return
    for report in reports:
        if report.refused is not None:
            raise report.refused
    _print(record, folder, reported=not no_report, as_json=as_json)


def _print(record: RunRecord, folder: Path, *, reported: bool, as_json: bool) -> None:
    """Print the result of a run, and what can be done with it."""
    if as_json:
        print(record.to_json(), end="")
        return
    print_run(results(), record, folder)
    if current().verbose:
        _tell_times(folder)
    tell_next(folder, reported=reported)


def tell_next(folder: Path, *, reported: bool) -> None:
    """Print what can be done with a run that has ended."""
    quoted = shlex.quote(str(folder))
    say(f"\nThe report: {folder / 'report.html'}" if reported else f"\nA report: dpquant report {quoted}")
    say(f"Accuracy by class: dpquant evaluate {quoted}")
    say(f"What it says of new files: dpquant predict {quoted} FILE")
    say(f"What may be released, in a folder: dpquant export {quoted} release")


def _tell_times(folder: Path) -> None:
    """Print the times of a run, which are the operator's own."""
    from dpquant.runs.names import TIMINGS
    from dpquant.runs.timings import Timings

    found = Timings.read(folder / TIMINGS)
    if found is None:
        return
    others = found.seconds_total - found.seconds_train - found.seconds_analysis
    say(
        f"\nSeconds, not for release: {found.seconds_total:.1f}, of them {found.seconds_train:.1f} steps, "
        f"{found.seconds_analysis:.1f} analyses and {others:.1f} start, tests and files"
    )


def print_run(console: Console, record: RunRecord, folder: Path) -> None:
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
    for number, fact in enumerate(record.execution.split("; ")):
        result.add_row("" if number else "how it ran", fact)
    result.add_row("run directory", str(folder))
    console.print(result)
    if not current().quiet:
        console.print(f"\n{record.statement}", markup=False, highlight=False)
