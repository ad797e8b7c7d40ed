# SPDX-License-Identifier: Apache-2.0
"""int8 runs where the processor has the instructions, and says why it does not where its sums are not exact.

That its products are exact where it runs is tested with all backends, in `test_conformance.py`.
"""

import dataclasses
import os
import platform
import subprocess
import sys

import pytest
import torch

from conformance import PLAIN, assert_products_are_exact, assert_refusals_are_told
from convolutions import codes
from dpquant.backends.cpu_int8 import CpuInt8, Int8Weight, flaw_of_int8
from dpquant.backends.geometry import Geometry
from dpquant.backends.native_convolutions import native_kernels
from dpquant.backends.qtensor import QTensor
from dpquant.backends.reference import ReferenceWeight
from dpquant.backends.registry import BACKENDS, reason_for, resolve
from dpquant.errors import FormatError
from dpquant.formats import precision
from dpquant.machine import Hardware
from processor import CPU, LARGEST_CODES, backends_of, int8_runs, of_integers

X86 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="about x86 processors")


@pytest.mark.parametrize("max_code", LARGEST_CODES)
def test_this_machine_either_is_exact_or_refuses_int8(max_code):
    int8_runs(max_code)
    assert resolve("auto", [precision("fp8")], CPU).name == "simulate"
    assert resolve("simulate", [of_integers(max_code)], CPU).name == "simulate"


@X86
@pytest.mark.skipif("ONEDNN_MAX_CPU_ISA" in os.environ, reason="told to use fewer instructions")
def test_int8_runs_where_the_processor_has_the_instructions():
    """So that a broken int8 backend is no reason to leave out its tests."""
    instructions = Hardware.here().instructions
    if "avx2" in instructions:
        assert flaw_of_int8(64) is None
        assert backends_of("luq-fp4") == ("simulate", "int8")
    if {"avx512_vnni", "amx_int8"} & set(instructions):
        assert flaw_of_int8(127) is None
    if {"avx512_vnni", "amx_int8"} & set(instructions) or native_kernels():
        assert backends_of("int8") == ("simulate", "int8")


@X86
@pytest.mark.parametrize("instructions", ["AVX2", "AVX512_CORE", "AVX512_CORE_VNNI"])
def test_int8_is_exact_or_refused_where_instructions_are_fewer(instructions):
    """Without VNNI, oneDNN's pairs of full-range products saturate; the codes of LUQ-FP4 never do."""
    program = "from dpquant.backends.cpu_int8 import flaw_of_int8 as flaw; print(flaw(64) is None, flaw(127) is None)"
    told = {**os.environ, "ONEDNN_MAX_CPU_ISA": instructions}
    told_of = subprocess.run(
        [sys.executable, "-c", program], env=told, capture_output=True, text=True, check=True
    ).stdout
    small, full = told_of.split()
    if flaw_of_int8(64) is None:
        assert small == "True"
    if instructions == "AVX2":
        assert full == "False"


@pytest.mark.parametrize(("groups", "channels"), [(1, 8), (2, 16), (2, 15), (8, 1)])
def test_groups_of_few_channels_are_not_filled_up_to_a_vector(groups, channels):
    """They are multiplied by oneDNN if its kernels for them are exact here; depthwise ones else as floating point."""
    weight = QTensor(codes=codes((groups * channels, channels, 3, 3), 64), scale=torch.ones(1))
    backend = CpuInt8()
    packed = backend.pack(weight, Geometry(kernel=(3, 3), groups=groups), max_code=64)
    kinds = {(2, 15): (Int8Weight, backend._packed), (8, 1): (Int8Weight, ReferenceWeight)}
    exact, other = kinds.get((groups, channels), (backend._packed, backend._packed))
    assert type(packed) is (exact if flaw_of_int8(64, groups=64 if channels == 1 else 16) is None else other)


class _SaturatesIn(Int8Weight):
    """Sums products in sixteen bits where the convolution has so many groups."""

    groups = 1

    def forward(self, x, bias):
        y = super().forward(x, bias)
        return y.clamp(-(2**15), 2**15 - 1) if self._geometry.groups == self.groups else y


class _SaturatesInGroups(_SaturatesIn):
    groups = 16


class _SaturatesDepthwise(_SaturatesIn):
    groups = 64


