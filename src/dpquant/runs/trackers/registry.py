# SPDX-License-Identifier: Apache-2.0
"""Which trackers there are: two of dpquant's own, and those of other packages, by entry points. Loads no torch.

Another package offers a tracker by an entry point of the group `dpquant.sinks`, whose name is what `--track` takes. It
names a callable that is given a `TrackedRun` and returns a `dpquant.Sink`.
"""

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, cast

from dpquant.errors import SettingError, did_you_mean
from dpquant.runs.ranges import tracker_names

if TYPE_CHECKING:
    from dpquant.runs.sinks import Sink
    from dpquant.runs.trackers.tracking import TrackedRun

GROUP = "dpquant.sinks"

_OWN: Mapping[str, tuple[str, ...]] = {
    "tensorboard": ("tensorboardX",),
    "mlflow": ("mlflow", "sqlalchemy", "alembic"),
}
"""{tracker, its module here, and its extra: the modules that it imports}."""


def is_installed(module: str) -> bool:
    """Return whether a module could be imported, without importing it."""
    return importlib.util.find_spec(module) is not None


def check_trackers(track: str | None, is_there: Callable[[str], bool] = is_installed) -> None:
    """Check that the trackers are there, without loading any of them.

    Args:
      track: the setting; None: there are none.
      is_there: returns whether a module could be imported.
    Raises:
      SettingError: a tracker is not known, or packages of its extra are missing.
    """
    others = _others()
    for name in tracker_names(track):
        if name in _OWN:
            _check_extra(name, is_there)
        elif name not in others:
            known = [*_OWN, *others]
            raise SettingError(
                f"Expected track to name {', '.join(known[:-1])} or {known[-1]}; got track={name}. "
                f"{did_you_mean(name, known)}Others come with packages that have an entry point of the group {GROUP}. "
                "Install one, or leave it out."
            )


def load_trackers(track: str | None) -> "dict[str, Callable[[TrackedRun], Sink]]":
    """Return {name: what makes the tracker} for the trackers of a run, in their order.

    Raises:
      SettingError: a tracker is not known, packages of its extra are missing, or its entry point cannot be loaded.
    """
    check_trackers(track)
    others = _others()
    return {name: _own(name) if name in _OWN else _loaded(others[name]) for name in tracker_names(track)}


def _others() -> dict[str, importlib.metadata.EntryPoint]:
    found = {point.name: point for point in importlib.metadata.entry_points(group=GROUP)}
    return {name: point for name, point in sorted(found.items()) if name not in _OWN}


def _check_extra(name: str, is_there: Callable[[str], bool]) -> None:
    missing = [module for module in _OWN[name] if not is_there(module)]
    if missing:
        raise SettingError(
            f"Expected the packages of track={name}; got no {missing[0]}. They are an extra, as most runs need none "
            f"of them. Install them: pip install 'dpquant[{name}]'"
        )


def _own(name: str) -> "Callable[[TrackedRun], Sink]":
    return importlib.import_module(f"dpquant.runs.trackers.{name}").Tracker


def _loaded(point: importlib.metadata.EntryPoint) -> "Callable[[TrackedRun], Sink]":
    try:
        made = point.load()
    except Exception as error:  # importing another package may raise anything
        raise SettingError(
            f"Expected track={point.name} to be loaded from {point.value}; got {type(error).__name__}: {error}. Mend "
            "the package that offers it, or leave it out."
        ) from error
    if not callable(made):
        raise SettingError(
            f"Expected {point.value}, which track={point.name} names, to be called with a run; got a "
            f"{type(made).__name__}. Mend the package that offers it, or leave it out."
        )
    return cast("Callable[[TrackedRun], Sink]", made)
