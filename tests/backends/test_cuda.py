# SPDX-License-Identifier: Apache-2.0
"""The backend for GPUs takes no unit that is not exact, takes the fastest of the others, and says what it left out.

On a machine without a GPU its units are stand-ins on the CPU (`units.py`). That its products are exact on them is
tested with all backends, in `test_conformance.py`.
"""

import dataclasses
import re
import subprocess
import sys

import pytest
import torch

from conformance import (
    PLAIN,
    assert_norms_are_never_below,
    assert_products_are_exact,
    assert_refusals_are_told,
    assert_sums_are_exact,
    integers,
    plain_operands,
    quantized_operands,
    whole,
)
from convolutions import codes, exactly
from dpquant.backends import triton
from dpquant.backends.carriers import BF16, CARRIERS, Carrier, flaw_of, flaw_of_convolution, random_codes
from dpquant.backends.choose import Choices, Machine
from dpquant.backends.cuda import CarriedSum, Cuda
from dpquant.backends.gemm_sum import GemmSum
from dpquant.backends.geometry import Geometry
from dpquant.backends.qtensor import QTensor
from dpquant.backends.reference import ReferenceWeight
from dpquant.backends.registry import BACKENDS, reason_for, resolve
from dpquant.errors import FormatError
from dpquant.formats import precision
from processor import CPU, of_integers, preferring
from units import (
    BEYOND_4096,
    BF16_HERE,
    EXACT,
    HOPPERS,
    INT8_HERE,
    MISSING,
    OF_23_BITS,
    TF32_HERE,
    WINOGRADS,
    backend_of,
    here,
    taking_turns,
)

STRIDED = (Geometry(kernel=(3, 2), stride=(2, 1), padding=(1, 1), groups=2), (6, 3, 3, 2), (7, 6))

# ---------------------------------------------------------------------------------------------- what is exact, is found


@pytest.mark.parametrize("carrier", EXACT, ids=lambda carrier: carrier.name)
@pytest.mark.parametrize("max_code", [7, 15, 64, 127])
@pytest.mark.parametrize("terms", [16, 1024, 8192])
def test_a_unit_that_is_exact_is_found_to_be(carrier, max_code, terms):
    assert (flaw_of(carrier, CPU, max_code, terms) is None) == (max_code <= carrier.max_code)


@pytest.mark.parametrize(
    ("carrier", "max_code", "exact", "wrong"),
    [
        (HOPPERS, 15, 64, 1024),  # 14 bits hold 64 products of 15 by 15
        (BEYOND_4096, 7, 4096, 8192),
        (OF_23_BITS, 127, 512, 1024),
        (OF_23_BITS, 64, 2048, 4096),
    ],
    ids=["hopper", "beyond 4096", "23 bits", "23 bits, e3m0"],
)
def test_a_unit_is_found_out_at_the_length_from_which_it_is_wrong(carrier, max_code, exact, wrong):
    assert flaw_of(carrier, CPU, max_code, exact) is None
    assert flaw_of(carrier, CPU, max_code, wrong) == f"is not exact for codes up to {max_code} over {wrong} terms"


def test_random_codes_alone_would_not_find_a_unit_out_that_is_wrong_for_the_greatest_sums():
    assert flaw_of(OF_23_BITS, CPU, 127, 1024) is not None
    assert flaw_of(OF_23_BITS, CPU, 127, 1024, (random_codes,)) is None


def test_powers_of_two_alone_would_not_find_a_short_accumulator_out():
    def largest_powers(length, max_code):
        return torch.full((1, length), 16, dtype=torch.int8)

    assert flaw_of(HOPPERS, CPU, 16, 1024) is not None
    assert flaw_of(HOPPERS, CPU, 16, 1024, (largest_powers,)) is None


def test_a_unit_that_is_missing_is_told_in_one_clause():
    assert flaw_of(MISSING, CPU, 7, 16) == "does not run (NotImplementedError: Could not run it)"


def test_a_unit_of_a_gpu_does_not_run_on_a_cpu():
    assert flaw_of(BF16, CPU, 7, 16) == "needs a device of type cuda"


# -------------------------------------------------------------------------------------- what is not exact, is not taken


def assert_is_never_taken(carrier, words, backend_of=backend_of):
    """Beside an exact unit it is not used for a long product, and the record says why; alone, it is refused."""
    beside, alone = backend_of(carrier, INT8_HERE), backend_of(carrier)
    chosen = of_integers(127)
    assert alone.refusal(chosen, CPU) == f"no unit of this device multiplies its codes exactly ({carrier.name} {words})"
    with pytest.raises(FormatError, match=re.escape(words)):
        resolve(alone, [chosen], CPU)
    assert beside.exactness(chosen, CPU) == f"exact on int8 (not used: {carrier.name} {words})"
    asked: set[str] = set()
    with preferring(carrier.name, asked):
        assert_worst_sums_are_exact(beside)
    assert asked <= {"int8"}  # one way is taken without being timed


