# SPDX-License-Identifier: Apache-2.0
"""What is known of the time of a step, for `dpquant plan --world-size`. Loads no torch.

`dpquant assess` measures a step on synthetic records and keeps the times in a file of the user's cache directory, under
the settings that a step's time depends on. Where none were measured, those of published benchmarks are assumed.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import platformdirs

from dpquant.errors import SettingError
from dpquant.machine import processor
from dpquant.runs.record import write_whole
from dpquant.runs.settings import TrainSettings
from dpquant.training.scaling import StepTimes

_FILE = "steps-1.json"
_DEPENDS_ON = (
    *("data", "image_size", "augment", "views", "model", "width", "fix", "lora", "train_only", "noise", "optimizer"),
    *("policy", "fraction", "macs", "layers", "format", "rest", "backend", "device", "threads", "microbatch_size"),
)
_XEON = "times on two cores of an Intel Xeon with AMX, 32x32 images, benchmarks/results/intel-xeon-2026-11-23"
_ASSUMED: Mapping[tuple[str, bool], StepTimes] = {
    (model, quantized): StepTimes(
        fixed=fixed,
        per_example=per_example,
        values=values,
        source=f"assumed: {_XEON}, {'all layers quantized' if quantized else 'full precision'}",
    )
    for model, quantized, fixed, per_example, values in (
        ("resnet18-cifar", True, 0.205, 4.5e-3, 11_173_962),
        ("resnet18-cifar", False, 0.102, 14.0e-3, 11_173_962),
        ("cnn", True, 6.2e-3, 6.5e-5, 30_794),
        ("cnn", False, 2.6e-3, 1.3e-4, 30_794),
    )
}


def keep(settings: TrainSettings, times: StepTimes) -> None:
    """Keep measured times for later plans on this machine. If the file cannot be written, it stays as it is."""
    path = _path()
    if path is None:
        return
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        known = {**_known(path), _key(settings): dataclasses.asdict(times)}
        write_whole(path, json.dumps(known, indent=1) + "\n", flush=False)


def step_times(settings: TrainSettings) -> StepTimes:
    """Return the times of a step of these settings on one worker: measured on this machine, else assumed.

    Raises:
      SettingError: nothing is known of this model.
    """
    path = _path()
    measured = _known(path).get(_key(settings)) if path is not None else None
    if measured is not None:
        return StepTimes(**measured)
    assumed = _ASSUMED.get((settings.model, settings.policy != "none"))
    if assumed is None or settings.width != 1.0 or settings.train_only is not None:
        raise SettingError(
            f"Expected a model whose step is measured on this machine, for world_size; got model={settings.model}, "
            "which is not. Measure it: dpquant assess, with the same settings."
        )
    return assumed


def _path() -> Path | None:
    """Return the file of this machine, in the directory that DPQUANT_CACHE names; None where that is `off`."""
    place = os.environ.get("DPQUANT_CACHE", "")
    if place == "off":
        return None
    return (Path(place) if place else platformdirs.user_cache_path("dpquant")) / _FILE


def _key(settings: TrainSettings) -> str:
    """Return what a step's time depends on, as text: this processor and settings."""
    return repr((processor(), *(getattr(settings, name) for name in _DEPENDS_ON)))


def _known(path: Path) -> dict[str, Any]:
    """Return all measured times; {} if there are none, or another version has written them."""
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
        known = json.loads(path.read_text(encoding="utf-8"))
        return {key: times for key, times in known.items() if StepTimes(**times)}
    return {}
