# SPDX-License-Identifier: Apache-2.0
"""Triton kernels have the bits of their definitions in torch; on a GPU, or without one in Triton's interpreter.

The interpreter is slow and runs one program after the other: shapes are small, and rows few.
"""

import dataclasses
import importlib.util
import itertools
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from conformance import (
    PLAIN,
    assert_equals_the_reference,
    assert_large_sums_are_rounded_once,
    assert_norms_are_never_below,
    assert_products_are_exact,
    assert_sums_are_exact,
    exact_gradients,
    plain_operands,
    quantized_operands,
)
from convolutions import codes
from dpquant.backends import triton
from dpquant.backends.gemm_sum import GemmSum
from dpquant.backends.geometry import Geometry
from dpquant.backends.interface import Method, Norms, Operands
from dpquant.backends.qtensor import QTensor
from dpquant.backends.quantize import quantize_rows
from dpquant.backends.reference import Reference, ReferenceWeight
from dpquant.backends.triton.launch import launch
from dpquant.errors import FormatError
from dpquant.formats import E3M0, FP8_E4M3, INT4, INT8, RECIPES, RoleFormat, Rounding
from dpquant.rounding import row_keys

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CHANNELS_LAST = torch.channels_last
Quantizer = Callable[..., QTensor]


def native_environment() -> dict[str, str]:
    """Without the interpreter."""
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def run_python(program: str, **more: str) -> str:
    command = [sys.executable, "-W", "error", "-c", program]
    told = subprocess.run(command, env={**native_environment(), **more}, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    return told.stdout


# Where the kernels run


WITHOUT_TRITON = """
import sys

class Without:
    def __init__(self, inner):
        self.inner = inner

    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] == "triton" else self.inner.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.inner, name)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""
QUANTIZES = """
import sys, torch, dpquant
from dpquant.backends import triton
from dpquant.backends.quantize import quantize
assert quantize(torch.ones(1, 3), "int8").codes.tolist() == [[127] * 3]
assert "triton" not in sys.modules
print(triton.refusal(torch.device("cpu")))
"""


def test_dpquant_runs_where_triton_is_missing():
    assert run_python(WITHOUT_TRITON + QUANTIZES) == "triton is not installed\n"


def test_triton_is_not_loaded_where_it_is_not_asked_for():
    assert "only with TRITON_INTERPRET=1" in run_python(QUANTIZES)


def test_an_import_of_triton_would_be_seen():
    with pytest.raises(AssertionError):
        run_python("import dpquant.backends.triton.quantize" + QUANTIZES)


def test_other_devices_are_refused():
    assert "not on meta" in triton.refusal(torch.device("meta"))
    assert triton.refusal(DEVICE) is None
    if not torch.cuda.is_available():
        assert triton.refusal(torch.device("cuda")) == "there is no CUDA driver or no GPU"
        assert triton.obstacle(torch.device("cuda")).startswith("triton does not run (")


def test_a_kernel_that_cannot_run_is_refused():
    keys, role = row_keys(1, torch.arange(1)).to(DEVICE), RoleFormat(format=FP8_E4M3, rounding=Rounding.NEAREST)
    with pytest.raises(FormatError, match="got kernel='triton', but the format's codes are not"):
        quantize_rows(torch.ones(1, 3, device=DEVICE), role, keys, kernel="triton")
    with pytest.raises(FormatError, match="but triton runs on CUDA devices, not on meta"):
        triton.runs_quantizer("triton", torch.device("meta"), True)


def test_auto_takes_the_kernel_on_cuda_alone():
    taken = [triton.runs_quantizer("auto", DEVICE, supported) for supported in (True, False)]
    assert taken == [DEVICE.type == "cuda", False]
    assert triton.runs_quantizer("triton", DEVICE, True) and not triton.runs_quantizer("native", DEVICE, True)


# Quantizer


def rows_of_many_kinds(*shape: int) -> Tensor:
    """Rows of normal deviates; from the second on: with odd values, not finite, tiny, without negative values."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    flat = x.view(len(x), -1)
    odd = torch.tensor([1e-40, -0.0, 2.0**-126, -3e30, 2.0**-24])
    if len(x) > 1:
        flat[1, ::2] = odd.repeat(flat.shape[1])[: len(flat[1, ::2])]
    for row, value in zip(range(2, len(x)), (math.nan, -math.inf, 2.0**-101, None), strict=False):
        flat[row] = flat[row].abs() if value is None else torch.where(flat[row] == flat[row].max(), value, 0.0)
    return x


ROWS = [(6, 5), (6, 2, 3, 2), (2, 2049), (2, 3, 5, 7), (1, 700, 2, 3), (1, 3, 40, 70), (2, 1, 2050, 1)]
FORMATS = [E3M0, INT4, INT8]


def assert_quantizes_like_torch(quantizer: Quantizer, x: Tensor, role: RoleFormat, zero_point: int = 0) -> None:
    """Codes, scales and layouts are those of torch, bit for bit."""
    keys = row_keys(7, torch.arange(len(x))).to(DEVICE)
    found, expected = (
        one(x.to(DEVICE), role, keys, zero_point=zero_point, kernel=kernel)
        for one, kernel in ((quantizer, "triton"), (quantize_rows, "torch"))
    )
    assert found.codes.dtype == expected.codes.dtype and found.codes.stride() == expected.codes.stride()
    assert torch.equal(found.codes, expected.codes) and found.zero_point == expected.zero_point
    assert torch.equal(found.scale.view(torch.int32), expected.scale.view(torch.int32))


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
@pytest.mark.parametrize("shape", ROWS, ids=str)
def test_the_kernel_gives_the_same_codes(shape, format):
    x = rows_of_many_kinds(*shape)
    layouts = [x.contiguous(memory_format=CHANNELS_LAST), x] if x.ndim == 4 else [x]
    kinds = [(Rounding.STOCHASTIC, 0, None), (Rounding.NEAREST, 128, None), (Rounding.STOCHASTIC, 128, 1.5)]
    for one, (rounding, zero_point, clip) in zip(itertools.cycle(layouts), kinds, strict=False):
        role = RoleFormat(format=format, rounding=rounding, clip=clip)
        assert_quantizes_like_torch(quantize_rows, one, role, zero_point)


def test_the_kernel_gives_the_same_codes_of_one_sided_rows():
    role = RoleFormat(format=INT4, rounding=Rounding.STOCHASTIC, clip=2.0, one_sided=True)
    assert_quantizes_like_torch(quantize_rows, rows_of_many_kinds(6, 3, 2, 2), role)


def maps_with_zeros() -> Tensor:
    """Maps that end in lines and in columns of zeros, that have them inside, and that have hardly a value."""
    x = torch.randn(5, 3, 4, 5, generator=torch.Generator().manual_seed(1))
    x[0, :, 2:], x[1, :, :, 3:], x[2, :, 1], x[3] = 0, -0.0, 0, 0
    x[3, 1, 0, 3], x[3, 2, 2, 0] = 1.0, 1e-45
    return x


@pytest.mark.parametrize("clip", [0.01, 1.5])
def test_the_kernel_takes_the_same_mean(clip):
    for format in (E3M0, INT8):
        role = RoleFormat(format=format, rounding=Rounding.NEAREST, clip=clip)
        assert_quantizes_like_torch(quantize_rows, maps_with_zeros(), role)


def in_maps(q: QTensor, x: Tensor) -> QTensor:
    return dataclasses.replace(q, codes=torch.empty_like(x, dtype=q.codes.dtype).copy_(q.codes.view(x.shape)))


def by_row_major_position(x, role, keys, **options):
    return in_maps(quantize_rows(x.flatten(1), role, keys, **options), x)


def by_the_next_line(x, role, keys, **options):
    q = quantize_rows(x.roll(1, dims=2), role, keys, **options)
    return dataclasses.replace(q, codes=q.codes.roll(-1, dims=2))


def with_one_scale(x, role, keys, **options):
    q = in_maps(quantize_rows(x.reshape(1, -1), role, keys[:1], **options), x)
    return dataclasses.replace(q, scale=q.scale.expand(len(x)).contiguous())


def always_nearest(x, role, keys, **options):
    return quantize_rows(x, dataclasses.replace(role, rounding=Rounding.NEAREST), keys, **options)


def without_zero_point(x, role, keys, *, zero_point, kernel):
    q = quantize_rows(x, role, keys, kernel=kernel)
    return dataclasses.replace(q, codes=q.codes.to(torch.uint8), zero_point=zero_point)


@pytest.mark.parametrize(
    "wrong", [by_row_major_position, by_the_next_line, with_one_scale, always_nearest, without_zero_point]
)
def test_wrong_codes_would_be_seen(wrong):
    x = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=CHANNELS_LAST)
    role = RoleFormat(format=INT8, rounding=Rounding.STOCHASTIC)
    assert_quantizes_like_torch(quantize_rows, x, role, 128)
    with pytest.raises(AssertionError):
        assert_quantizes_like_torch(wrong, x, role, 128)


