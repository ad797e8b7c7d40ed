# SPDX-License-Identifier: Apache-2.0
"""Reads the state of a run from its directory, again and again, while the run goes on or long after it.

Nothing is written and nothing is locked, so a run that is watched is not slowed down. A file is read again when it has
changed. A torn last line is not an error: the run is about to finish it, or a crash has cut it. This module loads no
torch.
"""

import dataclasses
import datetime
import itertools
import json
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dpquant.errors import DataError, DPQuantError, SettingError
from dpquant.privacy import accounting
from dpquant.privacy.entries import Contents
from dpquant.privacy.ledger import Ledger
from dpquant.runs.description import ModelDescription
from dpquant.runs.heartbeat import Beat
from dpquant.runs.names import CHOICES, CONFIG, DESCRIPTION, DIVERGED, LEDGER, METRICS, PROGRESS, RECORD
from dpquant.runs.provenance import PlanRecord
from dpquant.runs.record import EpochRecord, RunRecord
from dpquant.runs.settings import TrainSettings, from_toml, plan_of
from dpquant.runs.status import DEFAULT_EMA, Pace, Phase, RunStatus

if TYPE_CHECKING:
    from dpquant.privacy.plan import PrivacyPlan

_STEPS_OF_SILENCE = 10  # times the usual step, after which a run is silent
_PAUSES_OF_SILENCE = 3  # times the longest pause so far: tests and analyses lie between steps
_LEAST_SILENCE = 30.0  # seconds
_ENDED = 10  # times that silence, after which a run has stopped
_STARTING = 600.0  # seconds that a run may measure and check before its first step
_CURVE = 12  # points of the plan's curve, each of which takes the accountant a tenth of a second
_CHEAP, _REST = 0.05, 20  # seconds of a processor, and how many times as long a file that takes more is left alone
_GAINS = "('gains of layers'"  # how the key of that decision begins in choices.json


class _Known(NamedTuple):
    """What was read from a file: its mark then, its value, what could not be read, and when it may be read again."""

    mark: tuple[int, int, int]
    value: Any
    trouble: str
    again: float


