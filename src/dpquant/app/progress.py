# SPDX-License-Identifier: Apache-2.0
"""The progress of a run on standard error: its plan, the phases before it, and a bar or a line for each epoch.

Importing this file loads neither torch nor the accountant, so that the plan is there at once.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

from dpquant.app.output import Phases, say
from dpquant.machine import processor
from dpquant.runs.defaults import Default
from dpquant.runs.launched import Launch

if TYPE_CHECKING:
    from dpquant.privacy.plan import PrivacyPlan
    from dpquant.runs.record import EpochRecord, RunRecord
    from dpquant.runs.settings import TrainSettings
    from dpquant.runs.sinks import Progress as TrainProgress

_WIDE = 100  # columns from which there is room for a bar


def tell_processes(launch: Launch, threads: int | None) -> None:
    """Print how many processes train, if there are several; `threads` is the setting."""
    if launch.size > 1:
        own = launch.threads(processor()[2]) if threads is None else None
        undone = "" if own is None else f"; {own} threads each, not OMP_NUM_THREADS=1, which torchrun sets"
        say(f"processes {launch.size}, {launch.local_size} of them on this machine{undone}")


def tell_settings(settings: "TrainSettings", usual: Mapping[str, Default]) -> None:
    """Print what a run will do, as far as that is known without the accountant, and where defaults come from."""

    def told(name: str, words: str) -> str:
        default, value = usual.get(name), getattr(settings, name)
        origin = f" ({default.origin})" if default is not None and default.value == value else ""
        return f"{words} {value:,g}{origin}" if isinstance(value, float | int) else f"{words}{value}{origin}"

    side = "" if settings.image_size is None else f", images {told('image_size', 'of side')}"
    records = settings.public_records
    public = "" if records is None else f", {records:,} records"
    parts = "" if settings.train_only is None else f", of which {settings.train_only} is trained"
    parts = f", by adapters of rank {settings.lora}" if settings.lora is not None else parts
    model = f"model {settings.model}{parts}"
    say(f"data      {settings.data}{side}{public}; {model}; {settings.optimizer}, {told('lr', 'lr')}")
    say(
        f"training  {told('epochs', 'epochs')}, {told('batch_size', 'batch size')}; "
        f"{told('policy', 'policy ')}, {told('format', 'format ')}"
    )


def tell_budget(plan: "PrivacyPlan") -> None:
    """Print the budget of a run in one line."""
    from dpquant.privacy.plan import rounded_up

    analyses = f", {plan.analysis.count} analyses" if plan.analysis is not None else ""
    say(
        f"privacy   epsilon {rounded_up(plan.epsilon)} at delta {plan.delta:g}: noise multiplier "
        f"{plan.noise_multiplier:.4f}, {plan.steps:,} steps{analyses}"
    )


class RunProgress:
    """Sink that announces phases, then shows a bar on a terminal, and one plain line an epoch elsewhere."""

    def __init__(self, console: Console, *, quiet: bool = False):
        """Show progress on a console of standard error; with `quiet`, show none."""
        self._console, self._phases = console, Phases(quiet=quiet or console.quiet)
        self._plan: PrivacyPlan
        self._layers = ""
        self._speed = 0.0
        self._task: Any = None
        wide: list[ProgressColumn] = []
        if console.width >= _WIDE:
            wide = [BarColumn(bar_width=20), TextColumn("{task.fields[layers]} layers quantized")]
        self._bar = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            *wide,
            TextColumn("epsilon {task.fields[epsilon]}"),
            TextColumn("test {task.fields[score]}"),
            TextColumn("{task.fields[speed]} examples/s"),
            TimeRemainingColumn(),
            console=console,
        )

    def __enter__(self) -> "RunProgress":
        return self

    def __exit__(self, *exception: object) -> None:
        self._phases.over()
        if self._task is not None:
            self._bar.stop()

    def preparing(self, what: str) -> None:
        self._phases.begin(what)

    def started(self, plan: "PrivacyPlan", settings: "TrainSettings") -> None:
        self._phases.over()
        self._plan = plan

    def stepped(self, progress: "TrainProgress") -> None:
        self._layers = f"{progress.layers_quantized}/{progress.num_layers}"
        self._speed = progress.examples_per_second
        if not self._console.is_terminal:
            return
        shown: dict[str, Any] = {
            "epoch": f"{progress.epoch + 1}/{progress.epochs}",
            "speed": f"{progress.examples_per_second:,.0f}",
            "layers": self._layers,
        }
        if self._task is None:
            epsilon, score = self._of(progress.epsilon), _percent(progress.accuracy_test)
            self._task = self._bar.add_task("", total=progress.steps, epsilon=epsilon, score=score, **shown)
            self._bar.start()
        self._bar.update(self._task, completed=progress.step, **shown)

    def epoch_ended(self, epoch: "EpochRecord") -> None:
        """Show epsilon and score as they are after the epoch."""
        if self._task is not None:
            self._bar.update(self._task, epsilon=self._of(epoch.epsilon or 0.0), score=_told(epoch, short=True))
            self._bar.refresh()
            return
        words = [
            f"epoch {epoch.index + 1}/{self._plan.epochs}: epsilon {self._of(epoch.epsilon or 0.0)}",
            f"test {_told(epoch)}",
            f"{self._layers} layers quantized",
            f"{self._speed:,.0f} examples/s",
        ]
        self._console.print(", ".join(words), markup=False, highlight=False, soft_wrap=True)

    def finished(self, record: "RunRecord") -> None:
        """Do nothing: the verb prints the record."""

    def _of(self, epsilon: float) -> str:
        from dpquant.privacy.plan import rounded_up

        return f"{rounded_up(epsilon, 2)}/{rounded_up(self._plan.epsilon, 2)}"


def _told(epoch: "EpochRecord", *, short: bool = False) -> str:
    """Return how good the model is: its accuracy, or the metric that tells more, by name or by its initials."""
    from dpquant.runs.score import score_so_far

    score = score_so_far([epoch])
    if score is None:
        return "-"
    words = [] if score.is_share else score.metric.split("_")
    name = ["".join(word[0] for word in words).upper()] if short and words else words
    return " ".join([*name, score.line(score.last)])


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"