def over_all_elements(x, role, keys, **options):
    clipped = quantize_rows(x.flatten(1), role, keys, **options)
    return in_maps(clipped, x)


def test_a_mean_over_zeros_at_the_end_would_be_seen():
    role = RoleFormat(format=INT8, rounding=Rounding.NEAREST, clip=1.5)
    assert_quantizes_like_torch(over_all_elements, maps_with_zeros(), dataclasses.replace(role, clip=None))
    with pytest.raises(AssertionError):
        assert_quantizes_like_torch(over_all_elements, maps_with_zeros(), role)


# Products and norms


class OnTriton(Reference):
    """A backend of the kernels alone, with codes as int8 or as uint8."""

    name = "triton"

    def __init__(self, zero_point: int = 0, packed=None):
        from dpquant.backends.triton.conv import TritonWeight

        self._zero_point, self._packed = zero_point, packed or TritonWeight

    def quantize(self, x, role, row_keys):
        x = x.contiguous(memory_format=CHANNELS_LAST)
        return quantize_rows(x, role, row_keys, zero_point=self._zero_point)

    def pack(self, weight, geometry, *, max_code):
        return self._packed(weight, geometry, max_code)

    def methods(self, operands):
        from dpquant.backends.triton import norms

        found = []
        if norms.has_code_norms(operands):
            found.append(Method(name="code norms", norms=norms.code_norms, sum=GemmSum))
        if norms.has_value_norms(operands):
            found.append(Method(name="value norms", norms=norms.value_norms, sum=GemmSum))
        return found


