# SPDX-License-Identifier: Apache-2.0
"""The three products of a convolution, on number codes: forward, input gradient, per-example weight gradient.

Two backends give the same integers. `simulate` multiplies codes as floating-point numbers, on any device: it is the
meaning. `int8` runs the same codes on a CPU's int8 instructions. This is the only file that calls `torch.ops.onednn`;
it knows nothing of scales, layers or privacy. A linear layer is a 1x1 convolution over its positions.

Symbols: B examples, C input channels, O output channels, G groups, H x W input size, K kernel size, T output positions.

Sources: oneDNN's int8 convolution through `torch.ops.onednn.qconv2d_pointwise`, which takes activations as uint8 with a
zero point: a code c in -127..127 travels as c + 128, zero padding included. All scales are 1, so that the int32
accumulator comes out as a float32 and differs from the exact integer only by that one rounding (none below 2^24).
"""

import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from dpquant.backends.geometry import Geometry
from dpquant.backends.quantize import QTensor
from dpquant.backends.workarounds import around_corners, in_one_column, visited
from dpquant.errors import FormatError

BACKENDS = ("auto", "simulate", "int8")
INT8_ZERO_POINT = 128
_FLOAT32_EXACT = 2**24  # every integer up to here is a float32


class Products(Protocol):
    """The two products of one layer's quantized weight, packed once and used for a whole logical batch."""

    def forward(self, x: QTensor) -> Tensor:
        """Accumulators of conv(codes of x, codes of W): float32 `(B, O, H', W')`, unscaled."""
        ...

    def input_gradient(self, grad: QTensor, size: tuple[int, int]) -> Tensor:
        """Accumulators of the transposed convolution of grad's codes: float32 `(B, C, H, W)` with `size` = (H, W)."""
        ...


def code_values(operand: Tensor | QTensor) -> Tensor:
    """The operand's codes as float32 (`(B, ...)`, zero point removed); a plain tensor is returned as it is."""
    if isinstance(operand, Tensor):
        return operand
    values = operand.codes.float()
    return values.sub_(operand.zero_point) if operand.zero_point else values


def _is_slow(operand: Tensor, geometry: Geometry) -> bool:
    """Whether a matrix product takes less time than torch's convolution, which unfolds float64 operands."""
    return geometry.pointwise and operand.dtype == torch.float64


def convolved(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """The convolution itself: `(B, C, H, W)`, `(O, C / G, *kernel)` -> `(B, O, H', W')`, in the operands' dtype."""
    if _is_slow(x, geometry):
        return F.linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)
    x, g = in_one_column(x, geometry, zero=0)
    return F.conv2d(x, weight, bias, g.stride, g.padding, g.dilation, g.groups)


class SimulatedProducts:
    """Codes multiplied as floating-point numbers: exact for integer codes, on every device."""

    def __init__(self, weight: QTensor, geometry: Geometry, max_code: int):
        self._weight = code_values(weight)
        self._geometry = geometry
        self._max_code = max_code  # the largest |code| of weight, activation or gradient; bounds every partial sum

    def forward(self, x: QTensor) -> Tensor:
        dtype = _exact_dtype(x, self._weight[0].numel(), self._max_code)
        return convolved(code_values(x).to(dtype), self._weight.to(dtype), None, self._geometry).float()

    def input_gradient(self, grad: QTensor, size: tuple[int, int]) -> Tensor:
        out_channels_per_group = self._weight.shape[0] // self._geometry.groups
        terms = out_channels_per_group * self._weight[0, 0].numel()
        dtype = _exact_dtype(grad, terms, self._max_code)
        return input_gradient(code_values(grad).to(dtype), self._weight.to(dtype), self._geometry, size).float()


def _exact_dtype(operand: QTensor, num_terms: int, max_code: int) -> torch.dtype:
    """float32 where every partial sum of `num_terms` integer products is one, else float64. fp8 sums in float32."""
    if operand.codes.dtype.is_floating_point or num_terms * max_code**2 <= _FLOAT32_EXACT:
        return torch.float32
    return torch.float64


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


