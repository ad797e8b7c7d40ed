# SPDX-License-Identifier: Apache-2.0
"""Quantization of tensors to number codes: `quantize_rows` for layers, `quantize` for users.

A row is one example, and its scale is computed from that row alone. With a scale shared over the batch, one example
could change the gradients of all others, and clipping would not bound its influence. Weights hold released values only,
so a whole weight may be one row.

The torch code in this file is the definition; the native kernel gives the same bits and is faster. For each element x:

    t      = min(|x| * (max_code / top), max_code)                               in float32
    n, f   = floor(t / quantum(t)), the fraction in units of 2^-23               to nearest, ties to even
    up     = f + draw >= 2^23             draw: 23 random bits (stochastic), or 2^22 (nearest, ties away from zero)
    code   = sign(x) * min((n + up) * quantum(t), max_code)                      scale = top / max_code

If rounding is stochastic and top = absmax, the largest |x| of the row, then E[code * scale] = x up to float32 rounding.
A role may set a lower top, `clip` times the row's root mean square (RMS), and saturate the few larger values; the codes
are then closer together. The RMS is computed from integers, |x| in units of absmax / 2^15, so that its sum is exact in
any order. For rows without negative values a role may use the format's one-sided codes, which are twice as many. A role
in blocks has a scale per block of a row instead (`scales.py`); t is then |x| / (block scale * row scale).

An example with axes (C, H, W) is a map. Zeros that pad it at the end of H or W change neither its draws nor its scale.
Batches are padded to their longest record, and the length of one record must not affect the contributions of others. So
the RMS of a map is taken over its lines and columns up to the last ones with a nonzero element.
This module does not clip gradients, add noise or choose a format.

Symbols: B rows, x values, t magnitudes in code units.
Source: LUQ (Chmiel et al. 2021, arXiv:2112.10769), equations 10 and 12, with alpha = absmax / 64.
"""

import dataclasses
import functools
import math
import warnings

import torch
from torch import Tensor

from dpquant.backends import triton
from dpquant.backends.qtensor import QTensor
from dpquant.backends.scales import SMALLEST_ABSMAX, block_scales, clipped_top, quantum
from dpquant.errors import FormatError, SettingError, expect
from dpquant.formats import RECIPES, Recipe, RoleFormat, Rounding
from dpquant.native import kernels as _native
from dpquant.number_formats import E3M0, FP8_E4M3, FP8_E5M2, INT4, INT8, NumberFormat, number_format
from dpquant.rounding import DRAW_BITS, MAX_ELEMENTS, derive_key, element_bits, line_keys
from dpquant.rounding import row_keys as keys_of_rows

KERNELS = ("auto", "torch", "native", "triton")

_HALF = 2 ** (DRAW_BITS - 1)
_ONE = 2**DRAW_BITS
_NATIVE_FORMATS = (E3M0, INT4, INT4.one_sided, INT8)
_FLOAT_CODES = {FP8_E4M3: torch.float8_e4m3fn, FP8_E5M2: torch.float8_e5m2}


def native_available() -> bool:
    """Return whether the native kernel was built with this installation."""
    return _native is not None


def quantize(
    x: Tensor,
    format: str | NumberFormat | Recipe,
    *,
    key: int = 0,
    record_ids: Tensor | None = None,
    per_example: bool = True,
    rounding: Rounding | None = None,
    kernel: str = "auto",
) -> QTensor:
    """Quantize x to codes of a format, with one scale per example or one for all of x.

    An element's rounding draw depends on the key, the record id and the position within the example, not on the batch.

    Args:
      x: float32 `(B, ...)`.
      format: a recipe (its activation role is used), a format, or the name of either. If a recipe and a format have
        the same name, it means the recipe.
      key: any integer; selects the stream of rounding draws.
      record_ids: int64 `(B,)`; None = 0..B-1. Ignored if `per_example` is False.
      per_example: True: one scale for each row of x. False: one scale for all of x, for public tensors such as weights.
      rounding: None = that of the recipe, or stochastic if `format` is not a recipe.
      kernel: "auto", "torch", "native" or "triton"; all give the same bits.

    Returns: a QTensor of x's shape. A zero row has scale 0; a row that is not finite has codes 0 and scale NaN.

    Raises:
      FormatError: the format is unknown, or cannot run on the kernel.
      SettingError: x is not float32 or has no rows, or an argument has the wrong shape or type.

    Privacy: per example, reads no other row. With `per_example=False` the code of every element depends on all of x.

    Source: LUQ, arXiv:2112.10769, equations 10 and 12.

    Example:
      >>> q = quantize(torch.tensor([[0.5, -4.0], [0.0, 32.0]]), "luq-fp4")
      >>> q.codes.tolist(), q.scale.tolist()
      ([[8, -64], [0, 64]], [0.0625, 0.5])
    """
    expect("x", x, Tensor, "a tensor", "Convert it by torch.tensor")
    role = _role(format)
    if rounding is not None:
        role = dataclasses.replace(role, rounding=rounding)
    if per_example and x.ndim == 0:
        raise SettingError(
            "Expected x to have a batch axis; got a tensor of shape (). A scale is taken for each example. "
            "Give shape (B, ...), or per_example=False."
        )
    if not per_example:
        record_ids = torch.zeros(1, dtype=torch.int64, device=x.device)
    elif record_ids is None:
        record_ids = torch.arange(len(x), device=x.device)
    keys = keys_of_rows(derive_key("quantize", key), record_ids)
    rows = x if per_example else x.reshape(1, -1)  # flattened: one row without line and column axes
    q = quantize_rows(rows, role, keys, kernel=kernel)
    return q if per_example else q.rearranged(lambda part: part.view(x.shape))


