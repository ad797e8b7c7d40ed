# SPDX-License-Identifier: Apache-2.0
"""Autotuning: decisions measured on this machine, and their storage, so that runs repeat exactly and start faster.

Decisions are, for instance, the fastest of several methods for some operand shapes, the number of examples per
microbatch, and the layers that quantization makes faster. A decision is made once and then kept, so that a run computes
the same sums at every step. Everything is measured on synthetic operands: decisions never depend on data.

`Choices` are the decisions of one run and are saved with it. Another run that is given them makes the same decisions;
with equal settings and an equal mechanism_seed it computes the same bits. Decisions are also kept for this machine, in
memory and in a file of the user's cache directory, where later runs find them. That file can be deleted at any time.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable, Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import platformdirs
import torch

from dpquant import native
from dpquant.errors import DataError
from dpquant.machine import now, processor

CACHE = "DPQUANT_CACHE"
"""Environment variable: the directory of this machine's file of decisions, or `off` for no file."""

_FORMAT = 1  # of the files of a run and of a machine; files of another format are not read
_ROUNDS = 3
_HOPELESS = 3  # a candidate more than this times slower than the best after two rounds is not timed again
_HOPELESS_AT_ONCE = 30  # the same after one round: by less, a time slice of another process could decide

Ways = Mapping[str, Callable[[], object]]
"""Candidates: {name: a function that does the work once}."""


class Choices:
    """The decisions of one run.

    Attributes:
      made: {text of the key: decision}, all decisions so far, as JSON values.
    """

    def __init__(
        self,
        given: Mapping[str, Any] | None = None,
        *,
        machine: "Machine | None" = None,
        timed: Callable[[Ways], Mapping[str, float]] | None = None,
    ):
        """Begin without decisions.

        Args:
          given: decisions of another run, which take precedence over measuring.
          machine: keeps decisions from run to run; None: the one of the user's cache directory.
          timed: times candidates, {name: seconds}; None: the function `timed`.
        """
        self._given, self._own_machine, self._timed = dict(given or {}), machine, timed
        self.made: dict[str, Any] = {}

    def decide(
        self, key: Hashable, measure: Callable[[], Any], *, valid: Callable[[Any], bool], lasting: bool = True
    ) -> Any:
        """Return the decision for a key: from this run, else the given run, else this machine, else measured now.

        Args:
          key: identifies the decision (operation and operand shapes); its `repr` is the key in the files.
          measure: makes the decision by measuring. Its result must be a JSON value.
          valid: returns whether a decision from another run or from the machine's file is possible here.
          lasting: True: the decision is also kept for later runs on this machine.
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
        """Return the name of the candidate that takes the least time; see the function `fastest`."""
        if len(ways) == 1:
            return next(iter(ways))

        def measure() -> str:
            seconds = (self._timed or timed)(ways)
            return min(ways, key=seconds.__getitem__)

        return self.decide(key, measure, valid=lambda answer: answer in ways)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Use these choices in `decided` and `fastest` until the block ends; then save the machine's decisions."""
        global _active
        before, _active = _active, self
        try:
            yield
        finally:
            _active = before
            self.machine.save()

    @property
    def machine(self) -> "Machine":
        """The store that keeps decisions from run to run."""
        return self._own_machine or _machine()

    def to_json(self) -> str:
        """Return the decisions as JSON, one per line, in the format of `read`."""
        return json.dumps({"format": _FORMAT, "choices": self.made}, indent=1, sort_keys=True) + "\n"

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read the choices of another run from its file.

        Raises:
          DataError: the file cannot be read, or does not hold choices.
        """
        try:
            return cls(_answers(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise DataError(
                f"Expected choices to be a file that a run has left; got {path}: {type(error).__name__}: {error}. Give "
                "the choices.json of a run directory, or leave choices out to measure again."
            ) from error


class Machine:
    """All decisions made on this machine, in memory and, if there is a path, in a file."""

    def __init__(self, path: Path | None):
        """Read the file at `path`; None: decisions are kept for the life of the process only."""
        self._path, self._new = path, False
        self.answers: dict[str, Any] = self._read()

    def learn(self, key: str, answer: Any) -> None:
        """Keep one more decision."""
        self.answers[key], self._new = answer, True

    def save(self) -> None:
        """Merge new decisions into the file, which other processes write too. If that fails, the file stays as is."""
        if not self._new or self._path is None:
            return
        self._new = False
        draft = self._path.with_name(f"{self._path.name}.{os.getpid()}.tmp")
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            draft.write_text(
                json.dumps({"format": _FORMAT, "choices": {**self._read(), **self.answers}}, indent=1), encoding="utf-8"
            )
            draft.replace(self._path)

    def _read(self) -> dict[str, Any]:
        if self._path is not None:
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
                return _answers(self._path.read_text(encoding="utf-8"))
        return {}


_active: Choices | None = None
_alone = Choices()  # decisions made outside of a run
_machines: dict[str, Machine] = {}  # by cache directory


def decided(key: Hashable, measure: Callable[[], Any], *, valid: Callable[[Any], bool], lasting: bool = True) -> Any:
    """Return the decision for a key by the active choices; see `Choices.decide`."""
    return (_active or _alone).decide(key, measure, valid=valid, lasting=lasting)


def fastest(key: Hashable, ways: Ways) -> str:
    """Return the name of the candidate that takes the least time, by the active choices.

    Args:
      key: identifies the decision (operation and operand shapes); the result is kept under it.
      ways: candidates, {name: a function that does the work once}; at least one.
    """
    return (_active or _alone).fastest(key, ways)


def place(device: torch.device) -> tuple[str, ...]:
    """Return what a key says about the device of the operands: nothing for the CPU, else the device's name."""
    if device.type == "cuda":
        return (torch.cuda.get_device_name(device),)
    return () if device.type == "cpu" else (device.type,)


