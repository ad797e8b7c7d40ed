# SPDX-License-Identifier: Apache-2.0
"""What several verbs print: the privacy budget, and the progress of a run.

Importing this file loads neither torch nor the accountant, so that `dpquant --help` answers at once.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from dpquant.privacy.plan import PrivacyPlan
    from dpquant.runs.record import EpochRecord, RunRecord
    from dpquant.runs.settings import TrainSettings
    from dpquant.runs.sinks import Progress as TrainProgress


def print_budget(console: Console, budget: "PrivacyPlan") -> None:
    """Print the table of a privacy plan."""
    _print_rows(console, "privacy budget", budget.table())


def print_meaning(console: Console, budget: "PrivacyPlan", records: int | None) -> None:
    """Print what the budget means in risk, and a warning if delta is too large for a public number of records."""
    from dpquant.privacy.meaning import too_large

    if rows := budget.meaning_table():
        _print_rows(console, "what it means", rows)
    if warning := too_large(budget.delta, records):
        console.print(f"Warning: {warning}", markup=False, highlight=False)


def _print_rows(console: Console, title: str, rows: Iterable[tuple[str, str]]) -> None:
    table = Table(title=title, show_header=False)
    for what, how_much in rows:
        table.add_row(what, how_much)
    console.print(table)


class ProgressBar:
    """Sink that prints the budget when the run starts, then shows a progress bar.

    The budget is not printed earlier, so that a refused run prints nothing but its error.
    """

    def __init__(self, console: Console):
        self._console = console
        self._budget: PrivacyPlan
        self._bar = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            TextColumn("epsilon {task.fields[epsilon]}"),
            TextColumn("{task.fields[speed]} examples/s"),
            TextColumn("{task.fields[layers]} layers quantized"),
            TextColumn("test {task.fields[accuracy]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self._task: Any = None

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._task is not None:
            self._bar.stop()

    def started(self, plan: "PrivacyPlan", settings: "TrainSettings") -> None:
        self._budget = plan
        print_budget(self._console, plan)

    def stepped(self, progress: "TrainProgress") -> None:
        from dpquant.privacy.plan import rounded_up

        shown: dict[str, Any] = {
            "epoch": f"{progress.epoch + 1}/{progress.epochs}",
            "epsilon": f"{rounded_up(progress.epsilon, 2)}/{rounded_up(self._budget.epsilon, 2)}",
            "speed": f"{progress.examples_per_second:,.0f}",
            "layers": f"{progress.layers_quantized}/{progress.num_layers}",
            "accuracy": "-" if progress.accuracy_test is None else f"{progress.accuracy_test:.1%}",
        }
        if self._task is None:
            self._task = self._bar.add_task("", total=progress.steps, **shown)
            self._bar.start()
        self._bar.update(self._task, completed=progress.step)
        self._bar.tasks[self._task].fields.update(shown)

    def epoch_ended(self, epoch: "EpochRecord") -> None:
        """Do nothing: the next step shows the epoch's accuracy."""

    def finished(self, record: "RunRecord") -> None:
        """Do nothing: the verb prints the record."""