CONVOLUTIONS = [
    PLAIN,
    (Geometry(), (70, 40, 1, 1), (1, 1)),  # a linear layer
    (Geometry(stride=(2, 2)), (5, 3, 1, 1), (4, 3)),  # phases without taps
    (Geometry(kernel=(3, 2), stride=(2, 3), padding=(1, 2)), (5, 3, 3, 2), (5, 7)),
    (Geometry(kernel=(3, 3), stride=(3, 2), dilation=(2, 1)), (17, 35, 3, 3), (7, 6)),
    (Geometry(kernel=(2, 3), stride=(1, 2), padding=(3, 0), dilation=(2, 2), groups=2), (4, 3, 2, 3), (5, 7)),
    (Geometry(kernel=(3, 3), stride=(2, 2), padding=(1, 1), groups=3), (3, 1, 3, 3), (6, 5)),  # depthwise
    (Geometry(kernel=(2, 2), stride=(4, 4), dilation=(2, 2)), (3, 2, 2, 2), (8, 3)),  # taps of one phase, far apart
]


@pytest.mark.parametrize("zero_point", [0, 128])
@pytest.mark.parametrize("convolution", CONVOLUTIONS, ids=str)
def test_products_are_exact(convolution, zero_point):
    assert_products_are_exact(OnTriton(zero_point), convolution, 127, DEVICE)


def test_large_sums_are_rounded_once():
    assert_large_sums_are_rounded_once(OnTriton(), 127, DEVICE)


@pytest.mark.parametrize("recipe", ["luq-fp4", "int4-clip"])  # one scale for a weight; one a channel
@pytest.mark.parametrize("convolution", [PLAIN, CONVOLUTIONS[3]], ids=str)
def test_scales_and_bias_have_the_reference_bits(convolution, recipe):
    assert_equals_the_reference(OnTriton(128), convolution, RECIPES[recipe], DEVICE)


