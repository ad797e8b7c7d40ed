# SPDX-License-Identifier: Apache-2.0
"""What this processor's int8 convolution runs, for tests that hold on every processor.

Without VNNI, pairs of full-range products saturate, and the library refuses such formats. Whoever asks here learns
whether a format runs; where it does not, that it is refused has been asserted.
"""

import pytest
import torch
from torch import nn

import dpquant
from dpquant.backends import cpu_int8
from dpquant.errors import FormatError
from dpquant.formats import precision

LARGEST_CODES = (64, 127)  # of E3M0, of INT8
REFUSAL = "int8 convolution (is not exact|does not run)"


def int8_runs(max_code: int) -> bool:
    """Whether int8 runs codes up to `max_code` here."""
    facts = {"max_code": max_code, "fits_int8": True, "device": torch.device("cpu")}
    if cpu_int8.int8_is_exact(max_code):
        assert cpu_int8.resolve_backend("auto", **facts) == cpu_int8.resolve_backend("int8", **facts) == "int8"
        return True
    assert cpu_int8.resolve_backend("auto", **facts) == "simulate"
    with pytest.raises(FormatError, match=REFUSAL):
        cpu_int8.resolve_backend("int8", **facts)
    return False


def backends_of(format: str) -> tuple[str, ...]:
    """The backends that run a recipe or precision here."""
    chosen = precision(format)
    if chosen.fits_int8 and int8_runs(chosen.max_code):
        return "simulate", "int8"
    with pytest.raises(FormatError, match="int8"):
        dpquant.prepare(nn.Linear(2, 2), format=format, backend="int8")
    assert dpquant.prepare(nn.Linear(2, 2), format=format).backend == "simulate"
    return ("simulate",)
