# SPDX-License-Identifier: Apache-2.0
"""Exceptions of dpquant. Each class is a DPQuantError and also the builtin exception that a caller would expect.

    DPQuantError
    ├── SettingError   (ValueError)    a setting is out of range, or settings contradict each other
    ├── FormatError    (ValueError)    a number format or recipe is unknown or cannot run on this backend
    ├── ModelError     (ValueError)    the model cannot be trained privately
    ├── DataError      (ValueError)    a data set is missing, empty or unreadable
    ├── BudgetError    (RuntimeError)  the planned privacy budget is spent, or does not hold a charge
    ├── DivergedError  (RuntimeError)  a run's parameters did not stay finite
    ├── StoppedError   (RuntimeError)  a signal ended a run between two steps; it can be continued
    ├── GroupError     (RuntimeError)  processes of a run have lost each other, or were started on different runs
    └── LedgerError    (RuntimeError)  the ledger cannot be read or written, is in use, or is not as it was written

Messages follow one form: `Expected <name> <rule>; got <name>=<value>. <Why it matters>. <What to do>.`
They name shapes, dtypes, module paths and settings. They never contain data or the realised size of a Poisson batch.
The functions here write parts of them.
"""

import difflib
import sysconfig
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType


class DPQuantError(Exception):
    """Base class of every exception that dpquant raises on purpose."""


def quoted(error: BaseException) -> str:
    """Return an exception's type and text, and the line of the user's code from which it came, if there is one.

    Only for exceptions that no private record can have caused: their text may quote what the code was given.
    """
    installed = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    not_the_users = (*installed, str(Path(__file__).parent), "<")
    frames = traceback.extract_tb(error.__traceback__)
    place = next((f"{f.filename}:{f.lineno}" for f in reversed(frames) if not f.filename.startswith(not_the_users)), "")
    place = place.removeprefix(f"{Path.cwd()}/")
    return f"{type(error).__name__}: {error}" + (f" (at {place})" if place else "")


class SettingError(DPQuantError, ValueError):
    """A setting is out of range, or two settings contradict each other.

    Attributes:
      instead: {setting: value} that would be accepted, where it is known.
    """

    def __init__(self, message: str, instead: Mapping[str, object] = MappingProxyType({})):
        super().__init__(message)
        self.instead = instead


class FormatError(DPQuantError, ValueError):
    """A number format or recipe is unknown, or cannot run on the chosen backend."""


class ModelError(DPQuantError, ValueError):
    """The model cannot be trained privately as it is."""


class DataError(DPQuantError, ValueError):
    """A data set is missing, empty or unreadable."""


class BudgetError(DPQuantError, RuntimeError):
    """The planned privacy budget is spent or does not hold a charge, or an epoch takes no step and cannot spend it."""


class DivergedError(DPQuantError, RuntimeError):
    """A run's parameters are no longer finite. What was charged until then stays charged."""


class StoppedError(DPQuantError, RuntimeError):
    """A signal asked a run to end, which it did between two steps, with a checkpoint.

    Attributes:
      exit_code: 128 plus the signal's number, as a shell reports it.
    """

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


class GroupError(DPQuantError, RuntimeError):
    """The processes of a run have lost each other, or were not started on the same run."""


class LedgerError(DPQuantError, RuntimeError):
    """The ledger cannot be read or written, another process writes to it, or it is not as it was written."""


def did_you_mean(name: object, known: Iterable[str], also: Mapping[str, str] = MappingProxyType({})) -> str:
    """Return "Did you mean X? ", with the known name that is nearest to a name, or "" if none is near.

    Case, hyphens and underscores make no difference.

    Args:
      name: what was given.
      known: the names that exist.
      also: {another name that users may give: the known name}.
    """
    spelt = {_spelt(one): one for one in known} | {_spelt(one): meant for one, meant in also.items()}
    close = difflib.get_close_matches(_spelt(str(name)), spelt, n=1)
    return f"Did you mean {spelt[close[0]]}? " if close else ""


def _spelt(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "").replace(" ", "")


def expect(
    name: str,
    value: object,
    kinds: type | tuple[type, ...],
    what: str,
    todo: str,
    error: type[DPQuantError] = SettingError,
) -> None:
    """Raise an error unless an argument is of one of these types. A bool is no number.

    Args:
      name: of the argument.
      value: of the argument, of which the message names the type alone.
      kinds: types of which it may be.
      what: these types in words, with an article.
      todo: what to do, without its full stop.
      error: the class to raise.
    """
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise error(f"Expected {name} to be {what}; got {kind_of(value)}. {todo}.")


def kind_of(value: object) -> str:
    """Return a value's type in words, without the value: "an int", "None", "the class Linear"."""
    if value is None:
        return "None"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    name = type(value).__name__
    return f"{'an' if name[0] in 'AEIOUaeiou' else 'a'} {name}"