def test_no_examples_have_no_products():
    from dpquant.backends.triton.conv import TritonWeight

    weight = TritonWeight(QTensor(codes=codes((5, 3, 3, 3), 7).to(DEVICE), scale=torch.ones(1)), PLAIN[0], 7)
    none = QTensor(codes=torch.empty(0, 3, 6, 6, dtype=torch.int8, device=DEVICE), scale=torch.ones(0, device=DEVICE))
    assert weight.forward(none, None).shape == (0, 5, 6, 6)


class Double:
    """A reference weight with one fault in the forward product."""

    def __init__(self, weight: QTensor, geometry: Geometry, max_code: int):
        self.weight, self.geometry, self.max_code = weight, geometry, max_code

    def plain(self, x: QTensor, bias: Tensor | None, **changes) -> Tensor:
        geometry = changes.pop("geometry", self.geometry)
        weight = dataclasses.replace(self.weight, **changes)
        return ReferenceWeight(weight, geometry, self.max_code).forward(x, bias)

    def forward(self, x, bias):
        return self.plain(x, bias)

    def input_gradient(self, grad, size):
        return ReferenceWeight(self.weight, self.geometry, self.max_code).input_gradient(grad, size)


class PadsWithBytesOfZero(Double):
    def forward(self, x, bias):
        top, left = self.geometry.padding
        x = dataclasses.replace(x, codes=F.pad(x.codes, (left, left, top, top)))
        return self.plain(x, bias, geometry=dataclasses.replace(self.geometry, padding=(0, 0)))


class ScalesTheWrongAxis(Double):
    def forward(self, x, bias):
        scale = self.weight.scale.flip(0)
        return self.plain(x, bias, scale=scale)


class ScalesInAnotherOrder(Double):
    def forward(self, x, bias):
        y = self.plain(dataclasses.replace(x, scale=torch.ones_like(x.scale)), None)
        y = y * x.scale[:, None, None, None]
        return y if bias is None else y + bias[:, None, None]


class ContractsProductAndSum(Double):
    def forward(self, x, bias):
        y = self.plain(dataclasses.replace(x, scale=torch.ones_like(x.scale)), None, scale=torch.ones(1))
        scale = (x.scale[:, None] * self.weight.scale)[:, :, None, None]
        y = y.double() * scale.double()
        return (y if bias is None else y + bias[:, None, None].double()).float()


class SwapsTaps(Double):
    def input_gradient(self, grad, size):
        codes = self.weight.codes.flip(2, 3)
        flipped = dataclasses.replace(self.weight, codes=codes)
        return ReferenceWeight(flipped, self.geometry, self.max_code).input_gradient(grad, size)


def test_the_double_itself_has_the_reference_bits():
    assert_equals_the_reference(OnTriton(128, Double), PLAIN, RECIPES["int4-clip"])
    assert_products_are_exact(OnTriton(128, Double), PLAIN, 127)


@pytest.mark.parametrize("wrong", [ScalesTheWrongAxis, ScalesInAnotherOrder, ContractsProductAndSum])
def test_wrong_scales_would_be_seen(wrong):
    with pytest.raises(AssertionError):
        assert_equals_the_reference(OnTriton(128, wrong), PLAIN, RECIPES["int4-clip"])


@pytest.mark.parametrize("wrong", [PadsWithBytesOfZero, SwapsTaps])
def test_wrong_products_would_be_seen(wrong):
    with pytest.raises(AssertionError):
        assert_products_are_exact(OnTriton(128, wrong), PLAIN, 127)


def test_products_that_int32_cannot_hold_are_refused():
    from dpquant.backends.triton import conv

    most = 133_144  # times 127^2 is at most 2^31 - 1
    assert conv.refusal((1, most, 1, 1), 1, 127) is None and conv.refusal((most, 1, 1, 1), 1, 127) is None
    assert most * 127**2 < 2**31 <= (most + 1) * 127**2
    assert "32 bits" in conv.refusal((1, most + 1, 1, 1), 1, 127)
    assert "32 bits" in conv.refusal((most + 1, 1, 1, 1), 1, 127)  # of the input gradient
    assert conv.refusal((most + 1, 1, 1, 1), most + 1, 127) is None  # of each group
    weight = QTensor(codes=torch.empty(1, 2**15, 3, 3, dtype=torch.int8, device="meta"), scale=torch.ones(1))
    with pytest.raises(FormatError, match="may exceed 32 bits"):
        conv.TritonWeight(weight, Geometry(kernel=(3, 3)), 127)


