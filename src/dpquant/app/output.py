# SPDX-License-Identifier: Apache-2.0
"""Where the verbs print, and how much: results on standard output, everything else on standard error.

`-q` leaves results only, `-qq` nothing; `-v` adds times. NO_COLOR and FORCE_COLOR are heeded, and `--color` overrules
them. These options stand before the verb or after it. Loads no torch.
"""

import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import IO, Any, Self, cast

from rich.console import Console

from dpquant import native
from dpquant.errors import SettingError, did_you_mean

COLORS = ("auto", "always", "never")
_PIPED = 100  # columns where nothing says how many there are
_FLAGS = ("-q", "-qq", "--quiet", "-v", "--verbose")


class _Log:
    """Standard error for progress: where it cannot be written, by a closed pipe or a full disk, nothing ends."""

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            sys.stderr.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            sys.stderr.flush()

    def isatty(self) -> bool:
        return sys.stderr.isatty()

    @property
    def encoding(self) -> str:
        return sys.stderr.encoding


_log = cast("IO[str]", _Log())


@dataclasses.dataclass(frozen=True)
class Output:
    """How much is printed, and with which colors.

    Attributes:
      quiet: 0; 1, results only; 2, nothing.
      verbose: times are printed, too.
      color: one of `COLORS`.
    """

    quiet: int = 0
    verbose: bool = False
    color: str = "auto"

    @classmethod
    def split(cls, arguments: Sequence[str]) -> tuple[Self, list[str]]:
        """Return the output that arguments ask for, wherever they stand, and the arguments that remain.

        Raises:
          SettingError: the color is unknown.
        """
        quiet, verbose, color, rest = 0, False, "auto", []
        words = iter(arguments)
        for word in words:
            if word == "--":
                rest += [word, *words]
            elif word == "--color" or word.startswith("--color="):
                color = word.partition("=")[2] or next(words, "")
            elif word in ("-q", "-qq", "--quiet"):
                quiet += 2 if word == "-qq" else 1
            elif word in _FLAGS:
                verbose = True
            else:
                rest.append(word)
        if color not in COLORS:
            raise SettingError(
                f"Expected color to be one of {', '.join(COLORS)}; got color={color}. {did_you_mean(color, COLORS)}"
                "Leave it out for colors on a terminal."
            )
        return cls(min(quiet, 2), verbose, color), rest

    def console(self, *, results: bool, quiet: bool = False) -> Console:
        """Return a console.

        Args:
          results: to standard output, for results; else to standard error, for progress.
          quiet: whether it prints nothing, whatever was asked for.
        """
        colors: dict[str, Any] = {
            "auto": {},
            "always": {"force_terminal": True},
            "never": {"no_color": True, "highlight": False},
        }[self.color]
        if not results:  # a bar is for a terminal alone, whatever colors are asked for
            colors["force_terminal"] = sys.stderr.isatty()
        console = Console(file=None if results else _log, quiet=quiet or self.quiet > int(results), **colors)
        if not console.is_terminal and "COLUMNS" not in os.environ:
            console.width = _PIPED
        return console


_current = Output()


def current() -> Output:
    """Return the output of the command line that runs."""
    return _current


@contextlib.contextmanager
def using(output: Output) -> Iterator[None]:
    """Context: `current()` is this output."""
    global _current
    before, _current = _current, output
    try:
        yield
    finally:
        _current = before


def results() -> Console:
    """Return the console for results."""
    return _current.console(results=True)


def say(text: str) -> None:
    """Print a line of progress on standard error, unless results alone are asked for."""
    if not _current.quiet:
        print(text, file=_log, flush=True)


def tell_native(kernels: object = native.kernels) -> None:
    """Say so where the C++ kernels are missing, before a user wonders why it is slow."""
    if kernels is None:
        say(f"native    module: {native.SLOWER}")


class Phases:
    """Announces phases on standard error as they begin, each with its seconds once the next one begins or it is over.

    On an interrupted line nothing else is printed: `over` ends it.
    """

    def __init__(self, *, quiet: bool = False):
        self._quiet = quiet or _current.quiet > 0
        self._began: float | None = None

    def begin(self, what: str) -> None:
        """Announce a phase, which ends the one before."""
        self.over()
        if not self._quiet:
            print(f"{what} ... ", end="", file=_log, flush=True)
            self._began = time.perf_counter()

    def over(self) -> None:
        """End the line of the phase, if there is one, with its seconds."""
        if self._began is not None:
            print(f"{time.perf_counter() - self._began:.1f} s", file=_log, flush=True)
            self._began = None