def timed(ways: Ways, *, rounds: int = _ROUNDS, clock: Callable[[], float] = now) -> dict[str, float]:
    """Return {name: minimum of the measured seconds} of each candidate.

    Candidates are timed in rotation, so that a temporary slowdown of the machine affects all of them.

    Args:
      ways: candidates, {name: a function that does the work once}.
      rounds: number of timings of each candidate. One more than 3 times slower than the best is not timed again.
      clock: returns seconds, once all work is done.
    """

    def seconds_of(work: Callable[[], object]) -> float:
        began = clock()
        work()
        return clock() - began

    seconds: dict[str, float] = {}
    for name, work in ways.items():
        work()  # warm-up: fills caches, and makes decisions inside the work
        seconds[name] = seconds_of(work)
    for done in range(1, rounds):
        limit = (_HOPELESS_AT_ONCE if done == 1 else _HOPELESS) * min(seconds.values())
        hopeful = [name for name in ways if seconds[name] <= limit]
        for name in hopeful:
            seconds[name] = min(seconds[name], seconds_of(ways[name]))
    return seconds


@functools.cache
def _text(key: Hashable) -> str:
    """Return the key's `repr`, cached: every step looks the same keys up for each microbatch and layer."""
    return repr(key)


def _answers(text: str) -> dict[str, Any]:
    written = json.loads(text)
    if written["format"] != _FORMAT:
        raise ValueError(f"format {written['format']}")
    return dict(written["choices"])


def _machine() -> Machine:
    """Return the machine's decisions in the cache directory that the environment variable names now."""
    place = os.environ.get(CACHE, "")
    if place not in _machines:
        _machines[place] = Machine(file_in(place))
    return _machines[place]


def file_in(place: str, *, build: Callable[[], str] = native.build) -> Path | None:
    """Return the path of the decisions for this processor, these kernels and these versions; None: no file.

    Args:
      place: a directory; empty for the user's cache directory; `off` for no file.
      build: tells a build of the kernels from every other. Other kernels take other times.
    """
    if place == "off":
        return None
    versions = (importlib.metadata.version(name) for name in ("dpquant", "torch"))
    facts = repr((processor(), *versions, build()))
    folder = Path(place) if place else platformdirs.user_cache_path("dpquant")
    return folder / f"choices-{_FORMAT}-{hashlib.sha256(facts.encode()).hexdigest()[:16]}.json"
