# SPDX-License-Identifier: Apache-2.0
"""`progress.json`: that a run is alive and how far it is, for `dpquant watch`. The operator's file.

Between two epochs a run writes nothing else. The number of steps and the epoch are public. The times are not: a step
takes longer the more records it draws. So the whole file is its operator's, as `timings.json`, and in no export.

The file is replaced at most once a second, without being flushed to disk: after a crash of the machine nobody asks for
it. A write that fails is skipped, because a run that has spent budget must not end for want of a heartbeat.
"""

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from dpquant.runs.provenance import utc_now
from dpquant.runs.record import write_whole
from dpquant.runs.timings import NOT_FOR_RELEASE

if TYPE_CHECKING:
    from dpquant.privacy.plan import PrivacyPlan
    from dpquant.runs.settings import TrainSettings
    from dpquant.runs.sinks import Progress

_INTERVAL = 1.0  # seconds from one write to the next, at least


@dataclasses.dataclass(frozen=True, kw_only=True)
class Beat:
    """What the file holds.

    Attributes:
      note: NOT_FOR_RELEASE, the first field in the file.
      written: UTC.
      running: whether the process that wrote it goes on. False after an orderly end; a killed process leaves True.
      step, steps: taken, and planned.
      epoch, epochs: index of the present epoch, from 0, and planned.
      examples_per_second: for the operator, as in `Progress`; None before the first step.
      longest_pause: seconds between two steps, at most: tests and analyses lie between them.
      preparing: whether a run that continues measures and checks, before its next step.
    """

    note: str = NOT_FOR_RELEASE
    written: str
    running: bool
    step: int
    steps: int
    epoch: int
    epochs: int
    examples_per_second: float | None
    longest_pause: float
    preparing: bool = False

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """Return the beat in a file; None if there is no file, or it cannot be read: a crash may have torn it."""
        try:
            beat = cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None
        return beat if _is_sound(beat) else None


class Heartbeat:
    """Sink that keeps `progress.json` up to date.

    `close` says in the file that the process has come to an end, whichever it is.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.monotonic):
        """Write to `path`; `clock` returns seconds."""
        self._path, self._clock = path, clock
        self._beat: Beat | None = None
        self._written = self._stepped = clock()

    def preparing(self, what: str) -> None:
        """Say that a run which continues is alive. A new one has no file yet, and has taken no step."""
        before = self._beat or Beat.read(self._path)
        if before is not None:
            self._write(dataclasses.replace(before, running=True, preparing=True))

    def started(self, plan: "PrivacyPlan", settings: "TrainSettings") -> None:
        """Write the first beat, before anything is charged."""
        self._stepped = self._clock()
        self._write(
            Beat(
                written="",
                running=True,
                step=0,
                steps=plan.steps,
                epoch=0,
                epochs=plan.epochs,
                examples_per_second=None,
                longest_pause=0.0,
            )
        )

    def stepped(self, progress: "Progress") -> None:
        """Note the step, and write it if a second has passed."""
        now, before = self._clock(), self._beat
        pause = now - self._stepped
        self._stepped = now
        self._beat = Beat(
            written="",
            running=True,
            step=progress.step,
            steps=progress.steps,
            epoch=progress.epoch,
            epochs=progress.epochs,
            examples_per_second=progress.examples_per_second,
            longest_pause=pause if before is None else max(before.longest_pause, pause),
        )
        if now >= self._written + _INTERVAL:
            self._write(self._beat)

    def epoch_ended(self, epoch: Any) -> None:
        """Do nothing: the metrics have the epoch."""

    def finished(self, record: Any) -> None:
        """Do nothing: `close` follows."""

    def close(self) -> None:
        """Write the last beat, if there was one: the process ends."""
        if self._beat is not None:
            self._write(dataclasses.replace(self._beat, running=False))
            self._beat = None

    def _write(self, beat: Beat) -> None:
        self._beat, self._written = beat, self._clock()
        text = json.dumps(dataclasses.asdict(dataclasses.replace(beat, written=utc_now())), indent=2) + "\n"
        with contextlib.suppress(OSError):
            write_whole(self._path, text, flush=False)


def _is_sound(beat: Beat) -> bool:
    """Return whether the values have the types that readers rely on."""
    numbers = (beat.step, beat.steps, beat.epoch, beat.epochs)
    return (
        isinstance(beat.written, str)
        and isinstance(beat.running, bool)
        and isinstance(beat.preparing, bool)
        and all(isinstance(one, int) for one in numbers)
        and isinstance(beat.longest_pause, int | float)
        and isinstance(beat.examples_per_second, int | float | None)
    )
