# SPDX-License-Identifier: Apache-2.0
"""The products of a convolution of number codes on a CPU's int8 instructions, and whether they are exact here.

This is the only file that calls `torch.ops.onednn`. It gives the integers that `reference.SimulatedProducts` gives.

Symbols: B examples, C input channels, O output channels, G groups, H x W input size.

Sources: oneDNN's int8 convolution through `torch.ops.onednn.qconv2d_pointwise`, which takes activations as uint8 with a
zero point: a code c in -127..127 travels as c + 128, zero padding included. All scales are 1, so that the int32
accumulator comes out as a float32 and differs from the exact integer only by that one rounding (none below 2^24).
"""

import dataclasses
import functools
import itertools

import torch
from torch import Tensor

from dpquant.backends.geometry import Geometry
from dpquant.backends.qtensor import QTensor
from dpquant.backends.reference import SimulatedProducts, sides_swapped
from dpquant.backends.workarounds import around_corners
from dpquant.errors import FormatError

BACKENDS = ("auto", "simulate", "int8")
INT8_ZERO_POINT = 128


class Int8Products:
    """The same codes on int8 instructions; the weight is packed for each product on first use."""

    def __init__(self, weight: QTensor, geometry: Geometry):
        self._weight = _Int8Weight(weight.codes)
        self._geometry = geometry
        self._taps: dict[tuple[_Phase, _Phase], _Int8Weight] = {}

    def forward(self, x: QTensor) -> Tensor:
        return self._weight.convolved(x.codes, self._geometry)

    def input_gradient(self, grad: QTensor, size: tuple[int, int]) -> Tensor:
        """Convolutions of the gradient with the transposed kernel, or with those of its taps that meet."""
        if self._geometry.stride != (1, 1) and self._geometry.dilation == (1, 1):
            return self._by_phases(grad.codes, size)
        return self._by_stuffing(grad, size)

    def _by_phases(self, codes: Tensor, size: tuple[int, int]) -> Tensor:
        """Input positions of one phase (row and column modulo the stride) meet the same taps: one convolution each."""
        stride, padding = self._geometry.stride, self._geometry.padding
        channels = self._geometry.groups * self._weight.codes.shape[1]
        phases = list(itertools.product(*map(_phases, self._geometry.kernel, stride, padding, size)))
        full = torch.empty(len(codes), channels, *size, memory_format=torch.channels_last)
        if len(phases) < min(stride[0], size[0]) * min(stride[1], size[1]):
            full.zero_()  # some positions meet no tap
        for rows, columns in phases:
            if (rows, columns) not in self._taps:
                self._taps[rows, columns] = _Int8Weight(self._swapped[:, :, rows.taps][..., columns.taps].contiguous())
            # what does not lie inside of the gradient on one side is padded on both: the other side's is cut off
            pad = rows.padding(codes.shape[2]), columns.padding(codes.shape[3])
            geometry = Geometry(kernel=(len(rows.taps), len(columns.taps)), padding=pad, groups=self._geometry.groups)
            part = self._taps[rows, columns].convolved(codes, geometry)
            top, left = rows.first + pad[0], columns.first + pad[1]
            full[:, :, rows.phase :: stride[0], columns.phase :: stride[1]] = part[
                :, :, top : top + rows.count, left : left + columns.count
            ]
        return full

    def _by_stuffing(self, grad: QTensor, size: tuple[int, int]) -> Tensor:
        """A convolution of the zero-stuffed gradient with the flipped, transposed kernel."""
        g, reach = self._geometry, self._geometry.reach
        padding = (max(reach[0] - g.padding[0], 0), max(reach[1] - g.padding[1], 0))
        crop = (max(g.padding[0] - reach[0], 0), max(g.padding[1] - reach[1], 0))
        stuffed = (size[0] + crop[0] + reach[0] - 2 * padding[0], size[1] + crop[1] + reach[1] - 2 * padding[1])
        codes = _zero_stuffed(grad.codes, g.stride, stuffed)
        full = self._transposed.convolved(codes, dataclasses.replace(g, stride=(1, 1), padding=padding))
        return full[:, :, crop[0] : crop[0] + size[0], crop[1] : crop[1] + size[1]]

    @functools.cached_property
    def _swapped(self) -> Tensor:
        return sides_swapped(self._weight.codes, self._geometry.groups)

    @functools.cached_property
    def _transposed(self) -> "_Int8Weight":
        return _Int8Weight(self._swapped.flip(2, 3).contiguous())


@dataclasses.dataclass(frozen=True)
class _Phase:
    """Along one axis: input position phase + stride * m gets sum_k gradient[m + first + k] * kernel[taps[k]]."""

    phase: int
    count: int  # of positions m
    taps: tuple[int, ...]
    first: int

    def padding(self, length: int) -> int:
        """How many zeros are needed on either side of a gradient of `length`."""
        last = self.count - 1 + self.first + len(self.taps) - 1
        return max(-self.first, last - (length - 1), 0)