def sides_swapped(weight: Tensor, groups: int) -> Tensor:
    """A weight with input and output channels exchanged: `(O, C / G, *kernel)` as `(C, O / G, *kernel)`, and back."""
    return weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)


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


def input_gradient(grad: Tensor, weight: Tensor, geometry: Geometry, size: tuple[int, int]) -> Tensor:
    """The gradient of a convolution with respect to its input, in the dtype of its operands.

    Args:
      grad: `(B, O, H', W')`.
      weight: `(O, C / G, *kernel)`.
      geometry: of the convolution.
      size: (H, W) of the input.
    Returns: `(B, C, H, W)`.
    """
    if _is_slow(grad, geometry):
        return (grad.permute(0, 2, 3, 1) @ weight.flatten(1)).permute(0, 3, 1, 2)
    shape = (grad.shape[0], weight.shape[1] * geometry.groups, *size)
    x = torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=torch.channels_last)  # for its layout
    return _convolution_backward(grad, x, weight, geometry, geometry.groups, [True, False, False])[0]


def weight_gradient(grad: Tensor, x: Tensor, geometry: Geometry) -> Tensor:
    """The weight gradient summed over the batch: grad `(B, O, H', W')`, x `(B, C, H, W)` -> `(O, C / G, *kernel)`."""
    x, geometry = visited(x, geometry)
    if geometry.pointwise:
        total = grad.transpose(0, 1).flatten(1) @ x.transpose(0, 1).flatten(1).t()
        return total[:, :, None, None]
    shape = (grad.shape[1], x.shape[1] // geometry.groups, *geometry.kernel)
    weight = grad.new_empty(1).expand(shape)
    return _convolution_backward(grad, x, weight, geometry, geometry.groups, [False, True, False])[1]


def patch_products(grad_BGTO: Tensor, patches_BGTD: Tensor) -> Tensor:
    """Each example's own weight gradient, sum_t grad_t patch_t^T, never summed over examples.

    Args:
      grad_BGTO: output gradients by group and position, float32: values or integer codes; from `positions`.
      patches_BGTD: what each position sees, from `unfolded`; likewise.
    Returns: `(B, O, D)` with D in patch order, float32; exact for codes whose sums stay within 2^24.
    """
    return (grad_BGTO.transpose(2, 3) @ patches_BGTD).flatten(1, 2)


def grouped_products(grad: Tensor, x: Tensor, geometry: Geometry) -> Tensor:
    """The same by one convolution whose groups are the examples: `(B, O, C / G, *kernel)`, in weight order."""
    x, geometry = visited(x, geometry)
    batch, channels = len(x), x.shape[1] // geometry.groups
    shape = (batch * grad.shape[1], channels, *geometry.kernel)
    # the examples become channels of one image, which is contiguous only with channels before positions
    grads, xs = (t.contiguous().flatten(0, 1).unsqueeze(0) for t in (grad, x))
    weight = grad.new_empty(1).expand(shape)
    mask = [False, True, False]
    products = _convolution_backward(grads, xs, weight, geometry, batch * geometry.groups, mask)[1]
    return products.unflatten(0, (batch, -1))


def add_patch_products(grad: Tensor, x: Tensor, geometry: Geometry, total: Tensor | None) -> Tensor:
    """The weight gradient summed over the batch and added to a total `(G, O / G, D)`, in patch order, in place."""
    grad_GON = positions(grad, geometry).permute(1, 3, 0, 2).flatten(2)
    patches_GND = unfolded(x, geometry).transpose(0, 1).flatten(1, 2)
    if total is None:
        return grad_GON @ patches_GND
    if geometry.groups == 1:  # a batched product of one is not as fast
        total[0].addmm_(grad_GON[0], patches_GND[0])
        return total
    return total.baddbmm_(grad_GON, patches_GND)


def positions(grad: Tensor, geometry: Geometry) -> Tensor:
    """Output gradients by group and position: `(B, O, H', W')` -> `(B, G, T, O / G)`."""
    return grad.flatten(2).unflatten(1, (geometry.groups, -1)).transpose(2, 3)


@contextlib.contextmanager
def bfloat16_factors() -> Iterator[None]:
    """Until the block ends, float32 matrix products may round their factors to bfloat16; they still sum in float32.

    For factors that are bfloat16 numbers already this changes nothing but the time. A processor that knows no bfloat16
    goes on in float32.
    """
    setting = cast(Any, torch.backends.mkldnn).matmul  # made at run time
    before = setting.fp32_precision
    setting.fp32_precision = "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = before


def in_weight_order(products: Tensor, geometry: Geometry) -> Tensor:
    """`(..., O, D)` with D in patch order (kernel row, kernel column, channel) -> `(..., O, C / G, *kernel)`."""
    return products.unflatten(-1, (*geometry.kernel, -1)).movedim(-1, -3)


def _convolution_backward(grad, x, weight, geometry: Geometry, groups: int, mask: list[bool]):
    g = geometry
    return torch.ops.aten.convolution_backward(
        grad, x, weight, None, g.stride, g.padding, g.dilation, False, [0, 0], groups, mask
    )


def unfolded(x: Tensor, geometry: Geometry) -> Tensor:
    """The input patches that meet each output position: `(B, C, H, W)` -> `(B, G, T, C / G * kernel size)`.

    The order inside a patch is (kernel row, kernel column, channel): see `in_weight_order`.
    """
    (top, left), (down, right), (step_down, step_right) = geometry.padding, geometry.stride, geometry.dilation
    x_BHWC = F.pad(x.permute(0, 2, 3, 1), (0, 0, left, left, top, top)).contiguous()
    batch, height, width, channels = x_BHWC.shape
    rows = (height - geometry.reach[0] - 1) // down + 1
    columns = (width - geometry.reach[1] - 1) // right + 1
    per_group, line = channels // geometry.groups, width * channels
    size = (batch, geometry.groups, rows, columns, *geometry.kernel, per_group)
    steps = (height * line, per_group, down * line, right * channels, step_down * line, step_right * channels, 1)
    patch = math.prod(geometry.kernel) * per_group
    return x_BHWC.as_strided(size, steps).reshape(batch, geometry.groups, rows * columns, patch)


def patch_grams(x: Tensor, geometry: Geometry) -> Tensor:
    """What every two patches share, patches @ patches^T of `unfolded`: `(B, G, T, T)`.

    A sum over taps of what two pixels share, so that pixels meet once and nothing is unfolded.
    """
    (top, left), (down, right), (step_down, step_right) = geometry.padding, geometry.stride, geometry.dilation
    x_BHWC = F.pad(x.permute(0, 2, 3, 1), (0, 0, left, left, top, top))
    batch, height, width = x_BHWC.shape[:3]
    rows = (height - geometry.reach[0] - 1) // down + 1
    columns = (width - geometry.reach[1] - 1) // right + 1
    pixels_BGNC = x_BHWC.flatten(1, 2).unflatten(2, (geometry.groups, -1)).transpose(1, 2)
    grams = (pixels_BGNC @ pixels_BGNC.transpose(2, 3)).contiguous()
    pixels = height * width
    size = (batch, geometry.groups, *geometry.kernel, rows, columns, rows, columns)
    line = down * width, right  # from one position to the next
    tap = step_down * width * (pixels + 1), step_right * (pixels + 1)
    steps = (geometry.groups * pixels**2, pixels**2, *tap, line[0] * pixels, line[1] * pixels, *line)
    by_tap = grams.as_strided(size, steps)
    total = by_tap[:, :, 0, 0].clone()
    for i, j in itertools.product(*map(range, geometry.kernel)):
        if (i, j) != (0, 0):
            total += by_tap[:, :, i, j]
    return total.flatten(4, 5).flatten(2, 3)


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