class Following:
    """A run directory that is read again and again. The directory need not be there yet."""

    def __init__(self, run: Path, *, now: Callable[[], float] = time.time):
        """Follow the run in `run`; `now` returns the seconds since the epoch.

        Raises:
          SettingError: it is something else.
        """
        self._run, self._now = run, now
        self._known: dict[str, _Known] = {}
        self._is_there()

    def _is_there(self) -> bool:
        """Return whether the run has begun; raise SettingError if something else lies in its place."""
        run = self._run
        if (run / CONFIG).is_file() or (run / RECORD).is_file():
            return True
        if run.exists() and not (run.is_dir() and not any(run.iterdir())):
            found = f"which holds no {CONFIG}" if run.is_dir() else "which is a file"
            raise SettingError(
                f"Expected the directory of a run; got {run}, {found}. Name the directory that dpquant train makes, or "
                "will make."
            )
        return False

    def status(self) -> RunStatus:
        """Return the state of the run now.

        Raises:
          SettingError: it is no run.
        Privacy: post-processing, but for `pace`, which is the operator's.
        """
        name = self._run.absolute().name
        if not self._is_there():
            self._known.clear()
            return RunStatus(name=name, phase="waiting")
        settings, plan, curve = self._read(CONFIG, _settings_and_plan) or (None, None, ())
        description = self._read(DESCRIPTION, ModelDescription.read)
        classes = None if description is None else description.num_classes
        record = self._read(RECORD, RunRecord.read)
        if record is not None:
            ema = DEFAULT_EMA if settings is None else settings.ema
            ended = RunStatus.of(record, name=name, classes=classes, ema=ema)
            return dataclasses.replace(ended, curve=curve, trouble=self._troubles())
        status = RunStatus(
            name=name,
            phase="starting",
            plan=None if plan is None else PlanRecord.of(plan),
            curve=curve,
            classes=classes,
            **_of_settings(settings),
        )
        return self._going(status, plan)

    def _going(self, status: RunStatus, plan: "PrivacyPlan | None") -> RunStatus:
        """Return the state of a run without a record: how far it is by its metrics, its ledger and its heartbeat."""
        contents = self._read(LEDGER, Ledger.verify)
        epochs = self._read(METRICS, _epochs) or []
        beat = self._read(PROGRESS, Beat.read)
        gains = self._read(CHOICES, _gains) or {}
        diverged = self._read(DIVERGED, _text)
        charged = None if contents is None else contents.charged("train")
        phase = "diverged" if diverged else self._phase(beat, plan, bool(charged))
        step = max(0 if beat is None else beat.step, len(epochs) * (0 if plan is None else plan.epoch_steps))
        epsilon = (epochs[-1].epsilon or 0.0) if epochs else 0.0
        return dataclasses.replace(
            status,
            phase=phase,
            step=step,
            charged=charged,
            epsilon=_charged_epsilon(contents) if phase in ("stopped", "silent", "diverged") else epsilon,
            per_epoch=epochs,
            layers=_layers(epochs),
            gains=gains,
            classes=status.classes if all(map(_is_plain, epochs)) else None,
            trouble=diverged or self._troubles(),
            pace=None if phase == "diverged" else self._pace(beat, plan, step),
        )

    def _read(self, name: str, read: Callable[[Path], Any]) -> Any:
        """Return what a file says, read anew if it has changed; None if it is not there or cannot be read.

        A ledger of many lines takes a while to verify, so that a file which does is read again after a rest.
        """
        path = self._run / name
        try:
            found = path.stat()
        except OSError:
            self._known.pop(name, None)
            return None
        mark = (found.st_mtime_ns, found.st_size, found.st_ino)
        known, began = self._known.get(name), time.thread_time()
        if known is None or (known.mark != mark and time.monotonic() >= known.again):
            value, trouble = None, ""
            try:
                value = read(path)
            except (DPQuantError, OSError) as error:
                trouble = str(error)
            taken = time.thread_time() - began
            again = time.monotonic() + (_REST * taken if taken > _CHEAP else 0.0)
            self._known[name] = known = _Known(mark=mark, value=value, trouble=trouble, again=again)
        return known.value

    def _troubles(self) -> str:
        return " ".join(one.trouble for one in self._known.values() if one.trouble)

    def _phase(self, beat: Beat | None, plan: "PrivacyPlan | None", charged: bool) -> Phase:
        silent = self._silent(beat)
        if beat is None:
            return "stopped" if silent > _STARTING else "running" if charged else "starting"
        if not beat.running:
            return "stopped"
        if beat.preparing:
            return "stopped" if silent > _STARTING else "starting"
        step = self._seconds_a_step(beat, plan) or 0.0
        limit = max(_LEAST_SILENCE, _STEPS_OF_SILENCE * step, _PAUSES_OF_SILENCE * beat.longest_pause)
        if silent > limit:
            return "stopped" if silent > _ENDED * limit else "silent"
        return "running" if charged or beat.step else "starting"

    def _silent(self, beat: Beat | None) -> float:
        """Return the seconds since the last sign of life."""
        if beat is not None and (written := _seconds(beat.written)) is not None:
            return max(0.0, self._now() - written)
        marks = [self._known[name].mark[0] for name in (CONFIG, LEDGER, METRICS) if name in self._known]
        return max(0.0, self._now() - max(marks, default=0) / 1e9)

    def _pace(self, beat: Beat | None, plan: "PrivacyPlan | None", step: int) -> Pace:
        silent, a_step = self._silent(beat), self._seconds_a_step(beat, plan)
        if beat is None or plan is None or a_step is None:
            return Pace(silent=silent)
        return Pace(
            silent=silent,
            examples_per_second=beat.examples_per_second,
            seconds_a_step=a_step,
            seconds_left=max(0, plan.steps - step) * a_step if beat.running else None,
        )

    def _seconds_a_step(self, beat: Beat | None, plan: "PrivacyPlan | None") -> float | None:
        """Return the usual time of a step, analyses included; None where it is not known."""
        if beat is None or plan is None or not beat.examples_per_second:
            return None
        return plan.expected_batch_size / beat.examples_per_second


