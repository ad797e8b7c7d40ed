# SPDX-License-Identifier: Apache-2.0
"""Decisions that are measured on this machine, kept so that a run can be repeated and the next one begins sooner.

A decision answers a question: which of several ways to one sum is the fastest for some shapes, how many examples a
backward pass takes, which layers gain from being quantized. It is made once and then kept, so that a run computes the
same sums at every step. All of it is measured on synthetic operands: nothing here sees data.

`Choices` are the decisions of a run. They are saved with it, and another run that is given them decides alike: with the
same settings and the same mechanism_seed it computes the same bits. Decisions are also kept for this machine, in memory
and in the user's cache directory, from where later runs take them. That file can be deleted at any time.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import platformdirs

from dpquant.errors import DataError
from dpquant.machine import processor

CACHE = "DPQUANT_CACHE"
"""Environment variable: the directory of the machine's file, or `off`."""

_FORMAT = 1  # of both files; one of another format is not read
_ROUNDS = 3
_HOPELESS = 3  # times slower than the best in two rounds: not run again
_HOPELESS_AT_ONCE = 30  # in the first: by less, a time slice that another process took could decide

Ways = Mapping[str, Callable[[], object]]
"""{name: does the work once}."""


class Choices:
    """The decisions of one run.

    Attributes:
      made: {key: answer} of everything that was decided so far, as JSON has it.
    """

    def __init__(
        self,
        given: Mapping[str, Any] | None = None,
        *,
        machine: "Machine | None" = None,
        timed: Callable[[Ways], Mapping[str, float]] | None = None,
    ):
        """Begin with nothing decided.

        Args:
          given: another run's decisions, which are taken where they are asked for.
          machine: remembers decisions from run to run; None: the one of the user's cache directory.
          timed: {name: seconds} of some ways, as `timed`, which None means.
        """
        self._given, self._own_machine, self._timed = dict(given or {}), machine, timed
        self.made: dict[str, Any] = {}

    def decide(
        self, key: Hashable, measure: Callable[[], Any], *, valid: Callable[[Any], bool], lasting: bool = True
    ) -> Any:
        """Return a decision: of this run, of the run that was given, of this machine, or measured now.

        Args:
          key: identifies the decision, shapes included; its `repr` is what is kept.
          measure: decides it now. Its result can be written as JSON.
          valid: whether an answer from elsewhere makes sense here.
          lasting: the answer holds for later runs on this machine too.
        """
        text = _text(key)
        if text not in self.made:
            known = [self._given, self.machine.answers] if lasting else [self._given]
            found = [answers[text] for answers in known if text in answers and valid(answers[text])]
            self.made[text] = found[0] if found else measure()
            if lasting and not found:
                self.machine.learn(text, self.made[text])
        return self.made[text]

    def fastest(self, key: Hashable, ways: Ways) -> str:
        """`fastest` by these choices."""
        if len(ways) == 1:
            return next(iter(ways))

        def measure() -> str:
            seconds = (self._timed or timed)(ways)
            return min(ways, key=seconds.__getitem__)

        return self.decide(key, measure, valid=lambda answer: answer in ways)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Decide by these choices until the block ends."""
        global _active
        before, _active = _active, self
        try:
            yield
        finally:
            _active = before
            self.machine.save()

    @property
    def machine(self) -> "Machine":
        """Remembers decisions from run to run."""
        return self._own_machine or _machine()

    def to_json(self) -> str:
        """The decisions as JSON, one a line, that `read` takes."""
        return json.dumps({"format": _FORMAT, "choices": self.made}, indent=1, sort_keys=True) + "\n"

    @classmethod
    def read(cls, path: Path) -> Self:
        """Choices of another run, from its file.

        Raises:
          DataError: there is no such file, or it holds something else.
        """
        try:
            return cls(_answers(path.read_text()))
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise DataError(
                f"Expected choices to be a file that a run has left; got {path}: {type(error).__name__}: {error}. Give "
                "the choices.json of a run directory, or leave choices out to measure anew."
            ) from error


class Machine:
    """What has been decided on this machine, in a file if there is one."""

    def __init__(self, path: Path | None):
        """Read the file; None: nothing lasts longer than the process."""
        self._path, self._new = path, False
        self.answers: dict[str, Any] = self._read()

    def learn(self, key: str, answer: Any) -> None:
        """One more answer."""
        self.answers[key], self._new = answer, True

    def save(self) -> None:
        """Write what is new beside what other processes have written. Where that fails, nothing is kept."""
        if not self._new or self._path is None:
            return
        self._new = False
        draft = self._path.with_name(f"{self._path.name}.{os.getpid()}.tmp")
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            draft.write_text(json.dumps({"format": _FORMAT, "choices": {**self._read(), **self.answers}}, indent=1))
            draft.replace(self._path)

    def _read(self) -> dict[str, Any]:
        if self._path is not None:
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
                return _answers(self._path.read_text())
        return {}


_active: Choices | None = None
_alone = Choices()  # of what is computed outside of any run
_machines: dict[str, Machine] = {}  # by where the cache is


def decided(key: Hashable, measure: Callable[[], Any], *, valid: Callable[[Any], bool], lasting: bool = True) -> Any:
    """`Choices.decide` by the choices that are active."""
    return (_active or _alone).decide(key, measure, valid=valid, lasting=lasting)


def fastest(key: Hashable, ways: Ways) -> str:
    """Return the name of the way that takes the least time.

    Args:
      key: identifies the decision, shapes included.
      ways: {name: does the work once}; at least one.
    """
    return (_active or _alone).fastest(key, ways)


def timed(ways: Ways, *, rounds: int = _ROUNDS, clock: Callable[[], float] = time.perf_counter) -> dict[str, float]:
    """Return {name: seconds that the way took, at best}.

    Ways are timed in rotation, so that a temporary slowdown of the machine affects all of them.

    Args:
      ways: {name: does the work once}.
      rounds: how often each is timed, unless it is hopeless.
      clock: seconds.
    """

    def seconds_of(work: Callable[[], object]) -> float:
        began = clock()
        work()
        return clock() - began

    seconds: dict[str, float] = {}
    for name, work in ways.items():
        work()  # fills caches, and makes the decisions that it depends on
        seconds[name] = seconds_of(work)
    for done in range(1, rounds):
        limit = (_HOPELESS_AT_ONCE if done == 1 else _HOPELESS) * min(seconds.values())
        hopeful = [name for name in ways if seconds[name] <= limit]
        for name in hopeful:
            seconds[name] = min(seconds[name], seconds_of(ways[name]))
    return seconds


@functools.cache
def _text(key: Hashable) -> str:
    """As it is kept. A step asks the same questions for every microbatch and layer, and `repr` takes its time."""
    return repr(key)


def _answers(text: str) -> dict[str, Any]:
    written = json.loads(text)
    if written["format"] != _FORMAT:
        raise ValueError(f"format {written['format']}")
    return dict(written["choices"])


def _machine() -> Machine:
    """Of the cache directory that the environment names now."""
    place = os.environ.get(CACHE, "")
    if place not in _machines:
        _machines[place] = Machine(file_in(place))
    return _machines[place]


def file_in(place: str) -> Path | None:
    """Return where this processor's decisions are kept, with these versions: another decides otherwise.

    Args:
      place: a directory; empty for the user's cache directory; `off` for nowhere.
    """
    if place == "off":
        return None
    facts = repr((processor(), importlib.metadata.version("dpquant"), importlib.metadata.version("torch")))
    folder = Path(place) if place else platformdirs.user_cache_path("dpquant")
    return folder / f"choices-{_FORMAT}-{hashlib.sha256(facts.encode()).hexdigest()[:16]}.json"