def _phases(kernel: int, stride: int, padding: int, size: int) -> list[_Phase]:
    """The phases of an axis that meet any tap, for an input of `size`."""
    found = []
    for phase in range(min(stride, size)):
        # tap i of gradient position u meets input position stride * u - padding + i
        taps = tuple(i for i in reversed(range(kernel)) if (phase + padding - i) % stride == 0)
        if taps:
            count = (size - phase + stride - 1) // stride
            found.append(_Phase(phase, count, taps, (phase + padding - taps[0]) // stride))
    return found


class _Int8Weight:
    """Weight codes `(O, C / G, *kernel)`, packed as oneDNN wants them for each geometry that they meet."""

    def __init__(self, codes: Tensor):
        self.codes = codes
        self._scales = torch.ones(codes.shape[0])
        self._zero_points = torch.zeros(codes.shape[0], dtype=torch.int8)
        self._packed: dict[Geometry, Tensor] = {}

    def convolved(self, codes: Tensor, geometry: Geometry) -> Tensor:
        """uint8 codes (zero point 128) `(B, C, H, W)` -> float32 accumulators `(B, O, H', W')`, channels last."""
        codes, g = around_corners(codes, geometry, zero=INT8_ZERO_POINT)
        if g not in self._packed:
            self._packed[g] = torch.ops.onednn.qconv_prepack(
                self.codes, self._scales, 1.0, INT8_ZERO_POINT, g.stride, g.padding, g.dilation, g.groups, None
            )
        return torch.ops.onednn.qconv2d_pointwise(
            codes, 1.0, INT8_ZERO_POINT, self._packed[g], self._scales, self._zero_points, None,
            g.stride, g.padding, g.dilation, g.groups, 1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip


def _zero_stuffed(codes: Tensor, stride: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Codes spread `stride` apart on a plane of `size` that holds the code of zero elsewhere."""
    if stride == (1, 1) and codes.shape[2:] == size:
        return codes
    plane = torch.full((*codes.shape[:2], *size), INT8_ZERO_POINT, dtype=codes.dtype)
    plane = plane.contiguous(memory_format=torch.channels_last)
    slots = plane[:, :, :: stride[0], :: stride[1]]
    rows, columns = min(slots.shape[2], codes.shape[2]), min(slots.shape[3], codes.shape[3])
    slots[:, :, :rows, :columns] = codes[:, :, :rows, :columns]
    return plane


def int8_is_exact(max_code: int) -> bool:
    """Whether this machine's int8 convolution gives the exact integers for codes up to `max_code`, forward and back."""
    return flaw_of_int8(max_code) is None


@functools.cache
def flaw_of_int8(max_code: int) -> str | None:
    """What this machine's int8 convolution does instead of giving the exact integers for codes up to `max_code`.

    A processor without the right instructions, or told not to use them, may saturate full-range products (the pairs of
    a 16-bit accumulator), so the check uses the largest codes, not random ones. Run once a process and code range.

    Returns: None if they are exact, forward and back.
    """
    try:
        generator = torch.Generator().manual_seed(0)
        geometry = Geometry(kernel=(3, 3), stride=(2, 2), padding=(1, 1))
        signs = torch.randint(0, 2, (2, 64, 9, 9), generator=generator).mul_(2).sub_(1)
        x = QTensor(codes=(signs * max_code).to(torch.int8), scale=torch.ones(2))
        weight = QTensor(codes=torch.full((32, 64, 3, 3), max_code, dtype=torch.int8), scale=torch.ones(1))
        grad = QTensor(codes=x.codes[:, :32, :5, :5].contiguous(), scale=x.scale)
        exact, fast = SimulatedProducts(weight, geometry, max_code), Int8Products(weight, geometry)
        forward = torch.equal(fast.forward(_with_zero_point(x)), exact.forward(x))
        backward = torch.equal(fast.input_gradient(_with_zero_point(grad), (9, 9)), exact.input_gradient(grad, (9, 9)))
    except (RuntimeError, AttributeError) as error:  # no such operator in this torch, or none for this processor
        first_line = str(error).partition("\n")[0].rstrip(".")
        return f"does not run ({type(error).__name__}: {first_line})"
    return None if forward and backward else f"is not exact for codes up to {max_code}"


def _with_zero_point(x: QTensor) -> QTensor:
    codes = (x.codes.to(torch.int16) + INT8_ZERO_POINT).to(torch.uint8).contiguous(memory_format=torch.channels_last)
    return QTensor(codes=codes, scale=x.scale, zero_point=INT8_ZERO_POINT)


def obstacle_to_int8(*, max_code: int, fits_int8: bool, device: torch.device) -> str | None:
    """Why backend `int8` cannot run a recipe here; None if it can. Arguments as of `resolve_backend`."""
    if not fits_int8:
        return "the recipe's codes are not int8"
    if device.type != "cpu":
        return f"the model is on {device}"
    if flaw := flaw_of_int8(max_code):
        return f"this processor's int8 convolution {flaw}"
    return None


def resolve_backend(backend: str, *, max_code: int, fits_int8: bool, device: torch.device) -> str:
    """`simulate` or `int8`: what `backend` means for this recipe on this machine.

    Args:
      backend: one of `BACKENDS`.
      max_code: the largest |code| of the recipe.
      fits_int8: whether all of the recipe's codes are int8.
      device: where the model lives.
    Raises:
      FormatError: the backend is unknown, or `int8` was asked for and cannot give exact results here.
    """
    if backend not in BACKENDS:
        raise FormatError(f"Expected backend to be one of {', '.join(BACKENDS)}; got backend={backend!r}.")
    if backend == "simulate":
        return "simulate"
    obstacle = obstacle_to_int8(max_code=max_code, fits_int8=fits_int8, device=device)
    if backend == "int8" and obstacle is not None:
        raise FormatError(
            f"Expected a recipe, device and processor that run int8 exactly; got backend='int8', but {obstacle}. "
            "A wrong product would silently change the training. Use backend='simulate' or backend='auto'."
        )
    return "simulate" if obstacle else "int8"
