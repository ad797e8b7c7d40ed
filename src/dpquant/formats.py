# SPDX-License-Identifier: Apache-2.0
"""Recipes and precisions: immutable descriptions, without tensors and without torch.

A recipe gives a number format (`number_formats.py`) and a rounding to each role: weight, activation and output
gradient. A precision gives a recipe, or full precision, to each of a layer's three products.

Users write them as text:

    role         the name of a format; then ~ for stochastic rounding, @ and a clip,   int8, e3m0~, int4@2.5#, int4@4+
                 + for unsigned codes in rows without negative values, # for a
                 scale per channel
    recipe       a name, or the roles of weight, activation and gradient               luq-fp4, int4,int4,e3m0~
    precision    full, a recipe, or those of forward, dgrad and wgrad                  full/luq-fp4/luq-fp4

`mxfp4` and `nvfp4` are formats of four-bit hardware, with a scale for every few channels of a position. Such a block
lies along the axis over which the product sums. wgrad sums over positions, in hardware over those of all examples, and
a block across examples would make one record's codes depend on another's. So as a precision these names mean
`mxfp4/mxfp4/int8` and `nvfp4/nvfp4/int8`. Roles in blocks have no text of their own.

Sources: LUQ (Chmiel et al. 2021, arXiv:2112.10769); MXFP4 from OCP Microscaling Formats (MX) Specification, version
1.0; NVFP4 from "Pretraining Large Language Models with NVFP4" (NVIDIA 2025, arXiv:2509.25149). Both differ here: scales
are rounded up so that no value saturates, all roles are rounded stochastically, there is no Hadamard transform, and
NVFP4's float32 scale is per example, or per channel of a weight, instead of per tensor.
"""

import dataclasses
import enum
import math
import re
from typing import cast

from dpquant.errors import FormatError, did_you_mean, expect
from dpquant.number_formats import E2M1, E3M0, FORMATS, FP8_E4M3, FP8_E5M2, INT4, INT8, NumberFormat

_ROLE = re.compile(
    r"(?P<name>[a-z0-9-]+)(?P<stochastic>~)?(@(?P<clip>[0-9.]*[1-9][0-9]*))?(?P<one_sided>\+)?(?P<channels>#)?"
)


