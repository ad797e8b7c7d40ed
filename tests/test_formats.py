# SPDX-License-Identifier: Apache-2.0
"""Every value of every format against tables and decoded bytes; recipes; what is refused."""

import dataclasses
import subprocess
import sys

import pytest

from dpquant.errors import FormatError
from dpquant.formats import (
    FULL_PRECISION,
    RECIPES,
    Blocks,
    Precision,
    Recipe,
    RoleFormat,
    Rounding,
    precision,
)
from dpquant.formats import recipe as lookup_recipe
from dpquant.number_formats import E2M1, E3M0, FORMATS, FP8_E4M3, INT4, INT8, NumberFormat
from dpquant.number_formats import number_format as lookup
from oracles import VALUES


def assert_levels_are(number_format: NumberFormat, values: list[float]) -> None:
    """The format's levels are exactly these, in order."""
    assert list(number_format.levels()) == values


@pytest.mark.parametrize("name", VALUES)
def test_every_level_is_as_the_formats_definition_says(name):
    assert_levels_are(lookup(name), VALUES[name])


def test_a_wrong_exponent_range_would_be_seen():
    with pytest.raises(AssertionError):
        assert_levels_are(dataclasses.replace(FP8_E4M3, min_exponent=-7), VALUES["fp8-e4m3"])
    with pytest.raises(AssertionError):
        assert_levels_are(dataclasses.replace(E3M0, max_code=128), VALUES["e3m0"])


def test_the_tables_cover_every_format():
    assert VALUES.keys() == FORMATS.keys()


@pytest.mark.parametrize(
    ("name", "bits"), [("e3m0", 4), ("e2m1", 4), ("int4", 4), ("int8", 8), ("fp8-e4m3", 8), ("fp8-e5m2", 8)]
)
def test_a_format_has_as_many_levels_as_its_bits_allow(name, bits):
    assert lookup(name).bits == bits
    assert 2 ** (bits - 1) < len(lookup(name).levels()) < 2**bits


@pytest.mark.parametrize(("name", "fits"), [("luq-fp4", True), ("luq", True), ("int8", True), ("fp8", False)])
def test_a_recipe_fits_int8_when_all_its_codes_are_small_integers(name, fits):
    levels = [level for role in lookup_recipe(name).roles for level in role.format.levels()]
    assert lookup_recipe(name).fits_int8 is fits
    assert all(level == int(level) and abs(level) <= 127 for level in levels) is fits


@pytest.mark.parametrize(
    ("name", "weight", "activation", "gradient", "max_code"),
    [
        ("luq-fp4", ("e3m0", "stochastic"), ("e3m0", "stochastic"), ("e3m0", "stochastic"), 64),
        ("luq", ("int4", "nearest"), ("int4", "nearest"), ("e3m0", "stochastic"), 64),
        ("int8", ("int8", "nearest"), ("int8", "nearest"), ("int8", "stochastic"), 127),
        ("fp8", ("fp8-e4m3", "nearest"), ("fp8-e4m3", "nearest"), ("fp8-e5m2", "stochastic"), 57344),
    ],
)
def test_recipes_say_what_the_documentation_says(name, weight, activation, gradient, max_code):
    chosen = lookup_recipe(name)
    assert [(role.format.name, role.rounding.value) for role in chosen.roles] == [weight, activation, gradient]
    assert (chosen.name, chosen.max_code) == (name, max_code)


def test_a_recipe_is_its_own_lookup():
    assert lookup_recipe(lookup_recipe("luq")) is lookup_recipe("luq")


LUQ = lookup_recipe("luq")


def roles(text):
    return [(role.format.name, role.rounding.value) for role in lookup_recipe(text).roles]


def test_a_recipe_may_be_written_role_by_role():
    assert roles("int4,int8~,e3m0~") == [("int4", "nearest"), ("int8", "stochastic"), ("e3m0", "stochastic")]
    assert roles("e3m0~,e3m0~,e3m0~") == roles("luq-fp4")
    assert roles("fp8-e4m3,fp8-e4m3,fp8-e5m2~") == roles("fp8")


