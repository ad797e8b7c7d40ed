# SPDX-License-Identifier: Apache-2.0
"""Values that the shell completes. It asks at every press of a key, so nothing here loads torch or the accountant."""

from collections.abc import Callable, Mapping
from pathlib import Path

from dpquant.data.model_names import NAMES
from dpquant.data.sizes import HF_PREFIX, OWN_PREFIXES, PUBLIC_SIZES
from dpquant.formats import AUTO, RECIPES
from dpquant.runs.names import CONFIG
from dpquant.runs.ranges import CHOICES

_VALUES: Mapping[str, tuple[str, ...]] = {
    **CHOICES,
    "format": (AUTO, *RECIPES),
    "rest": ("full", *RECIPES),
    "data": (*PUBLIC_SIZES, *OWN_PREFIXES),
    "model": (*NAMES, HF_PREFIX),
    "device": ("auto", "cpu", "cuda"),
    "track": ("tensorboard", "mlflow"),
}


def completer(setting: str) -> Callable[[str], list[str]] | None:
    """Return the function that completes a setting's value; None if it is no word of a list."""
    if setting not in _VALUES:
        return None
    return lambda incomplete: [value for value in _VALUES[setting] if value.startswith(incomplete)]


def policies(incomplete: str) -> list[str]:
    """Return lists of policies with commas that go on with one more."""
    first, comma, last = incomplete.rpartition(",")
    return [f"{first}{comma}{name}" for name in CHOICES["policy"] if name.startswith(last)]


def run_directories(incomplete: str) -> list[str]:
    """Return the run directories that begin like this, here or in runs/."""
    folders = [*Path().iterdir(), *Path("runs").glob("*"), *Path().glob(f"{_escaped(incomplete)}*")]
    runs = {str(folder) for folder in folders if (folder / CONFIG).is_file()}
    return sorted(name for name in runs if name.startswith(incomplete))


def _escaped(text: str) -> str:
    """Return a relative path in which no character is a pattern; nothing for an absolute one."""
    return "" if text.startswith("/") else "".join(f"[{c}]" if c in "*?[" else c for c in text)