@pytest.mark.parametrize(
    ("carrier", "words"),
    [
        (OF_23_BITS, "is not exact for codes up to 127 over 1024 terms"),
        (MISSING, "does not run"),
        (HOPPERS, "holds codes up to 16 only"),
    ],
    ids=["23 bits", "missing", "hopper"],
)
def test_a_unit_with_a_flaw_is_never_taken(carrier, words):
    reason = flaw_of(carrier, CPU, 127, 1024)
    assert reason is not None and reason.startswith(words)
    assert_is_never_taken(carrier, reason)
    assert_refusals_are_told(backend_of(carrier))


class Credulous(Cuda):
    """Takes every unit for exact."""

    def _exact(self, device, max_code, terms):
        return list(self._carriers)


def credulous(*carriers):
    return Credulous(carriers, device_type="cpu")


def test_a_backend_that_takes_an_inexact_unit_is_caught():
    with pytest.raises(AssertionError):
        assert_is_never_taken(OF_23_BITS, "is not exact for codes up to 127 over 1024 terms", credulous)
    with pytest.raises(AssertionError):
        assert_worst_sums_are_exact(credulous(OF_23_BITS))
    assert_worst_sums_are_exact(backend_of(OF_23_BITS))  # which falls back to float64


def assert_worst_sums_are_exact(backend):
    """Sums of 1,024 products of the largest codes."""
    geometry, weight = Geometry(), torch.full((3, 1024, 1, 1), 127, dtype=torch.int8)
    x = integers(backend, (2, 1024, 1, 2), 127, CPU, 0)
    x.codes.fill_(127)
    packed = backend.pack(whole(weight, CPU), geometry, max_code=127)
    assert torch.equal(packed.forward(x, None).double(), exactly(x.codes, weight, geometry))


def test_where_no_unit_is_exact_for_a_length_products_are_in_float64():
    backend = backend_of(BEYOND_4096)
    assert backend.refusal(of_integers(7), CPU) is None
    assert [one.name for one in backend.exact(CPU, 7, 4096)] == ["bf16"]
    assert [one.name for one in backend.exact(CPU, 7, 4097)] == ["float64"]
    assert_products_are_exact(backend, (Geometry(), (3, 5000, 1, 1), (1, 2)), 7)


def test_a_convolution_that_is_not_exact_is_not_taken_and_its_unit_is():
    asked: set[str] = set()
    with preferring("tf32 convolution", asked):
        assert_products_are_exact(backend_of(WINOGRADS, INT8_HERE), PLAIN, 7)
    assert asked == {"tf32", "int8"}
    with preferring("tf32 convolution", asked):
        assert_products_are_exact(backend_of(TF32_HERE, INT8_HERE), PLAIN, 7)
    assert asked == {"tf32", "int8", "tf32 convolution"}
    with pytest.raises(AssertionError):
        assert_the_convolution_is_exact(WINOGRADS)
    assert_the_convolution_is_exact(TF32_HERE)


def assert_the_convolution_is_exact(carrier):
    geometry, shape, size = PLAIN
    x, weight = codes((2, 3, *size), 7), codes(shape, 7, 1)
    found = carrier.exact_convolution(x, weight, geometry, 7)
    assert torch.equal(found.double(), exactly(x, weight, geometry))
    assert flaw_of_convolution(carrier, INT8_HERE, CPU, 7, (x.shape, weight.shape), geometry) is None


# --------------------------------------------------------------------------------------------- every way gives the same


@pytest.mark.parametrize("way", ["tf32", "bf16", "int8", "fp8", "tf32 convolution"])
@pytest.mark.parametrize("convolution", [PLAIN, STRIDED], ids=["plain", "strided"])
def test_every_way_is_exact_and_is_one_of_those_that_are_timed(way, convolution):
    asked: set[str] = set()
    backend = backend_of(*EXACT)
    with preferring(way, asked):
        assert_products_are_exact(backend, convolution, 7)
        operands = quantized_operands(backend, convolution, 7, CPU)
        assert_norms_are_never_below(backend, operands)
        assert_sums_are_exact(backend, operands)
    assert way in asked


@pytest.mark.parametrize("carrier", [TF32_HERE, INT8_HERE], ids=lambda carrier: carrier.name)
def test_long_sums_are_added_up_from_pieces(carrier):
    """1,040 terms of int8 fit in float32; channels are cut for a convolution, patches for a matrix product."""
    with taking_turns():
        assert_products_are_exact(backend_of(carrier), (Geometry(kernel=(3, 3)), (2, 260, 3, 3), (4, 4)), 127)


class Hasty(Carrier):
    """Adds up the pieces of a long sum in float32."""

    def exact_products(self, a, b, max_code):
        step = self.most_terms(max_code)
        return sum(self.products(*piece) for piece in zip(a.split(step, 2), b.split(step, 1), strict=True))


def assert_long_products_are_rounded_once(carrier):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(100, 128, shape, generator=generator) for shape in ((1, 16, 9000), (1, 9000, 16)))
    assert torch.equal(carrier.exact_products(a.to(torch.int8), b.to(torch.int8), 127), (a @ b).float())