def quantize_rows(
    x: Tensor,
    role: RoleFormat,
    row_keys: Tensor,
    *,
    zero_point: int = 0,
    kernel: str = "auto",
) -> QTensor:
    """Quantize each row of x with the row's own scale.

    An element's draw depends on its row key and its place in the row, not on the memory format. With four axes
    `(B, C, H, W)` the place is line h and index w * C + c within it; otherwise it is the row-major position. Padding
    four-axis batches with zeros at the end of H or W changes neither draws nor scales.

    Args:
      x: float32 `(B, ...)`; contiguous or, with four axes, channels last. Other layouts are made contiguous. With four
        axes the native kernel needs channels last and copies other layouts.
      role: the format of the codes, the rounding and the rule for the scale. With four axes, the RMS of a clip omits
        lines and columns of zeros at the end of H and W.
        A block is consecutive channels at one position of a map, and consecutive values of other rows.
      row_keys: int64 `(B,)` on x's device, from `rounding.row_keys`.
      zero_point: 0 for int8 codes; 128 for uint8 codes that store code + 128, the input of int8 convolutions.
      kernel: "auto", "torch", "native" or "triton"; all give the same bits.

    Returns: a QTensor of x's shape and memory format. A row whose absmax is below 2^-100 has codes 0 and scale 0; a row
      that is not finite has codes 0 and scale NaN, so that this example, and no other, becomes NaN downstream.

    Raises:
      FormatError: no dtype stores the format's codes, or the kernel does not support the format.
      SettingError: x is not float32, the keys do not match its rows, or an argument is out of range.

    Privacy: per example, reads no other row.

    Source: LUQ, arXiv:2112.10769, equations 10 and 12.
    """
    _check(x, row_keys, zero_point, kernel)
    dtype = _code_dtype(role.format, zero_point)
    x = _dense(x.detach())
    codes = torch.empty_like(x, dtype=dtype)  # keeps the memory format
    if x.numel() == 0:
        return QTensor(codes=codes, scale=x.new_zeros(len(x)), zero_point=zero_point)
    if role.one_sided:
        signed = dataclasses.replace(role, one_sided=False)
        unsigned = dataclasses.replace(signed, format=role.format.one_sided)
        positive_B = x.amin(dim=tuple(range(1, x.ndim))) >= 0
        if x.device.type != "cpu":  # a GPU would have to be waited for to tell which rows are one-sided
            one, other = (
                quantize_rows(x, format, row_keys, zero_point=zero_point, kernel=kernel)
                for format in (unsigned, signed)
            )
            chosen = torch.where(positive_B.view(-1, *[1] * (x.ndim - 1)), one.codes, other.codes)
            scale = torch.where(positive_B, one.scale, other.scale)
            return QTensor(codes=chosen, scale=scale, zero_point=zero_point)
        if bool(positive_B.any()) and not bool(positive_B.all()):
            scale = x.new_empty(len(x))
            for rows, one in ((positive_B, unsigned), (~positive_B, signed)):
                q = quantize_rows(x[rows], one, row_keys[rows], zero_point=zero_point, kernel=kernel)
                codes[rows], scale[rows] = q.codes, q.scale
            return QTensor(codes=codes, scale=scale, zero_point=zero_point)
        role = unsigned if bool(positive_B.all()) else signed
    if triton.runs_quantizer(kernel, x.device, role.blocks is None and role.format in _NATIVE_FORMATS):
        fill = triton.fill
    else:
        fill = _fill_native if _runs_native(role, x.device, kernel) else _fill_torch
    if role.blocks is None:
        return QTensor(codes=codes, scale=fill(codes, x, role, row_keys, zero_point), zero_point=zero_point)
    block_scale, scale = _fill_blocks(codes, x, role, row_keys, zero_point)
    return QTensor(codes=codes, scale=scale, zero_point=zero_point, block_scale=block_scale)