@pytest.mark.parametrize("wrong", [_SaturatesIn, _SaturatesInGroups, _SaturatesDepthwise])
@pytest.mark.parametrize("groups", [1, 16, 64])
def test_kernels_of_groups_are_tried_apart(wrong, groups):
    if flaw_of_int8(127, groups=groups) is None:
        flaw = flaw_of_int8(127, wrong, groups=groups)
        assert flaw == ("is not exact for codes up to 127" if groups == wrong.groups else None)


# What is asked for and cannot be had


@pytest.mark.parametrize(
    ("backend", "format", "device", "words"),
    [
        ("int4", "luq-fp4", "cpu", "one of auto, simulate, int8"),
        ("int8", "fp8", "cpu", "codes are not int8"),
        ("int8", "luq-fp4", "meta", "on meta"),
    ],
)
def test_an_impossible_backend_is_refused(backend, format, device, words):
    with pytest.raises(FormatError, match=words):
        resolve(backend, [precision(format)], torch.device(device))


def test_why_auto_came_to_a_backend_is_told():
    refused = [precision("fp8")]
    assert reason_for(resolve("auto", refused, CPU), refused, CPU) == "the recipe's codes are not int8"
    if int8_runs(64):
        run = [precision("luq-fp4")]
        assert reason_for(resolve("auto", run, CPU), run, CPU) == "exact on this processor"


# Processors whose int8 convolution is wrong, or missing


class OneTooLarge(Int8Weight):
    def forward(self, x, bias):
        return super().forward(x, bias) + 1


class OneTooLargeBackwards(Int8Weight):
    def input_gradient(self, grad, size):
        return super().input_gradient(grad, size) + 1


class WithoutTheOperator(Int8Weight):
    def forward(self, x, bias):
        return torch.ops.onednn.qconv2d_by_another_name(x.codes)


class WithoutAPrimitive(Int8Weight):
    def forward(self, x, bias):
        raise RuntimeError("could not create a primitive descriptor.\nA second line.")


FLAWS = {
    OneTooLarge: "int8 convolution is not exact for codes up to 64. A wrong",
    OneTooLargeBackwards: "int8 convolution is not exact for codes up to 64. A wrong",
    WithoutTheOperator: "object has no attribute 'qconv2d_by_another_name'). A wrong",
    WithoutAPrimitive: "does not run (RuntimeError: could not create a primitive descriptor). A wrong",
}


def refusal_of(backend):
    with pytest.raises(FormatError) as refusal:
        resolve(backend, [of_integers(64)], CPU)
    return str(refusal.value)


@pytest.mark.parametrize("packed", FLAWS)
def test_a_wrong_or_missing_int8_convolution_is_refused_and_why_is_told(packed):
    here = {**BACKENDS, "int8": CpuInt8(packed)}
    assert FLAWS[packed] in refusal_of(here["int8"])
    assert_refusals_are_told(here["int8"])
    assert not int8_runs(64, here) and backends_of("luq-fp4", here) == ("simulate",)  # as every test asks


def test_a_reason_that_is_lost_would_be_seen():
    class Silent(CpuInt8):
        def refusal(self, precision, device):
            return super().refusal(precision, device) and "is missing or not exact"

    for packed, words in FLAWS.items():
        assert words not in refusal_of(Silent(packed))


class WithAnotherZero(Int8Weight):
    """Takes codes for one too large."""

    def forward(self, x, bias):
        return super().forward(dataclasses.replace(x, codes=x.codes - 1), bias)


def test_a_wrong_zero_point_is_caught():
    with pytest.raises(AssertionError):
        assert_products_are_exact(CpuInt8(WithAnotherZero), PLAIN, 64)


def test_sums_that_int32_does_not_hold_are_taken_elsewhere():
    """A linear layer of so many inputs that the largest codes' products add up to more than 2^31."""
    many = 2**31 // 127**2 + 64
    weight = QTensor(codes=torch.full((2, many, 1, 1), 127, dtype=torch.int8), scale=torch.ones(1))
    x = QTensor(codes=torch.full((1, many, 1, 1), 255, dtype=torch.uint8), scale=torch.ones(1), zero_point=128)
    x = dataclasses.replace(x, codes=x.codes.contiguous(memory_format=torch.channels_last))
    packed = BACKENDS["int8"].pack(weight, Geometry(), max_code=127)
    assert packed.forward(x, None).flatten().tolist() == [float(torch.tensor(many * 127**2, dtype=torch.float32))] * 2
    assert not isinstance(BACKENDS["int8"].pack(weight, Geometry(), max_code=64), ReferenceWeight)
