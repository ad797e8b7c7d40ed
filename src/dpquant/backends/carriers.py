# SPDX-License-Identifier: Apache-2.0
"""Carriers: units of a GPU that multiply codes exactly, and the check that they do on this device.

A tensor core multiplies numbers of a type that carries the codes: float32 rounded to TF32, bfloat16, int8 or float8.
Codes are integers, and so are all partial sums. A unit that holds every integer up to S loses nothing while |partial
sum| <= S, which is so for at most S / max_code^2 terms. Longer products are added up from pieces:

    float32 accumulator, S = 2^24      E3M0 (64)   4,096 terms     INT8 (127)   1,040     INT4+ (15)    74,565
    int32, S = 2^31 - 1                          524,287                      133,144                9,544,371

Whether a device's unit holds them is not looked up: `flaw_of` multiplies codes with the greatest partial sums, and
random ones, and compares with float64. A carrier that fails is not used (e4m3 on Hopper keeps 14 bits), and the record
says so.

Symbols: N products, M rows, K terms, L columns.

Sources: of the bits that units keep, arXiv 2512.07004; of what the operators take, their documentation in torch 2.14.
To add a carrier (a kernel of one's own, for instance), add a `Carrier` to `CARRIERS`; if it
convolves codes without im2col, give it a `convolution`.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from dpquant.backends.algebra import convolved, im2col
from dpquant.backends.geometry import Geometry
from dpquant.backends.precision import tf32_float32

Unit = Callable[[Tensor, Tensor], Tensor]
Convolution = Callable[[Tensor, Tensor, Geometry], Tensor]

_ROWS = 64  # of the products by which a carrier is checked, and their columns


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Carrier:
    """A unit of a GPU that multiplies codes.

    Attributes:
      name: identifies the carrier in saved choices and in records.
      dtype: of the operands, which hold every integer up to `max_code`.
      max_code: the largest |code| that the operands hold.
      largest_sum: partial sums up to it are exact, if the unit is what it is said to be.
      unit: multiplies operands of `dtype`, `(N, M, K)` and `(N, K, L)`, to float32 or int32 `(N, M, L)`.
      convolution: convolves operands of `dtype` to float32, as `algebra.convolved`; None: only by im2col and `unit`.
      capability: least compute capability of a device that has the unit.
      multiple: K and L are multiples of it; operands are padded with zeros.
      least_rows: M is at least this; the first operand is padded.
      columns_first: `unit` takes the second operand column by column in memory.
      device_type: of the devices that have it; `cpu` for stand-ins in tests.
    """

    name: str
    dtype: torch.dtype
    max_code: int
    largest_sum: int
    unit: Unit
    convolution: Convolution | None = None
    capability: tuple[int, int] = (0, 0)
    multiple: int = 1
    least_rows: int = 1
    columns_first: bool = False
    device_type: str = "cuda"

    def refusal(self, device: torch.device) -> str | None:
        """Return the reason why a device does not have the unit, in words that complete a sentence; None if it may."""
        if device.type != self.device_type:
            return f"needs a device of type {self.device_type}"
        if device.type == "cuda" and torch.cuda.get_device_capability(device) < self.capability:
            return "needs compute capability {}.{}".format(*self.capability)
        return None

    def most_terms(self, max_code: int) -> int:
        """Return the number of products of codes up to `max_code` whose sum is exact."""
        return self.largest_sum // max_code**2

    def products(self, a: Tensor, b: Tensor) -> Tensor:
        """Multiply codes `(N, M, K)` by codes `(N, K, L)`, of any type, to float32 or int32 `(N, M, L)`."""
        rows, terms, columns = a.shape[1], a.shape[2], b.shape[2]
        more_terms, more_columns = -terms % self.multiple, -columns % self.multiple
        more_rows = max(self.least_rows - rows, 0)
        if more_terms or more_rows:
            a = F.pad(a, (0, more_terms, 0, more_rows))
        if more_terms or more_columns:
            b = F.pad(b, (0, more_columns, 0, more_terms))
        if self.columns_first:
            b = b.transpose(1, 2).contiguous().transpose(1, 2)
        product = self.unit(a.to(self.dtype), b.to(self.dtype))
        return product[:, :rows, :columns] if more_rows or more_columns else product

    def exact_products(self, a: Tensor, b: Tensor, max_code: int) -> Tensor:
        """Multiply codes up to `max_code` as `products` does, to the exact integers, rounded once to float32."""
        terms, step = a.shape[2], self.most_terms(max_code)
        if terms <= step:
            return self.products(a, b).float()
        pieces = zip(a.split(step, 2), b.split(step, 1), strict=True)
        return _added_up(self.products(*piece) for piece in pieces)

    def exact_convolution(self, codes: Tensor, weight: Tensor, geometry: Geometry, max_code: int) -> Tensor:
        """Convolve codes as `algebra.convolved` does, to the exact integers, rounded once; see `can_convolve`."""
        assert self.convolution is not None
        step = self._channels(geometry, max_code)
        if weight.shape[1] <= step:
            return self.convolution(codes.to(self.dtype), weight.to(self.dtype), geometry)
        layout = torch.channels_last
        pieces = (
            (some.contiguous(memory_format=layout).to(self.dtype), part.contiguous(memory_format=layout).to(self.dtype))
            for some, part in zip(codes.split(step, 1), weight.split(step, 1), strict=True)
        )
        convolution = self.convolution
        return _added_up(convolution(some, part, geometry) for some, part in pieces)

    def can_convolve(self, channels: int, geometry: Geometry, max_code: int) -> bool:
        """Return whether sums over this many channels of a group can be exact, added up from several if need be."""
        step = self._channels(geometry, max_code)
        return self.convolution is not None and (channels <= step or (step > 0 and geometry.groups == 1))

    def _channels(self, geometry: Geometry, max_code: int) -> int:
        """Return the number of channels whose sums over the whole kernel are exact."""
        return self.most_terms(max_code) // (geometry.kernel[0] * geometry.kernel[1])


def _added_up(pieces: Iterable[Tensor]) -> Tensor:
    """Add up exact pieces in float64, which holds every such sum, and round once to float32."""
    total = None
    for piece in pieces:
        total = piece.double() if total is None else total.add_(piece)
    assert total is not None
    return total.float()


def unfolded(carrier: Carrier, codes: Tensor, weight_GDO: Tensor, geometry: Geometry, max_code: int) -> Tensor:
    """Convolve codes by im2col and matrix products, to the exact integers, rounded once to float32.

    Args:
      carrier: the unit that multiplies.
      codes: int8 `(B, C, H, W)`, channels last.
      weight_GDO: weight codes, D in patch order, `(G, D, O / G)`.
      geometry: of the convolution.
      max_code: the largest |code|.
    Returns: float32 `(B, O, H', W')`, channels last.
    """
    batch, rows, columns = len(codes), *out_size(codes, geometry)
    if geometry.pointwise:
        patches_GND = codes.permute(0, 2, 3, 1).reshape(1, -1, codes.shape[1])
    else:
        patches_GND = im2col(codes, geometry).transpose(0, 1).flatten(1, 2)
    products_GNO = carrier.exact_products(patches_GND, weight_GDO, max_code)
    y_BHWO = products_GNO.transpose(0, 1).reshape(batch, rows, columns, -1)
    return y_BHWO.permute(0, 3, 1, 2)


def out_size(x: Tensor, geometry: Geometry) -> tuple[int, int]:
    """Return (H', W') of the convolution of x `(B, C, H, W)`."""
    (top, left), (down, right), reach = geometry.padding, geometry.stride, geometry.reach
    return (x.shape[2] + 2 * top - reach[0] - 1) // down + 1, (x.shape[3] + 2 * left - reach[1] - 1) // right + 1


def in_patches(weight: Tensor, groups: int) -> Tensor:
    """Rearrange a weight's codes `(O, C / G, *kernel)` to `(G, D, O / G)`, each column in one piece of memory."""
    return weight.permute(0, 2, 3, 1).reshape(groups, -1, weight[0].numel()).transpose(1, 2)