def test_a_role_may_be_cut_off_and_a_weight_have_a_scale_a_channel():
    weight, activation, gradient = lookup_recipe("int4~@2.5#,int4@10,e3m0~").roles
    assert (weight.clip, weight.per_channel, weight.rounding) == (2.5, True, Rounding.STOCHASTIC)
    assert (activation.clip, activation.per_channel, activation.rounding) == (10, False, Rounding.NEAREST)
    assert (gradient.clip, gradient.per_channel) == (None, False)
    with pytest.raises(FormatError, match="weight alone"):
        lookup_recipe("int4,int4#,e3m0~")
    with pytest.raises(FormatError, match="clip > 0"):
        RoleFormat(format=INT4, rounding=Rounding.NEAREST, clip=0.0)


def test_a_uniform_formats_sign_may_become_a_bit_of_magnitude():
    one_sided = INT4.one_sided
    assert (one_sided.bits, one_sided.max_code, one_sided.signed, one_sided.fits_int8) == (4, 15, False, True)
    assert one_sided.levels() == tuple(range(16))
    activation = lookup_recipe("int4,int4@4+,e3m0~").activation
    assert (activation.one_sided, activation.clip, activation.max_code) == (True, 4, 15)
    assert lookup_recipe("int4,int4+,int4~").max_code == 15 and lookup_recipe("int4,int4,int4~").max_code == 7
    for text in ("e3m0+,int4,int4", "int4,int8+,int4"):
        with pytest.raises(FormatError, match="Leave \\+ out"):
            lookup_recipe(text)


def test_the_clipped_recipe_is_its_roles():
    written = lookup_recipe("int4@2.5#,int4@4+,e3m0~")
    assert lookup_recipe("int4-clip").roles == written.roles and precision("int4-clip").share(4) == 1


@pytest.mark.parametrize(("name", "blocks"), [("mxfp4", Blocks(size=32)), ("nvfp4", Blocks(size=16, scale=FP8_E4M3))])
def test_a_recipe_in_blocks_is_int8_where_a_block_would_be_positions(name, blocks):
    chosen = lookup_recipe(name)
    roles = {(role.format, role.rounding, role.blocks) for role in chosen.roles}
    assert roles == {(E2M1, Rounding.STOCHASTIC, blocks)}
    assert chosen.in_blocks and E2M1.fits_int8 and not chosen.fits_int8
    whole = precision(name)
    assert whole == precision(chosen) == Precision(forward=chosen, dgrad=chosen, wgrad=RECIPES["int8"])
    assert whole.in_blocks and not whole.fits_int8 and precision(whole.name) == whole
    assert not precision("int8").in_blocks and precision(f"full/{name}/full").in_blocks


def test_blocks_where_they_have_no_meaning_are_refused():
    for text in ("full/full/mxfp4", "nvfp4/nvfp4/nvfp4"):
        with pytest.raises(FormatError, match="mix records"):
            precision(text)
    blocks, role = Blocks(size=32), RoleFormat(format=INT4, rounding=Rounding.NEAREST)
    for change in ({"clip": 2.5}, {"one_sided": True}):
        with pytest.raises(FormatError, match="without clip and one_sided"):
            dataclasses.replace(role, blocks=blocks, **change)
    with pytest.raises(FormatError, match="per_channel=False"):
        dataclasses.replace(LUQ, weight=dataclasses.replace(role, blocks=blocks))
    with pytest.raises(FormatError, match="size=0"):
        Blocks(size=0)


