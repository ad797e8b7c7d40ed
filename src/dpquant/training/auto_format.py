# SPDX-License-Identifier: Apache-2.0
"""`format=auto`: which layers of a run are quantized, and in what, by what its machine gains.

The device's units decide the format: four bits where it multiplies them, else int8, else full precision. Then each
layer is timed in it on synthetic records, and those that get faster run quantized in every epoch. If a step as a whole
hardly gets faster, all layers stay in full precision.

Nothing here depends on a record or is charged: int8 needs no analysis to find the layers that bear it. So the policy is
`AllPolicy`, over the layers that gain.

Symbols: gain, time in full precision over time quantized.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping

import torch

from dpquant.backends.interface import Backend
from dpquant.backends.registry import BACKENDS
from dpquant.formats import FULL_PRECISION, Precision, precision

LEAST_GAIN = 1.05  # of a layer: the medians of two measurements of one layer differ by less
_LEAST_GAIN_OF_STEP = 1.03


@dataclasses.dataclass(frozen=True, kw_only=True)
class Units:
    """What a device multiplies faster than float32.

    Attributes:
      precision: of layers that gain; full precision where there are no such units.
      missing: why there are none; empty where there are.
    """

    precision: Precision
    missing: str = ""


def units_of(device: torch.device, backend: str | Backend, backends: Mapping[str, Backend] = BACKENDS) -> Units:
    """Return the narrowest format that a device has units for.

    Args:
      device: of the model.
      backend: `auto`, the name of a backend, or a backend; others than it are not used.
      backends: all backends, by name; of two with the same format, the later one is used.
    """
    asked = [backends[backend] if isinstance(backend, str) else backend] if backend != "auto" else None
    made_for_it = [one for one in asked or reversed(list(backends.values())) if one.device_type in (None, device.type)]
    refusals, found = [], []
    for one in made_for_it:
        for name in one.units:
            reason = one.refusal(precision(name), device)
            if reason is None:
                found.append(precision(name))
            else:
                refusals.append(reason)
    if found:
        return Units(precision=max(found, key=lambda one: one.share(most_bits=4)))
    if asked is not None:
        return Units(precision=FULL_PRECISION, missing=f"backend {asked[0].name} has no faster units here")
    return Units(precision=FULL_PRECISION, missing=refusals[0] if refusals else f"a {device.type} has no faster units")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Taken:
    """What `auto` takes.

    Attributes:
      layers: that run quantized, in forward order; () if none do.
      why: what was taken, why, and what it gains, in one sentence.
    """

    layers: tuple[str, ...]
    why: str


def taken(
    units: Units, names: Collection[str], gains: Mapping[str, float] | None, gain_of_step: Callable[..., float]
) -> Taken:
    """Return the layers that gain, or none if a step hardly does.

    Args:
      units: of the device.
      names: all quantizable layers, in forward order.
      gains: {layer: its gain}; None: they were not measured, as the run is too short to win the time back.
      gain_of_step: measures the gain of a step in which the layers that are given run quantized.
    """
    format = units.precision.name
    if not units.precision.quantized:
        return Taken(layers=(), why=f"full precision: {units.missing}")
    if gains is None:
        return Taken(layers=(), why=f"full precision: the run is over before measuring {format} would pay")
    layers = tuple(name for name in names if gains.get(name, 0.0) >= LEAST_GAIN)
    if not layers:
        best = f" (at best {max(gains.values()):.2f} times as fast)" if gains else ""
        return Taken(layers=(), why=f"full precision: no layer gains by {format} on this machine{best}")
    gain = gain_of_step(layers)
    if gain < _LEAST_GAIN_OF_STEP:
        why = f"full precision: {format} would make a step only {gain:.2f} times as fast on this machine"
        return Taken(layers=(), why=why)
    why = f"{format} in {len(layers)} of {len(names)} layers, those that gain: a step is {gain:.2f} times as fast"
    return Taken(layers=layers, why=why)