def test_pieces_that_are_rounded_one_by_one_would_be_seen():
    hasty = Hasty(**{field.name: getattr(BF16_HERE, field.name) for field in dataclasses.fields(Carrier)})
    assert_long_products_are_rounded_once(BF16_HERE)
    with pytest.raises(AssertionError):
        assert_long_products_are_rounded_once(hasty)


def test_sums_run_on_bfloat16_units_where_they_are_exact():
    operands = quantized_operands(backend_of(*EXACT), PLAIN, 7, CPU)
    for carriers, kind in (((BF16_HERE, INT8_HERE), CarriedSum), ((OF_23_BITS, INT8_HERE), GemmSum)):
        for method in backend_of(*carriers).methods(operands):
            assert isinstance(method.sum(operands), kind)


# ------------------------------------------------------------------------------------------- where it is taken, and why


# ------------------------------------------------------------------------------------------------- kernels of our own


needs_triton = pytest.mark.skipif(triton.refusal(CPU) is not None, reason="triton's interpreter does not run here")


@needs_triton
@pytest.mark.parametrize("layout", ["carriers", "kernel"])
def test_a_weight_has_a_layout_for_the_kernel_and_either_gives_the_references_bits(layout):
    geometry, shape, size = Geometry(kernel=(3, 2), stride=(2, 1), padding=(1, 1)), (5, 3, 3, 2), (5, 4)
    weight = QTensor(codes=codes(shape, 64), scale=torch.tensor([0.25]))
    x = QTensor(codes=codes((2, 3, *size), 64), scale=torch.tensor([0.5, 3.0]))
    exact, asked = ReferenceWeight(weight, geometry, 64), set()
    with preferring(layout, asked):
        found = backend_of(BF16_HERE, kernels=True).pack(weight, geometry, max_code=64)
        y = found.forward(x, torch.arange(5.0))
        grad = QTensor(codes=codes(tuple(y.shape), 64), scale=x.scale)
        back = found.input_gradient(grad, size)
    assert {"carriers", "kernel"} <= asked
    assert torch.equal(y, exact.forward(x, torch.arange(5.0))) and torch.equal(back, exact.input_gradient(grad, size))


@needs_triton
def test_without_kernels_there_is_one_layout():
    asked = set()
    with preferring("kernel", asked):
        found = backend_of(BF16_HERE).pack(
            QTensor(codes=codes((5, 3, 1, 1), 64), scale=torch.ones(1)), Geometry(), max_code=64
        )
        found.forward(QTensor(codes=codes((2, 3, 2, 2), 64), scale=torch.ones(2)), None)
    assert "kernel" not in asked


@needs_triton
def test_norms_of_codes_and_of_values_have_a_kernel_each():
    backend = backend_of(BF16_HERE, kernels=True)
    small = (Geometry(kernel=(2, 2)), (3, 2, 2, 2), (3, 3))
    for operands, name in (
        (quantized_operands(backend, small, 7, CPU), "code norms"),
        (plain_operands(small, CPU), "value norms"),
    ):
        assert backend.methods(operands)[0].name == name
        assert_norms_are_never_below(backend, operands)


def test_on_a_cpu_it_is_refused_and_never_chosen():
    chosen = precision("luq-fp4")
    assert BACKENDS["cuda"].refusal(chosen, CPU) == "the model is on cpu"
    assert resolve("auto", [chosen], CPU).name != "cuda"
    with pytest.raises(FormatError, match="got backend='cuda', but the model is on cpu"):
        resolve("cuda", [chosen], CPU)
    assert "cpu" not in reason_for(resolve("auto", [chosen], CPU), [chosen], CPU)


def test_on_a_gpu_the_reason_of_simulation_is_that_of_the_backend_for_gpus():
    """The other one's, that the model is on another device, would say nothing."""
    device = torch.device("cuda", 0)
    refused = precision("fp8")
    assert reason_for(BACKENDS["simulate"], [refused], device) == "the recipe's codes are not int8"
    assert BACKENDS["int8"].refusal(precision("luq-fp4"), device) == "the model is on cuda:0"


def test_a_device_too_old_for_a_unit_is_told():
    old = here(BF16, capability=(99, 0))
    assert old.refusal(CPU) is None  # capabilities are those of GPUs
    assert [one.refusal(torch.device("meta")) for one in CARRIERS] == ["needs a device of type cuda"] * len(CARRIERS)


def test_decisions_of_convolutions_are_remembered():
    choices = Choices(timed=lambda ways: dict.fromkeys(ways, 1.0), machine=Machine(None))
    with choices.active():
        assert_products_are_exact(backend_of(TF32_HERE, INT8_HERE), PLAIN, 7)
    kept = {key: answer for key, answer in choices.made.items() if "convolution of codes" in key}
    assert kept and set(kept.values()) == {"tf32"} and all("'int8'" in key for key in kept)


def test_help_loads_no_torch():
    program = "import sys; from dpquant.runs.ranges import BACKENDS as b; print('cuda' in b, 'torch' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert told.stdout.split() == ["True", "False"]