def _fill_torch(codes: Tensor, x: Tensor, role: RoleFormat, row_keys: Tensor, zero_point: int) -> Tensor:
    """Fill `codes` and return the scales, `(B,)`: the definition of quantization, on any device."""
    rows = x.reshape(len(x), -1)
    largest = rows.abs().amax(dim=1)
    top = largest if role.clip is None else clipped_top(x, largest, role.clip)
    max_code = torch.full_like(top, role.format.max_code)  # tensor / tensor divides exactly, on every device
    usable = top.isfinite() & (top >= SMALLEST_ABSMAX)
    scale = torch.where(usable, top / max_code, torch.where(top.isfinite(), 0.0, math.nan))

    t = torch.where(usable[:, None], rows.abs() * (max_code / top)[:, None], 0.0)
    codes.copy_(_rounded(t, x, role, row_keys) + zero_point)
    return scale


def _fill_blocks(
    codes: Tensor, x: Tensor, role: RoleFormat, row_keys: Tensor, zero_point: int
) -> tuple[Tensor, Tensor]:
    """Fill `codes` of a role in blocks; return the scales of the blocks, in x's shape, and of the rows, `(B,)`."""
    assert role.blocks is not None
    block_scale, scale = block_scales(x, role.blocks, role.format.max_code)
    steps = block_scale * scale.view(-1, *(1,) * (x.ndim - 1))
    t = torch.where(steps > 0, x.abs() / steps, 0.0)  # also where the scale is NaN
    codes.copy_(_rounded(t.reshape(len(x), -1), x, role, row_keys) + zero_point)
    return block_scale, scale


def _rounded(t: Tensor, x: Tensor, role: RoleFormat, row_keys: Tensor) -> Tensor:
    """Round magnitudes in code units, `(B, n)` in row-major order; return them with the signs and the shape of x."""
    t = t.clamp(max=role.format.max_code)
    spacing = quantum(t, role.format)
    floor = (t / spacing).floor()
    fraction = ((t / spacing - floor) * _ONE).round().long()  # round: ties to even
    draw = _draws(x, row_keys) if role.rounding is Rounding.STOCHASTIC else torch.full_like(fraction, _HALF)
    magnitude = ((floor + (fraction + draw >= _ONE)) * spacing).clamp(max=role.format.max_code).view(x.shape)
    return torch.where(x < 0, -magnitude, magnitude)


def _draws(x: Tensor, row_keys: Tensor) -> Tensor:
    """Return the draw of each element of x, int64 `(B, n)`, in row-major order."""
    line_size = _line_size(x)
    if line_size is None:
        return element_bits(row_keys, torch.arange(x[0].numel(), device=x.device))
    B, C, H, W = x.shape
    keys = line_keys(row_keys, H).flatten()
    draws = element_bits(keys, torch.arange(line_size, device=x.device))
    return draws.view(B, H, W, C).permute(0, 3, 1, 2).reshape(B, -1)


def _line_size(x: Tensor) -> int | None:
    """Return the number of elements per line key, W * C; None if all elements draw under the row key (no map)."""
    return x.shape[1] * x.shape[3] if x.ndim == 4 else None


def _fill_native(codes: Tensor, x: Tensor, role: RoleFormat, row_keys: Tensor, zero_point: int) -> Tensor:
    """Fill `codes` and return the scales, `(B,)`, by the native kernel: the bits of `_fill_torch` in one pass."""
    scale = x.new_empty(len(x))
    filled = codes
    if x.ndim == 4 and not x.is_contiguous(memory_format=torch.channels_last):  # the kernel needs contiguous lines
        x = x.contiguous(memory_format=torch.channels_last)
        filled = torch.empty_like(x, dtype=codes.dtype)
    assert _native is not None
    _native.quantize_rows(
        x.numpy(),  # NumPy views: binding them to C++ takes less time than binding tensors
        row_keys.contiguous().numpy(),
        filled.view(torch.uint8).numpy(),
        scale.numpy(),
        role.clip,
        line=_line_size(x),
        channels=x.shape[1] if x.ndim == 4 else 1,
        max_code=role.format.max_code,
        uniform=role.format.exponent_bits == 0,
        stochastic=role.rounding is Rounding.STOCHASTIC,
        zero_point=zero_point,
        threads=torch.get_num_threads(),
    )
    if filled is not codes:
        codes.copy_(filled)
    return scale


