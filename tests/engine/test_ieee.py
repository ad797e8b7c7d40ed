# SPDX-License-Identifier: Apache-2.0
"""A norm whose products had rounded inputs would let a contribution exceed the clipping norm; none has.

A GPU rounds the inputs of float32 products to TF32 and a CPU to bfloat16, where the user allows it. Here they are
rounded by hand, in every product, while torch's settings allow it.
"""

import dataclasses

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import dpquant
from processor import preferring
from units import rounded

PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "addmv", "mv", "convolution", "convolution_backward", "_linear_pointwise")


@dataclasses.dataclass(frozen=True)
class Unit:
    """Rounds inputs to `bits` bits after the leading one, where a setting has this value."""

    bits: int
    matmul: object
    conv: object
    value: str


UNITS = {
    "tf32": Unit(10, torch.backends.cuda.matmul, torch.backends.cudnn.conv, "tf32"),
    "bf16": Unit(7, torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv, "bf16"),
}


class Rounding(TorchDispatchMode):
    """Rounds the inputs of products as a unit does."""

    def __init__(self, unit: Unit, *, always: bool = False):
        super().__init__()
        self._unit, self._always, self.seen = unit, always, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__.rstrip("_")
        if name in PRODUCTS:
            place = self._unit.conv if name.startswith("convolution") else self._unit.matmul
            if self._always or place.fp32_precision == self._unit.value:
                self.seen.add(name)
                added = 1 if name.startswith(("add", "badd")) else 0  # what a product is added to is not rounded
                args = (*args[:added], *map(self._rounded, args[added:]))
        return function(*args, **(kwargs or {}))

    def _rounded(self, value):
        if isinstance(value, Tensor) and value.dtype == torch.float32:
            return rounded(value.contiguous(), self._unit.bits).view(value.shape)
        return value


class Adversary(nn.Module):
    """One layer on inputs that lose the most by rounding; its output's gradient gains the most, or loses it."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, batch):
        return self.layer(batch)


def just_below_half_a_unit(shape, unit: Unit) -> Tensor:
    """Values that are rounded down by nearly half a unit of the last of `bits` bits."""
    return torch.full(shape, 1 + 2.0 ** -(unit.bits + 1) - 2.0**-22)


LAYERS = {
    "linear over positions": (lambda: nn.Linear(6, 5, bias=False), (4, 3, 6)),
    "a wide linear layer over positions": (lambda: nn.Linear(256, 256, bias=False), (2, 64, 256)),
    "convolution": (lambda: nn.Conv2d(3, 4, 3, padding=1, bias=False), (4, 3, 5, 5)),
    "a module without a formula": (lambda: nn.Conv1d(3, 4, 3, bias=False), (4, 3, 7)),
}


def contributions(layer, unit: Unit, method: str, *, always: bool) -> tuple[float, set[str]]:
    """The largest norm of an example's contribution to the sum, clipped to 1, and the products that were rounded."""
    make, shape = LAYERS[layer]
    model = dpquant.prepare(Adversary(make()), format="luq-fp4")
    x = just_below_half_a_unit(shape, unit)

    def loss_fn(model, batch):
        y = model(batch)
        return (y * just_below_half_a_unit(y.shape, unit)).flatten(1).sum(1)

    largest = 0.0
    with preferring(method), Rounding(unit, always=always) as rounding:
        for i in range(len(x)):
            ids = torch.tensor([i])
            scaled = x[[i]] * (1 + i / 7)
            out = dpquant.clipped_sum(
                model, loss_fn, scaled, max_grad_norm=1.0, record_ids=ids, step=0, seed=0, microbatch_size=1
            )
            largest = max(largest, float(sum(g.double().square().sum() for g in out.grads.values())) ** 0.5)
    return largest, rounding.seen


@pytest.fixture(params=UNITS)
def unit(request):
    """A unit whose rounding the user has allowed; the settings are restored."""
    one = UNITS[request.param]
    before = one.matmul.fp32_precision, one.conv.fp32_precision
    one.matmul.fp32_precision = one.conv.fp32_precision = one.value
    yield one
    one.matmul.fp32_precision, one.conv.fp32_precision = before


CASES = [
    ("linear over positions", "grams"),
    ("linear over positions", "patches"),
    ("a wide linear layer over positions", "grams"),
    ("convolution", "grams"),
    ("convolution", "groups"),
    ("a module without a formula", ""),
]


@pytest.mark.parametrize(("layer", "method"), CASES)
def test_no_contribution_exceeds_the_clipping_norm_whatever_the_user_allows(layer, method, unit):
    largest, seen = contributions(layer, unit, method, always=False)
    assert seen  # the passes themselves are rounded, as the user allows
    assert 0.99 < largest <= 1 + 1e-6


@pytest.mark.parametrize(("layer", "method"), CASES)
def test_a_norm_of_rounded_products_is_caught(layer, method, unit):
    """A unit that does not listen is a guard that is missing."""
    largest, _ = contributions(layer, unit, method, always=True)
    assert largest > 1 + 1e-6