# ---------------------------------------------------------------------------------------------------- the units' checks


def worst_codes(length: int, max_code: int) -> Tensor:
    """Return rows of codes, int8 `(rows, length)`, whose products have the greatest partial sums, or nearly cancel.

    Codes are odd, so that no bit of a sum is always zero: powers of two would hide an accumulator that is too short.
    """
    odd = max_code - 1 + max_code % 2
    rows = torch.full((6, length), odd, dtype=torch.int8)
    rows[1, ::2] = -odd
    rows[2, length // 2 :] = -odd
    rows[3, -1] = 1  # a small product that is added to the greatest sum
    rows[4, 0] = 1
    rows[5, : length // 2] = 1
    return rows


def random_codes(length: int, max_code: int) -> Tensor:
    """Return rows of random codes up to `max_code`, int8 `(rows, length)`, always the same ones."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-max_code, max_code + 1, (6, length), generator=generator).to(torch.int8)


Codes = Callable[[int, int], Tensor]


@functools.cache
def flaw_of(
    carrier: Carrier,
    device: torch.device,
    max_code: int,
    terms: int,
    kinds: tuple[Codes, ...] = (worst_codes, random_codes),
) -> str | None:
    """Check that a carrier multiplies codes exactly on a device; cached for the process.

    Args:
      carrier: the carrier.
      device: the device.
      max_code: the largest |code|.
      terms: number of terms of a sum, a power of two; at most as many as are added up in one piece are checked.
      kinds: make the rows and columns that are multiplied, each with each.
    Returns: None if all products are exact; else the flaw, in words that complete a sentence.
    """
    if reason := carrier.refusal(device):
        return reason
    if max_code > carrier.max_code:
        return f"holds codes up to {carrier.max_code} only"
    length = min(terms, carrier.most_terms(max_code))
    rows = torch.cat([codes(length, max_code) for codes in kinds])
    rows = rows.repeat(_ROWS // len(rows) + 1, 1)[:_ROWS]
    a, b = rows[None], rows.flip(0).t()[None]  # another order, or only squares would stand on the diagonal
    a, b = a.expand(2, -1, -1), b.expand(2, -1, -1)
    shapes = ((a, b), (a[:1], b[:1]), (a[:1, :1], b[:1]), (a[:1], b[:1, :, :1]))  # libraries treat vectors on their own
    try:
        found = [carrier.products(some.to(device), part.to(device)).cpu() for some, part in shapes]
    except (RuntimeError, AttributeError, TypeError) as error:  # no such operator in this torch, or on this device
        words = str(error).partition("\n")[0].split(". ")[0].rstrip(".")
        return f"does not run ({type(error).__name__}: {words})"
    exact = all(
        torch.equal(product.double(), some.double() @ part.double())
        for product, (some, part) in zip(found, shapes, strict=True)
    )
    return None if exact else f"is not exact for codes up to {max_code} over {length} terms"


@functools.cache
def flaw_of_convolution(
    carrier: Carrier,
    by: Carrier,
    device: torch.device,
    max_code: int,
    shapes: tuple[torch.Size, torch.Size],
    geometry: Geometry,
) -> str | None:
    """Check a carrier's convolution on one shape: the algorithm depends on it, and Winograd's is not exact.

    Args:
      carrier: the carrier, whose products are exact.
      by: an exact carrier, to compare with; it may be the same one.
      device: the device.
      max_code: the largest |code|.
      shapes: of input and weight.
      geometry: of the convolution.
    Returns: as `flaw_of`.
    """
    generator = torch.Generator(device).manual_seed(0)
    odd = max_code - 1 + max_code % 2
    for lowest, largest in ((-max_code, max_code), (odd, odd)):
        x, weight = (
            torch.randint(lowest, largest + 1, shape, generator=generator, device=device, dtype=torch.int8).contiguous(
                memory_format=torch.channels_last
            )
            for shape in shapes
        )
        try:
            found = carrier.exact_convolution(x, weight, geometry, max_code)
        except RuntimeError as error:
            return f"does not convolve ({type(error).__name__})"
        if not torch.equal(found, unfolded(by, x, in_patches(weight, geometry.groups), geometry, max_code)):
            return f"does not convolve exactly for codes up to {max_code}"
    return None


# ----------------------------------------------------------------------------------------------------- today's carriers


def _tf32_products(a: Tensor, b: Tensor) -> Tensor:
    with tf32_float32():
        return torch.bmm(a, b)


def _tf32_convolution(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    with tf32_float32():
        return convolved(x, weight, None, geometry)


def _bf16_products(a: Tensor, b: Tensor) -> Tensor:
    if len(a) == 1:
        return torch.mm(a[0], b[0], out_dtype=torch.float32).unsqueeze(0)
    return torch.bmm(a, b, out_dtype=torch.float32)


def _int8_products(a: Tensor, b: Tensor) -> Tensor:
    return torch.stack([torch.ops.aten._int_mm(*pair) for pair in zip(a, b, strict=True)])


def _fp8_products(a: Tensor, b: Tensor) -> Tensor:
    one = torch.ones((), device=a.device)
    pairs = zip(a, b, strict=True)
    return torch.stack([torch.ops.aten._scaled_mm(*pair, one, one, out_dtype=torch.float32) for pair in pairs])


TF32 = Carrier(
    name="tf32",
    dtype=torch.float32,
    max_code=2**10,
    largest_sum=2**24,
    unit=_tf32_products,
    convolution=_tf32_convolution,
)
BF16 = Carrier(
    name="bf16", dtype=torch.bfloat16, max_code=2**8, largest_sum=2**24, unit=_bf16_products, capability=(8, 0)
)
INT8 = Carrier(
    name="int8",
    dtype=torch.int8,
    max_code=127,
    largest_sum=2**31 - 1,
    unit=_int8_products,
    capability=(7, 5),
    multiple=8,
    least_rows=17,
    columns_first=True,
)
FP8 = Carrier(
    name="fp8",
    dtype=torch.float8_e4m3fn,
    max_code=2**4,
    largest_sum=2**24,
    unit=_fp8_products,
    capability=(8, 9),
    multiple=16,
    columns_first=True,
)
CARRIERS = (TF32, BF16, INT8, FP8)
"""Of equally fast carriers the first is taken."""