NORMS = [convolution for convolution in CONVOLUTIONS if convolution[0].groups == 1]
NORMS += [(Geometry(kernel=(2, 2)), (3, 10, 2, 2), (6, 9))]  # more than one block of positions, and of patches


@pytest.mark.parametrize("zero_point", [0, 128])
@pytest.mark.parametrize("convolution", NORMS, ids=str)
def test_norms_of_codes_are_exact(convolution, zero_point):
    from dpquant.backends.triton import norms

    operands = quantized_operands(OnTriton(zero_point), convolution, 127, DEVICE)
    operands = operands.take(torch.arange(2))
    found = norms.code_norms(operands).squares_B.cpu()
    assert found.dtype == torch.float64
    assert torch.equal(found, exact_gradients(operands).square().sum((1, 2, 3, 4)))


def test_what_a_method_sums_has_these_norms():
    backend = OnTriton()
    operands = quantized_operands(backend, PLAIN, 7, DEVICE)
    assert_norms_are_never_below(backend, operands)
    assert_sums_are_exact(backend, operands)


@pytest.mark.parametrize("convolution", NORMS[:4], ids=str)
def test_norms_of_values_are_never_below(convolution):
    assert_norms_are_never_below(OnTriton(), plain_operands(convolution, DEVICE))


def cancelling_operands() -> Operands:
    """Gradients whose terms cancel, so that round-off in float32 is most of what is left."""
    generator = torch.Generator().manual_seed(0)
    x, g = (torch.randn(8, channels, 1, 128, generator=generator).to(DEVICE) for channels in (3, 2))
    x[..., 64:], g[..., 64:] = x[..., :64], -g[..., :64]
    x[..., 64:] *= 1 + 2.0**-23
    return Operands(x=x, g=g, geometry=Geometry())


def many_operands() -> Operands:
    """Gradients of so many examples that round-off in float32 is downwards in some, whatever the order of summation."""
    generator = torch.Generator().manual_seed(0)
    x, g = (torch.randn(64, channels, 1, 128, generator=generator).to(DEVICE) for channels in (3, 2))
    return Operands(x=x, g=g, geometry=Geometry())


def assert_never_below(norms: Callable[[Operands], Norms], operands: Operands) -> None:
    """The squared norms are at least those of the exact gradients of these float32 values."""
    x, g = (t.double().flatten(2).cpu() for t in operands.values)
    squares_B = (g @ x.transpose(1, 2)).square().sum((1, 2))
    assert bool((norms(operands).squares_B.cpu() >= squares_B).all())


def test_norms_of_values_that_cancel_are_never_below():
    from dpquant.backends.triton.norms import value_norms

    assert_never_below(value_norms, cancelling_operands())
    assert_never_below(value_norms, many_operands())
    assert_never_below(value_norms, plain_operands((Geometry(), (4, 3, 1, 1), (8, 9)), DEVICE))


def test_norms_without_a_bound_on_round_off_would_be_seen():
    def in_float32(operands: Operands) -> Norms:
        x, g = (t.flatten(2) for t in operands.values)
        return Norms(squares_B=(g @ x.transpose(1, 2)).double().square().sum((1, 2)))

    with pytest.raises(AssertionError):
        assert_never_below(in_float32, many_operands())


def operands_of_size(positions: int, dtype: torch.dtype = torch.int8, groups: int = 1) -> Operands:
    tensor = torch.empty(1, 2, 1, positions, dtype=dtype, device="meta")
    one = tensor if dtype == torch.float32 else QTensor(codes=tensor, scale=torch.ones(1))
    return Operands(x=one, g=one, geometry=Geometry(groups=groups))


