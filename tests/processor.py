# SPDX-License-Identifier: Apache-2.0
"""What this processor's backends run, for tests that hold on every processor; and which way is taken of several.

Without VNNI and our own kernels, pairs of full-range products saturate, and the library refuses such formats. Whoever
asks here learns whether a format runs; where it does not, that it is refused has been asserted.
"""

import contextlib
from collections.abc import Mapping

import pytest
import torch

from dpquant.backends.choose import Choices, Machine
from dpquant.backends.interface import Backend
from dpquant.backends.registry import BACKENDS, resolve
from dpquant.errors import FormatError
from dpquant.formats import NumberFormat, Precision, Recipe, RoleFormat, Rounding, precision

CPU = torch.device("cpu")
LARGEST_CODES = (64, 127)  # of E3M0, of INT8
REFUSAL = "int8 convolution (is not exact|does not run)"


def integers_up_to(max_code: int) -> RoleFormat:
    """Codes are the integers of at most this magnitude; a row whose largest magnitude it is has scale 1."""
    format = NumberFormat(name="integers", exponent_bits=0, mantissa_bits=7, min_exponent=7, max_code=max_code)
    return RoleFormat(format=format, rounding=Rounding.NEAREST)


def of_integers(max_code: int) -> Precision:
    """All operands of all products are integers of at most this magnitude."""
    role = integers_up_to(max_code)
    return precision(Recipe(name=f"integers up to {max_code}", weight=role, activation=role, gradient=role))


def int8_runs(max_code: int, backends: Mapping[str, Backend] = BACKENDS) -> bool:
    """Whether int8 runs codes up to `max_code` here."""
    if backends["int8"].refusal(of_integers(max_code), CPU) is None:
        for name in ("auto", "int8"):
            assert resolve(name, [of_integers(max_code)], CPU).name == "int8"
        return True
    with pytest.raises(FormatError, match=REFUSAL):
        resolve(backends["int8"], [of_integers(max_code)], CPU)
    return False


def backends_of(format: str, backends: Mapping[str, Backend] = BACKENDS) -> tuple[str, ...]:
    """The names of the backends that run a recipe or precision here, of which `auto` takes the last."""
    chosen = precision(format)
    running = []
    for name, backend in backends.items():
        if backend.refusal(chosen, CPU) is None:
            running.append(name)
            continue
        with pytest.raises(FormatError, match=name):
            resolve(backend, [chosen], CPU)
    if backends is BACKENDS:
        assert resolve("auto", [chosen], CPU).name == running[-1]
    return tuple(running)


def preferring(name: str, asked: set[str] | None = None) -> contextlib.AbstractContextManager[None]:
    """Until the block ends the way of this name is the fastest, where it is one of them; else the first.

    `asked` gets the names of all ways that there were.
    """

    def timed(ways):
        if asked is not None:
            asked.update(ways)
        return {way: float(way != name) for way in ways}

    return Choices(timed=timed, machine=Machine(None)).active()
