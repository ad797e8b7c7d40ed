# SPDX-License-Identifier: Apache-2.0
"""Bugs planted in `backends` and in the rounding bits: scales, draws and margins."""

from mutants.mutant import COUPLING, SECRET, SENSITIVITY, mutants_of

_BACKENDS = "src/dpquant/backends"
_QUANTIZE = "tests/backends/test_quantize.py"
_CONFORMANCE = "tests/backends/test_conformance.py"

MUTANTS = [
    *mutants_of(
        f"{_BACKENDS}/quantize.py",
        _QUANTIZE,
        (
            "the scale is that of the batch",
            COUPLING,
            "largest = rows.abs().amax(dim=1)",
            "largest = rows.abs().amax().expand(len(rows))",
        ),
        (
            "signs are decided for the batch",
            COUPLING,
            "        if bool(positive_B.any()) and not bool(positive_B.all()):\n",
            "        if False:\n",
            f"{_QUANTIZE}::test_a_row_without_negative_values_has_twice_as_many_levels",
        ),
        (
            "a row that is not finite has scale zero",
            SENSITIVITY,
            "torch.where(top.isfinite(), 0.0, math.nan))",
            "0.0)",
            f"{_QUANTIZE}::test_rows_without_a_usable_scale_become_zero_and_bad_rows_nan",
        ),
        (
            "codes of a row in blocks draw by the batch's first key",
            COUPLING,
            "codes.copy_(_rounded(t.reshape(len(x), -1), x, role, row_keys) + zero_point)\n    return block_scale",
            (
                "codes.copy_(_rounded(t.reshape(len(x), -1), x, role, "
                "row_keys[:1].expand(len(x))) + zero_point)\n    return block_scale"
            ),
            "tests/backends/test_blocks.py::test_codes_round_by_their_lines_draws_whatever_the_layout",
        ),
        (
            "draws of a map follow its width after padding",
            COUPLING,
            "draws.view(B, H, W, C).permute(0, 3, 1, 2).reshape(B, -1)",
            "draws.view(B, H, C, W).permute(0, 2, 1, 3).reshape(B, -1)",
            f"{_QUANTIZE}::test_a_maps_elements_round_by_their_lines_draws",
        ),
        (
            "rounding is biased upwards",
            SENSITIVITY,
            "(fraction + draw >= _ONE)",
            "(fraction + draw >= _HALF)",
            f"{_QUANTIZE}::test_every_code_and_every_boundary_rounds_exactly",
        ),
    ),
    *mutants_of(
        f"{_BACKENDS}/scales.py",
        _QUANTIZE,
        (
            "the mean of a map counts the padding",
            COUPLING,
            "    if x.ndim != 4:\n        return torch.full",
            "    if True:\n        return torch.full",
            f"{_QUANTIZE}::test_padding_changes_neither_codes_nor_scale_of_a_clipped_format",
        ),
        (
            "the mean of a row is that of the batch",
            COUPLING,
            "top = clip * (squares.double() / _extents(x).double()).sqrt()",
            "top = clip * (squares.double() / _extents(x).double()).mean().sqrt()",
            f"{_QUANTIZE}::test_a_clipped_scale_does_not_depend_on_company_or_order",
        ),
        (
            "the mean of a map counts lines of the batch's longest record",
            COUPLING,
            "return x.shape[1] * lines * columns",
            "return x.shape[1] * lines.amax() * columns",
            f"{_QUANTIZE}::test_a_maps_mean_is_over_no_line_and_no_column_of_zeros_at_its_end",
        ),
    ),
    *mutants_of(
        f"{_BACKENDS}/reference.py",
        "tests/engine/test_clip.py",
        (
            "norms of groups are not added",
            SENSITIVITY,
            "return (grams[0] * grams[1]).sum((1, 2, 3))",
            "return (grams[0] * grams[1]).sum((2, 3)).amax(1)",
            f"{_CONFORMANCE}::test_norms_of_values_are_never_below",
        ),
        (
            "norms on one position leave out groups",
            SENSITIVITY,
            "return (squares_of(x_BGD) * squares_of(g_BGO)).sum(1)",
            "return (squares_of(x_BGD) * squares_of(g_BGO)).amax(1)",
            f"{_CONFORMANCE}::test_norms_of_values_are_never_below",
        ),
        (
            "codes are multiplied in float32 where it cannot hold the sums",
            SENSITIVITY,
            "num_terms * max_code**2 <= _FLOAT32_EXACT",
            "num_terms * max_code <= _FLOAT32_EXACT",
            f"{_CONFORMANCE}::test_large_sums_are_rounded_once",
        ),
        (
            "a product's scale is the mean of the batch",
            COUPLING,
            "        y = scaled(y, x.scale, self._scale)\n",
            "        y = scaled(y, x.scale.mean().expand(len(x.scale)), self._scale)\n",
            f"{_CONFORMANCE}::test_rows_stand_alone",
        ),
    ),
    *mutants_of(
        f"{_BACKENDS}/gemm_sum.py",
        "tests/engine/test_contributions.py",
        (
            "operands that wait are forgotten",
            SENSITIVITY,
            "        if self._x:\n            self._flush()\n",
            "        if False:\n            self._flush()\n",
            "tests/engine/test_contributions.py::test_what_waited_is_what_is_added",
        ),
        (
            "operands that wait are added with the last weights",
            SENSITIVITY,
            "self._g.append(g * weights_B[:, None, None, None])",
            "self._g.append(g * weights_B[-1])",
            "tests/engine/test_contributions.py::test_what_waited_is_what_is_added",
        ),
        (
            "outer products are added without their weights",
            SENSITIVITY,
            "self._total.addmm_((some_narrow * some_weights).t(), some_wide)",
            "self._total.addmm_(some_narrow.t(), some_wide)",
            "tests/engine/test_contributions.py::test_a_sum_of_outer_products_is_that_of_all_examples",
        ),
        (
            "a total in one order takes the place of that in the other",
            SENSITIVITY,
            "self._totals[in_patch_order] = total",
            "self._totals = {in_patch_order: total}",
            "tests/engine/test_contributions.py::test_each_size_is_added_by_the_way_that_suits_it",
        ),
        (
            "what waited is added twice",
            SENSITIVITY,
            "self._x, self._g, self._positions = [], [], 0",
            "self._positions = 0",
            "tests/engine/test_contributions.py::test_what_waited_is_what_is_added",
        ),
    ),
    *mutants_of(
        f"{_BACKENDS}/algebra.py",
        (_CONFORMANCE, "tests/engine/test_clip.py"),
        (
            "norms of rows lose their last value",
            SENSITIVITY,
            "rows = gradients.reshape(len(gradients), -1, width)",
            "rows = gradients.reshape(len(gradients), -1, width)[..., : max(width - 1, 1)]",
            "tests/engine/test_clip.py::test_quantized_or_not_the_sum_is_that_of_its_examples_and_each_is_at_most_c",
        ),
        (
            "the margin for round-off is a thousandth of what it has to be",
            SENSITIVITY,
            "ROUND_OFF = 2.0**-17",
            "ROUND_OFF = 2.0**-27",
            "tests/engine/test_clip.py::test_long_rows_of_one_value_do_not_exceed_c",
        ),
        (
            "oneDNN sums over all positions at once",
            SENSITIVITY,
            "_TERMS = 256",
            "_TERMS = 65536",
            "tests/backends/test_algebra.py::test_a_sum_of_equal_terms_errs_less_than_is_allowed_for",
        ),
    ),
    *mutants_of(
        f"{_BACKENDS}/precision.py",
        "tests/engine/test_ieee.py",
        (
            "norms and sums are formed in the user's own precision",
            SENSITIVITY,
            "                _set(unit, operation, wanted)\n",
            "                pass\n",
            "tests/engine/test_ieee.py::test_no_contribution_exceeds_the_clipping_norm_whatever_the_user_allows",
        ),
    ),
    *mutants_of(
        "src/dpquant/rounding.py",
        "tests/test_rounding.py",
        (
            "all records round alike",
            COUPLING,
            "return _finalized((record_ids + 1) * _STEP + _as_int64(key))",
            "return _finalized((0 * record_ids + 1) * _STEP + _as_int64(key))",
        ),
        (
            "rows' keys do not follow from the secret",
            SECRET,
            "return _finalized((record_ids + 1) * _STEP + _as_int64(key))",
            "return _finalized((record_ids + 1) * _STEP)",
        ),
        (
            "lines of a map depend on how many there are",
            COUPLING,
            "return _finalized(row_keys[:, None] + counter * _STEP)",
            "return _finalized(row_keys[:, None] + counter.flip(0) * _STEP)",
        ),
        (
            "parts of a key are joined without their lengths",
            SECRET,
            'digest.update(tag + len(data).to_bytes(8, "little") + data)',
            "digest.update(tag + data)",
        ),
        ("half of the key is not used", SECRET, "    h = h ^ high\n", ""),
    ),
]