def test_norms_that_would_overflow_and_groups_are_not_offered():
    from dpquant.backends.triton.norms import has_code_norms, has_value_norms

    most = math.isqrt((2**63 - 1) // 32) // 127**2  # a row of 32 squares in int64
    assert has_code_norms(operands_of_size(most)) and not has_code_norms(operands_of_size(most + 1))
    assert not has_code_norms(operands_of_size(4, groups=2)) and not has_code_norms(operands_of_size(4, torch.float32))
    assert not has_code_norms(operands_of_size(4, torch.float8_e4m3fn))
    assert has_value_norms(operands_of_size(most + 1, torch.float32)) and not has_value_norms(operands_of_size(4))
    assert not has_value_norms(operands_of_size(4, torch.float32, groups=2))


# How the kernels are compiled. The interpreter contracts nothing, so the instructions are looked at


def test_kernels_are_launched_without_contraction():
    given = {}

    class Kernel:
        def __getitem__(self, programs):
            return lambda *arguments, **constants: given.update(constants, programs=programs, arguments=arguments)

    x = torch.ones(1, device=DEVICE)
    launch(Kernel(), (2,), x, 3, SIZE=4)
    assert given == {"programs": (2,), "arguments": (x, 3), "SIZE": 4, "enable_fp_fusion": False}


COMPILES = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from dpquant.backends.triton import conv, norms, quantize

def instructions(kernel, pointers, constants):
    named = {name: pointers.get(name, "i32") for name in kernel.arg_names}
    signature = {name: "constexpr" if name in constants else kind for name, kind in named.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    target = GPUTarget("cuda", 80, 32)
    return triton.compile(source, target=target, options={"enable_fp_fusion": FUSION}).asm["ptx"]

pointers = {"x": "*u8", "weight": "*i8", "scale_B": "*fp32", "scale_N": "*fp32", "bias": "*fp32", "y": "*fp32"}
tile = {"POSITIONS": 32, "CHANNELS": 16, "DEPTH": 32}
print(instructions(conv._product_kernel, pointers, {"PER_CHANNEL": True, "ZERO_POINT": 128, **tile}))
pointers = {"x": "*i8", "g": "*u8", "squares": "*fp64"}
tile = {"OUTPUTS": 64, "PATCH": 32, "POSITIONS": 32}
print(instructions(norms._squares_kernel, pointers, {"CODES": True, "ZERO_X": 0, "ZERO_G": 128, **tile}))
pointers = {"x": "*fp32", "row_keys": "*i64", "tops": "*fp32", "codes": "*u8", "scale": "*fp32"}
rule = {"MAP": True, "MAX_CODE": 127.0, "UNIFORM": True, "STOCHASTIC": True, "ZERO_POINT": 128}
print(instructions(quantize._codes_kernel, pointers, {**rule, "LINES": 2, "ELEMENTS": 64}))
pointers = {"x": "*fp32", "largest": "*fp32", "squares": "*i64", "last_lines": "*i32", "last_columns": "*i32"}
print(instructions(quantize._squares_kernel, pointers, {"LINES": 2, "ELEMENTS": 64}))
print(instructions(quantize._largest_kernel, {"x": "*fp32", "largest": "*i32"}, {"LINES": 2, "ELEMENTS": 64}))
"""


def float_instructions(fusion: bool, cache: str) -> set[str]:
    """What is compiled for compute capability 8.0; needs no GPU."""
    told = run_python(f"FUSION = {fusion}\n{COMPILES}", TRITON_CACHE_DIR=cache)
    assert "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32" in told
    return set(re.findall(r"\b(?:add|sub|mul|fma|mad|div|rcp)\.[a-z0-9.]*f32\b", told))


def assert_rounds_each_operation(instructions: set[str]) -> None:
    """Sums and products are rounded one by one, to nearest; division is IEEE; subnormals are kept."""
    assert instructions == {"add.rn.f32", "sub.rn.f32", "mul.rn.f32", "div.rn.f32"}


def test_kernels_compile_to_instructions_that_round_one_by_one(tmp_path):
    assert_rounds_each_operation(float_instructions(False, str(tmp_path)))


def test_contracted_products_would_be_seen(tmp_path):
    with pytest.raises(AssertionError):
        assert_rounds_each_operation(float_instructions(True, str(tmp_path)))