def _of_settings(settings: TrainSettings | None) -> dict[str, Any]:
    """Return what a state takes from the settings; nothing if they cannot be read."""
    if settings is None:
        return {}
    return {
        "model": settings.model,
        "dataset": settings.data,
        "policy": settings.policy,
        "format": settings.format,
        "ema": settings.ema,
        "records": settings.public_records,
        "unsafe_metrics": settings.unsafe_metrics,
    }


def _settings_and_plan(path: Path) -> tuple[TrainSettings, "PrivacyPlan | None", Sequence[float]]:
    """Return a run's settings, its plan, and the plan's curve; no plan if a file that it needs is not there."""
    settings = TrainSettings.chosen({}, from_toml(path))
    try:
        plan = plan_of(settings)
    except DPQuantError:
        return settings, None, ()
    parts = min(_CURVE, plan.epochs)
    due = plan.analysis_epochs()
    curve = [
        plan.epsilon_spent(
            steps=round(plan.steps * part / parts),
            analyses=sum(epoch < plan.epochs * part / parts for epoch in due),
        )
        for part in range(1, parts + 1)
    ]
    return settings, plan, curve


def _epochs(path: Path) -> list[EpochRecord]:
    """Return the epochs in a file of metrics; a torn last line is not there yet.

    Raises:
      DataError: another line cannot be read.
    """
    *lines, _torn = path.read_text(errors="replace", encoding="utf-8").split("\n")
    names = ("epsilon", "accuracy_test", "metrics_test", "layers_quantized", "nonprivate_accuracy_train", "scores")
    found = []
    for number, line in enumerate(lines, 1):
        try:
            fields = json.loads(line)
            found.append(EpochRecord(index=fields["epoch"], **{name: fields.get(name) for name in names}))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"Expected line {number} of {path} to be an epoch; got another. It was changed.") from error
    return found


def _gains(path: Path) -> dict[str, float]:
    """Return the gains of layers among a run's decisions; {} if they were not measured, or cannot be read."""
    try:
        made = json.loads(path.read_text(encoding="utf-8"))["choices"]
        return dict(next((answer for key, answer in made.items() if key.startswith(_GAINS)), {}))
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def _text(path: Path) -> str:
    return path.read_text(errors="replace", encoding="utf-8").strip()


def _layers(epochs: Sequence[EpochRecord]) -> list[str]:
    """Return the layers that epochs name: those with a score in forward order, then others as people count."""
    scored = next((list(one.scores) for one in epochs if one.scores), [])
    others = set(itertools.chain.from_iterable(one.layers_quantized or () for one in epochs)) - set(scored)
    return scored + sorted(others, key=_natural)


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """Return a key by which layer10 follows layer9."""
    return [(not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.findall(r"\d+|\D+", name)]


def _is_plain(epoch: EpochRecord) -> bool:
    """Return whether an epoch's accuracy can be compared with that of a guess."""
    return set(epoch.metrics_test or {}) <= {"accuracy", "balanced_accuracy"}


def _charged_epsilon(contents: Contents | None) -> float:
    """Return epsilon of everything that a ledger has charged, at the delta of its plan."""
    if contents is None or contents.budget is None:
        return 0.0
    return accounting.epsilon(contents.events, contents.budget.delta)


def _seconds(written: str) -> float | None:
    try:
        return datetime.datetime.fromisoformat(written).timestamp()
    except ValueError:
        return None