def _dense(x: Tensor) -> Tensor:
    """Return the tensor itself if it is contiguous or channels last, else a contiguous copy."""
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return x
    return x.contiguous()


def _runs_native(role: RoleFormat, device: torch.device, kernel: str) -> bool:
    """Return whether to use the native kernel: powers of two and uniform integers, without blocks, on the CPU."""
    able = device.type == "cpu" and role.format in _NATIVE_FORMATS and role.blocks is None
    if kernel == "torch" or (kernel == "auto" and not able):
        return False
    if not able:
        raise FormatError(
            f"Expected kernel 'native' with {', '.join(one.name for one in _NATIVE_FORMATS if one.signed)}, without "
            f"blocks, on the CPU; got format={role.format.name!r}, blocks={role.blocks} on {device}. The kernel is "
            "written for these. Choose kernel='auto'."
        )
    if native_available():
        return True
    if kernel == "native":
        raise FormatError(
            "Expected kernel 'native' to be installed; got kernel='native'. The package was built without a C++ "
            "compiler. Install a compiler and reinstall dpquant, or choose kernel='auto'."
        )
    _warn_of_missing_kernel()
    return False


@functools.cache
def _warn_of_missing_kernel() -> None:
    """Warn, once per process, that quantization will be slow, and say what to do."""
    warnings.warn(
        "dpquant was installed without its native kernel: quantization gives the same codes, but many times slower. "
        "Install a C++ compiler and Python's headers, then reinstall dpquant.",
        RuntimeWarning,
        stacklevel=2,
    )


def _role(format: str | NumberFormat | Recipe) -> RoleFormat:
    """Return the role (format, rounding, scale) for a format argument of `quantize`."""
    if isinstance(format, str):
        format = RECIPES[format] if format in RECIPES else _format_named(format)
    if isinstance(format, Recipe):
        return format.activation
    return RoleFormat(format=format, rounding=Rounding.STOCHASTIC)


def _code_dtype(format: NumberFormat, zero_point: int) -> torch.dtype:
    """Return the dtype that stores the format's codes; raise FormatError if there is none."""
    if format.fits_int8:
        return torch.uint8 if zero_point else torch.int8
    if zero_point:
        raise FormatError(
            f"Expected zero_point=0 for format {format.name!r}; got zero_point={zero_point}. Only integer codes are "
            "stored with an offset. Leave zero_point out."
        )
    if format not in _FLOAT_CODES:
        raise FormatError(
            f"Expected format to have integer codes up to 127 or a float8 type; got format={format.name!r}. Codes are "
            "stored in one byte. Choose one of dpquant's formats."
        )
    return _FLOAT_CODES[format]


def _check(x: Tensor, row_keys: Tensor, zero_point: int, kernel: str) -> None:
    """Raise SettingError if the arguments of `quantize_rows` are invalid."""
    if x.dtype != torch.float32 or x.ndim == 0:
        raise SettingError(
            f"Expected x of type float32 and shape (B, ...); got x of {x.dtype}, {x.ndim} axes. Rounding is defined on "
            "float32 rows. Convert it by x.float()."
        )
    if row_keys.dtype != torch.int64 or row_keys.shape != x.shape[:1] or row_keys.device != x.device:
        raise SettingError(
            f"Expected row_keys of type int64, one for each row of x, on {x.device}; got row_keys of {row_keys.dtype}, "
            f"{row_keys.ndim} axes, on {row_keys.device}. A row without its own key shares another's draws. "
            "Make them by row_keys(key, record_ids)."
        )
    if (_line_size(x) or math.prod(x.shape[1:])) > MAX_ELEMENTS:
        raise SettingError(
            "Expected x to have at most 2^32 elements in a row or, with four axes (B, C, H, W), in a line of W * C; "
            f"got shape (B, {', '.join(map(str, x.shape[1:]))}). Beyond it draws would repeat. Quantize it in parts."
        )
    if zero_point not in (0, 128):
        raise SettingError(
            f"Expected zero_point to be 0 or 128; got zero_point={zero_point}. Codes are stored as int8 or, shifted by "
            "128, as uint8. Give one of the two."
        )
    if kernel not in KERNELS:
        raise SettingError(
            f"Expected kernel to be one of {', '.join(KERNELS)}; got kernel={kernel!r}. Only these exist. "
            "Choose one of them."
        )


def _format_named(name: str) -> NumberFormat:
    """Return the format of a name; raise FormatError, with all formats and recipes, if it is unknown."""
    try:
        return number_format(name)
    except FormatError as error:
        raise FormatError(f"{error} Recipes may be named too: {', '.join(RECIPES)}.") from None