@pytest.mark.parametrize(
    "text",
    [
        "int4@,int4,int4",
        "int4+@2,int4,int4",
        "int4@0,int4,int4",
        "int4#@2,int4,int4",
        "",
        "int4,int4",
        "int4,int4,int4,int4",
        "int4,int4,fp3",
        "int4,int4,~",
        "INT8",
    ],
)
def test_a_recipe_that_cannot_be_read_is_refused(text):
    with pytest.raises(FormatError, match="luq-fp4"):
        lookup_recipe(text)


def test_a_precision_is_one_recipe_or_one_for_each_product():
    mixed = precision("full/luq-fp4/int8")
    assert [one and one.name for one in mixed.recipes] == [None, "luq-fp4", "int8"]
    assert precision("luq") == Precision(forward=LUQ, dgrad=LUQ, wgrad=LUQ) and precision(LUQ) == precision("luq")
    assert precision("full") == FULL_PRECISION and not FULL_PRECISION.quantized and mixed.quantized
    for text in ("full", "luq-fp4", "full/luq-fp4/int8", "int4,int4,e3m0~"):
        assert precision(text).name == text and precision(precision(text)) == precision(text)
    assert (mixed.max_code, FULL_PRECISION.max_code) == (127, 0)
    assert mixed.fits_int8 and not precision("full/fp8/full").fits_int8


@pytest.mark.parametrize("text", ["luq/luq", "full/full/full/full", "luq-fp4/none/full"])
def test_a_precision_that_cannot_be_read_is_refused(text):
    with pytest.raises(FormatError, match="format"):
        precision(text)


@pytest.mark.parametrize(
    ("text", "eight", "four"),
    [
        ("full", 0, 0),
        ("luq-fp4", 1, 1),
        ("int8", 1, 0),
        ("full/luq-fp4/luq-fp4", 2 / 3, 2 / 3),
        ("int8/luq-fp4/luq-fp4", 1, 2 / 3),
        ("int8,int4,int4~", 1, 1 / 3),  # only wgrad has two operands of four bits
        ("mxfp4", 1, 2 / 3),  # wgrad is int8
    ],
)
def test_a_product_counts_as_wide_as_its_wider_operand(text, eight, four):
    assert (precision(text).share(8), precision(text).share(4)) == pytest.approx((eight, four))


@pytest.mark.parametrize(("find", "known"), [(lookup, "fp8-e5m2"), (lookup_recipe, "luq-fp4")])
def test_an_unknown_name_is_refused_with_the_known_ones(find, known):
    with pytest.raises(FormatError, match=rf"{known}.*got format='fp3'"):
        find("fp3")


@pytest.mark.parametrize(
    "change",
    [{"mantissa_bits": 5}, {"exponent_bits": -1}, {"max_code": 0}, {"max_code": 65}, {"max_code": 2**17}],
    ids=str,
)
def test_impossible_formats_are_refused(change):
    with pytest.raises(FormatError, match=next(iter(change))):
        dataclasses.replace(E3M0, **change)


def test_an_incomplete_recipe_is_refused():
    role = RoleFormat(format=INT4, rounding=Rounding.NEAREST)
    with pytest.raises(FormatError, match="gradient"):
        Recipe(name="mine", weight=role, activation=role, gradient=INT4)
    with pytest.raises(FormatError, match="name"):
        Recipe(name="", weight=role, activation=role, gradient=role)


def test_a_role_wants_facts_and_not_names():
    with pytest.raises(FormatError, match="format='int4'"):
        RoleFormat(format="int4", rounding=Rounding.NEAREST)
    with pytest.raises(FormatError, match="rounding='nearest'"):
        RoleFormat(format=INT8, rounding="nearest")


def test_formats_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        E3M0.max_code = 128


def assert_loads_no_torch(module: str) -> None:
    """Importing the module in a fresh interpreter leaves torch unloaded."""
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_formats_load_without_torch():
    assert_loads_no_torch("dpquant.formats")


def test_a_module_that_loads_torch_would_be_seen():
    with pytest.raises(AssertionError):
        assert_loads_no_torch("dpquant.rounding")