class Rounding(enum.Enum):
    """Rule by which a value between two codes is rounded to one of them."""

    STOCHASTIC = "stochastic"  # up with probability equal to the fraction, which is unbiased
    NEAREST = "nearest"  # to the nearer code; ties away from zero


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks:
    """Scales for blocks of channels at one position of an example, or at one kernel tap of a weight.

    Attributes:
      size: number of channels in a block; the last block may have fewer. Blocks are counted over all channels of an
        activation or gradient, also in a grouped convolution, where hardware would begin a block with each group.
      scale: format of the blocks' scales, which a scale per row multiplies. None: powers of two (E8M0), which reach all
        magnitudes without one.

    Raises:
      FormatError: the size is not positive.
    """

    size: int
    scale: NumberFormat | None = None

    def __post_init__(self):
        if self.size < 1:
            raise FormatError(f"Expected size of a block to be positive; got size={self.size}. Hardware has 16 or 32.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoleFormat:
    """Format, rounding and scale rule of one role.

    A row is a set of values with one scale: an example of an activation or gradient, a weight, or a channel of it.

    Attributes:
      format: the number format.
      rounding: the rounding rule.
      clip: the largest code represents `clip` times the root mean square of the row, but at most its largest magnitude.
        Larger values saturate, which is biased. The mean square is over the lines and columns up to the last one that
        is not zero, so that padding does not change it. None: the largest code represents the largest magnitude.
      per_channel: a weight has one scale per output channel, or per input channel in the product with output gradients;
        otherwise it has a single scale.
      one_sided: a row without negative values, as after ReLU, uses `format.one_sided`, which has twice as many levels.
      blocks: each block of the row has a scale of its own, rounded up so that no value saturates.

    Raises:
      FormatError: `format` is not a NumberFormat, `rounding` is not a Rounding, `clip` is not above zero, the one-sided
        codes do not fit int8, or a role in blocks has a clip or one-sided codes.
    """

    format: NumberFormat
    rounding: Rounding
    clip: float | None = None
    per_channel: bool = False
    one_sided: bool = False
    blocks: Blocks | None = None

    def __post_init__(self):
        if not isinstance(self.format, NumberFormat):
            raise FormatError(
                f"Expected format to be a NumberFormat; got format={self.format!r}. A role needs the format's facts. "
                "Look one up by number_format(name)."
            )
        if not isinstance(self.rounding, Rounding):
            raise FormatError(
                f"Expected rounding to be a Rounding; got rounding={self.rounding!r}. There are two ways to round. "
                "Give Rounding.STOCHASTIC or Rounding.NEAREST."
            )
        if self.clip is not None and not 0 < self.clip < math.inf:
            raise FormatError(f"Expected clip > 0 and finite; got clip={self.clip}. Values from 2 to 4 make sense.")
        if self.one_sided and not self.format.one_sided.fits_int8:
            raise FormatError(
                f"Expected format {self.format.name!r} without +; got codes of one sign up to "
                f"{self.format.one_sided.max_code}. They do not fit int8. Leave + out."
            )
        if self.blocks is not None and (self.clip is not None or self.one_sided):
            raise FormatError(
                f"Expected a role in blocks without clip and one_sided; got clip={self.clip}, "
                f"one_sided={self.one_sided}. Both concern the scale of a whole row. Leave them out."
            )

    @property
    def max_code(self) -> int:
        """Return the largest magnitude of a code."""
        return self.format.one_sided.max_code if self.one_sided else self.format.max_code


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Format and rounding of each operand of a quantized layer. Users choose a recipe by `format=`.

    Attributes:
      name: as users write it and as records show it.
      weight: of the layer's weight, which has one scale, or one per channel (`RoleFormat.per_channel`).
      activation: of the layer's input, which has one scale per example.
      gradient: of the gradient of the layer's output, which has one scale per example.

    Raises:
      FormatError: the name is empty, a role is not a RoleFormat, a role other than the weight is per channel, or a
        weight in blocks is not.
    """

    name: str
    weight: RoleFormat
    activation: RoleFormat
    gradient: RoleFormat

    def __post_init__(self):
        if not isinstance(self.name, str) or not self.name:
            raise FormatError(
                f"Expected name to be a non-empty string; got name={self.name!r}. Records name the recipe. "
                "Give it a name."
            )
        for role in ("weight", "activation", "gradient"):
            if not isinstance(getattr(self, role), RoleFormat):
                raise FormatError(
                    f"Expected {role} to be a RoleFormat; got {role}={getattr(self, role)!r}. A recipe states every "
                    "role. Give RoleFormat(format=..., rounding=...)."
                )
        if self.activation.per_channel or self.gradient.per_channel:
            raise FormatError(
                "Expected per_channel of the weight alone; got it of another role. The scales of an example's channels "
                "cannot be taken out of a product's sum. Leave # out there."
            )
        if self.weight.blocks is not None and not self.weight.per_channel:
            raise FormatError(
                "Expected per_channel of a weight in blocks; got per_channel=False. A block lies inside a channel of "
                "the product's result. Give per_channel=True."
            )

    @property
    def roles(self) -> tuple[RoleFormat, RoleFormat, RoleFormat]:
        """Return the roles weight, activation and gradient."""
        return self.weight, self.activation, self.gradient

    @property
    def product_bits(self) -> tuple[int, int, int]:
        """Return the number of bits of the wider operand of forward, dgrad and wgrad."""
        weight, activation, gradient = (role.format.bits for role in self.roles)
        return max(weight, activation), max(weight, gradient), max(activation, gradient)

    @property
    def in_blocks(self) -> bool:
        """Return whether a role has a scale per block, which changes within a product's sum."""
        return any(role.blocks is not None for role in self.roles)

    @property
    def fits_int8(self) -> bool:
        """Return whether int8 instructions can multiply the codes: integers in -127..127, and none in blocks."""
        return all(role.format.fits_int8 for role in self.roles) and not self.in_blocks

    @property
    def max_code(self) -> int:
        """Return the largest magnitude of a code of any role."""
        return max(role.max_code for role in self.roles)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Precision:
    """Recipe of each of a layer's three products; None: full precision.

    Attributes:
      forward: of the product of activations and weight, which gives the output.
      dgrad: of the product of output gradients and weight, which gives the input gradient.
      wgrad: of the product of output gradients and activations, which gives each example's weight gradient.

    Raises:
      FormatError: a product has neither a recipe nor None, or wgrad has a scale per block.
    """

    forward: Recipe | None = None
    dgrad: Recipe | None = None
    wgrad: Recipe | None = None

    def __post_init__(self):
        for product in ("forward", "dgrad", "wgrad"):
            todo = "dpquant.prepare and make_private take text, as int8/full/full"
            expect(product, getattr(self, product), (Recipe, type(None)), "a Recipe or None", todo, FormatError)
        if self.wgrad is not None and self.wgrad.in_blocks:
            raise FormatError(
                f"Expected wgrad to be a recipe with one scale per example; got wgrad={self.wgrad.name!r}. wgrad "
                "sums over positions, and a block of them on the hardware would mix records. Give wgrad int8."
            )

    @property
    def recipes(self) -> tuple[Recipe | None, Recipe | None, Recipe | None]:
        """Return the recipes of forward, dgrad and wgrad."""
        return self.forward, self.dgrad, self.wgrad

    @property
    def quantized(self) -> bool:
        """Return whether any product runs quantized."""
        return any(self.recipes)

    @property
    def name(self) -> str:
        """Return the precision as users write it."""
        names = ["full" if recipe is None else recipe.name for recipe in self.recipes]
        return names[0] if len(set(names)) == 1 else "/".join(names)

    @property
    def in_blocks(self) -> bool:
        """Return whether any product has a scale per block."""
        return any(recipe is not None and recipe.in_blocks for recipe in self.recipes)

    @property
    def fits_int8(self) -> bool:
        """Return whether int8 instructions can multiply all codes."""
        return all(recipe is None or recipe.fits_int8 for recipe in self.recipes)

    @property
    def max_code(self) -> int:
        """Return the largest magnitude of any code; 0 in full precision."""
        return max((recipe.max_code for recipe in self.recipes if recipe is not None), default=0)

    def share(self, most_bits: int = 8) -> float:
        """Return the share of the multiplications whose operands have at most `most_bits` bits: 0, 1/3, 2/3 or 1.

        The three products have equal numbers of multiplications.
        """
        bits = [recipe.product_bits[i] for i, recipe in enumerate(self.recipes) if recipe is not None]
        return sum(b <= most_bits for b in bits) / 3


FULL_PRECISION = Precision()
AUTO = "auto"
"""Format of a run that decides by measurement on its machine which layers to quantize, and in what."""


def _recipe(name: str, forward: NumberFormat, rounding: Rounding, gradient: NumberFormat) -> Recipe:
    """Return a recipe with one format and rounding for weight and activation, and a stochastically rounded gradient."""
    operand = RoleFormat(format=forward, rounding=rounding)
    output_gradient = RoleFormat(format=gradient, rounding=Rounding.STOCHASTIC)
    return Recipe(name=name, weight=operand, activation=operand, gradient=output_gradient)


def _recipe_in_blocks(name: str, blocks: Blocks) -> Recipe:
    """Return a recipe of E2M1 codes in blocks, all of them rounded stochastically."""
    operand = RoleFormat(format=E2M1, rounding=Rounding.STOCHASTIC, blocks=blocks)
    weight = dataclasses.replace(operand, per_channel=True)
    return Recipe(name=name, weight=weight, activation=operand, gradient=operand)


RECIPES = {
    entry.name: entry
    for entry in (
        _recipe("luq-fp4", E3M0, Rounding.STOCHASTIC, E3M0),  # DPQuant
        _recipe("luq", INT4, Rounding.NEAREST, E3M0),  # LUQ as published, but for the scale: absmax / 64
        Recipe(  # four bits, with uniform levels in the range of most values; measured in docs/paper.md, E8
            name="int4-clip",
            weight=RoleFormat(format=INT4, rounding=Rounding.NEAREST, clip=2.5, per_channel=True),
            activation=RoleFormat(format=INT4, rounding=Rounding.NEAREST, clip=4.0, one_sided=True),
            gradient=RoleFormat(format=E3M0, rounding=Rounding.STOCHASTIC),
        ),
        _recipe("int8", INT8, Rounding.NEAREST, INT8),
        _recipe("fp8", FP8_E4M3, Rounding.NEAREST, FP8_E5M2),
        _recipe_in_blocks("mxfp4", Blocks(size=32)),
        _recipe_in_blocks("nvfp4", Blocks(size=16, scale=FP8_E4M3)),
    )
}
_ALSO = {  # what else users call a format that a recipe has
    "fp4": "luq-fp4",
    "int4": "int4-clip",
    "e3m0": "luq-fp4",
    "e2m1": "mxfp4",
    "e4m3": "fp8",
    "e5m2": "fp8",
    "float8": "fp8",
    "fp32": "full",
    "float32": "full",
    "none": "full",
}


def recipe(name: str | Recipe) -> Recipe:
    """Return the recipe with this name, or with these three roles; return a Recipe unchanged.

    Raises:
      FormatError: the text is neither. The message lists the known names.
    """
    if isinstance(name, Recipe):
        return name
    if name in RECIPES:
        return RECIPES[name]
    roles = [_role(text) for text in name.split(",")]
    if len(roles) != 3 or None in roles:
        raise FormatError(
            f"Expected format to be one of {', '.join(RECIPES)}, a Recipe, or the formats of weight, activation and "
            f"gradient as in int4,int4,e3m0~; got format={name!r}. {did_you_mean(name, (*RECIPES, 'full'), _ALSO)}A "
            "recipe says how each operand is rounded. Choose one of them."
        )
    weight, activation, gradient = cast(list[RoleFormat], roles)
    return Recipe(name=name, weight=weight, activation=activation, gradient=gradient)


def precision(text: str | Recipe | Precision) -> Precision:
    """Return the precision that a text describes; return a Precision unchanged.

    Args:
      text: `full`, a recipe, or those of forward, dgrad and wgrad, separated by slashes. One recipe in blocks is that
        of forward and dgrad, and wgrad's is int8.
    Raises:
      FormatError: the text describes no precision, or one whose wgrad is in blocks. The message says what is known.
    """
    if isinstance(text, Precision):
        return text
    expect("format", text, (str, Recipe), "a name, a Recipe or a Precision", "Give a name, as luq-fp4", FormatError)
    parts = [text] if isinstance(text, Recipe) else text.split("/")
    if len(parts) not in (1, 3):
        raise FormatError(
            f"Expected one or three recipes in format; got format={text!r}. A layer has three products: forward, dgrad "
            "and wgrad. Write one for all of them, or three, as in full/luq-fp4/luq-fp4."
        )
    recipes = [None if part == "full" else recipe(part) for part in parts]
    if len(recipes) == 1:
        wgrad = RECIPES["int8"] if recipes[0] is not None and recipes[0].in_blocks else recipes[0]
        recipes = [recipes[0], recipes[0], wgrad]
    forward, dgrad, wgrad = recipes
    return Precision(forward=forward, dgrad=dgrad, wgrad=wgrad)


def format_tried(text: str) -> str:
    """Return the format that trials on this machine use: the text itself; for `auto` int8, which it takes on most."""
    return "int8" if text == AUTO else text


def _role(text: str) -> RoleFormat | None:
    """Return the role that a text such as `int8`, `e3m0~` or `int4@2.5#` describes; None if it describes none."""
    parts = _ROLE.fullmatch(text)
    if parts is None or parts["name"] not in FORMATS:
        return None
    return RoleFormat(
        format=FORMATS[parts["name"]],
        rounding=Rounding.STOCHASTIC if parts["stochastic"] else Rounding.NEAREST,
        clip=float(parts["clip"]) if parts["clip"] else None,
        per_channel=bool(parts["channels"]),
        one_sided=bool(parts["one_sided"]),
    )
