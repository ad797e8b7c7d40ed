# SPDX-License-Identifier: Apache-2.0
"""Bugs planted in the C++ kernels of every x86 processor of the last ten years, and in those for AVX-512 VNNI.

The latter survive where no such processor runs the tests.
"""

from mutants.mutant import COUPLING, NOISE, SENSITIVITY, mutants_of

_PRODUCTS = "tests/backends/test_native_products.py"
_CONVOLUTIONS = "tests/backends/test_native_convolutions.py"

MUTANTS = [
    *mutants_of(
        "native/noise.cpp",
        "tests/privacy/test_noise.py",
        (
            "native noise covers a quarter of the circle",
            NOISE,
            "std::bit_cast<uint64_t>(length) ^ ((b << 62) & SIGN)",
            "std::bit_cast<uint64_t>(length)",
        ),
        (
            "native noise repeats every 4,096 pairs",
            NOISE,
            "fill_pairs(words + 2 * start, std::min",
            "fill_pairs(words, std::min",
        ),
        (
            "the last of an odd number of values repeats the first",
            NOISE,
            "fill_pairs(words + 2 * pairs, 1, std, last)",
            "fill_pairs(words, 1, std, last)",
        ),
        (
            "both values of a pair are the same",
            NOISE,
            "static_cast<float>(std * second)",
            "static_cast<float>(std * first)",
        ),
        (
            "native noise is cut off at three deviations",
            NOISE,
            "noise[2 * i] = static_cast<float>(std * first);",
            "noise[2 * i] = static_cast<float>(std * std::clamp(first, -3.0, 3.0));",
        ),
    ),
    *mutants_of(
        "native/quantize.cpp",
        "tests/backends/test_quantize.py",
        (
            "the largest magnitude is remembered from row to row",
            COUPLING,
            "std::atomic<uint32_t> largest{0};",
            "static std::atomic<uint32_t> largest{0};",
        ),
        ("every row draws by the first row's key", COUPLING, "inverse, keys[row], lines,", "inverse, keys[0], lines,"),
        ("every line of a map draws alike", COUPLING, "lines.own_keys ? line_key(row_key, line) : row_key", "row_key"),
        (
            "the native mean of a map counts the padding",
            COUPLING,
            "if (!lines.own_keys) return row_size;",
            "return row_size;",
        ),
        (
            "a row that is not finite has native scale zero",
            SENSITIVITY,
            "finite ? 0.0f : std::numeric_limits<float>::quiet_NaN()",
            "0.0f",
        ),
    ),
    *mutants_of(
        "native/attention.cpp",
        "tests/engine/test_fused_attention.py",
        (
            "every example attends to the keys of the first",
            COUPLING,
            ".k = of(k), .v = of(v), .mask = of(mask), .out",
            ".k = rows_of(k, 0, i % s.heads), .v = of(v), .mask = of(mask), .out",
        ),
        (
            "gradients of keys are added to those of another head",
            COUPLING,
            "std::fill(head.grad_k[key], head.grad_k[key] + s.features, 0.0f);",
            "",
        ),
        (
            "keys that are not there take part",
            COUPLING,
            "std::fill(scores + seen, scores + width, LEAST);",
            "std::fill(scores + seen, scores + s.keys, LEAST);",
        ),
        (
            "a query sees the key after it",
            COUPLING,
            "s.causal ? std::min(begin + t + 1, s.keys) : s.keys",
            "s.causal ? std::min(begin + t + 2, s.keys) : s.keys",
        ),
        (
            "scores that are no numbers count as zero",
            SENSITIVITY,
            "return x < -87.0f ? V{} : value;",
            "return x >= -87.0f ? value : V{};",
        ),
    ),
    *mutants_of(
        "native/group_norm.cpp",
        "tests/engine/test_group_norm.py",
        (
            "a mean begins where that of the last example ended",
            COUPLING,
            "    std::fill(total, total + map.channels, 0.0);\n",
            "",
        ),
        (
            "gradients of a norm are those of all examples so far",
            COUPLING,
            "    std::fill(sum_gx, sum_gx + map.channels, 0.0);\n",
            "",
        ),
        (
            "every example is normalised by the first one's statistics",
            COUPLING,
            "weight, mean.data() + b * groups,\n                         rstd.data() + b * groups, map,",
            "weight, mean.data(), rstd.data(), map,",
        ),
    ),
    *mutants_of(
        "native/code_products_avx2.cpp",
        _PRODUCTS,
        (
            "examples are added with each other's clip factors",
            SENSITIVITY,
            "weights[first + b]};",
            "weights[b]};",
            f"{_PRODUCTS}::test_many_examples_are_added_each_with_its_own_weight",
        ),
        (
            "an example's squares leave out half of the values",
            SENSITIVITY,
            "squares = _mm256_fmadd_pd(low, low, _mm256_fmadd_pd(high, high, squares));",
            "squares = _mm256_fmadd_pd(low, low, squares);",
            f"{_PRODUCTS}::test_many_examples_are_added_each_with_its_own_weight",
        ),
        (
            "a packed example is used again for the next",
            COUPLING,
            "packed[static_cast<size_t>(b)], s, i, j, c), o,",
            "packed[0], s, i, j, c), o,",
            f"{_PRODUCTS}::test_many_examples_are_added_each_with_its_own_weight",
        ),
    ),
    *mutants_of(
        "native/code_products_vnni.cpp",
        f"{_PRODUCTS}::test_many_examples_are_added_each_with_its_own_weight",
        (
            "on VNNI, examples are added with each other's clip factors",
            SENSITIVITY,
            "_mm512_set1_ps(weights[first + b])};",
            "_mm512_set1_ps(weights[b])};",
        ),
        (
            "on VNNI, a packed example is used again for the next",
            COUPLING,
            "const Packed &p = packed[static_cast<size_t>(b)];",
            "const Packed &p = packed[0];",
        ),
        (
            "on VNNI, an example's squares leave out half of the values",
            SENSITIVITY,
            "        squares[2 * v + 1] = _mm512_fmadd_pd(high, high, squares[2 * v + 1]);\n",
            "",
        ),
        (
            "on VNNI, the last outputs of a weight are left out of norms and sums",
            SENSITIVITY,
            "    for (; o < last; ++o) block<1, n_vec>(p, x, s, o, sink);\n",
            "",
            f"{_PRODUCTS}::test_the_kernels_of_this_processor_are_exact",
        ),
        (
            "on VNNI, squares of an example go on where those of the last one ended",
            COUPLING,
            "    Store sink{",
            "    thread_local Store sink{",
        ),
    ),
    *mutants_of(
        "native/fours.hpp",
        f"{_CONVOLUTIONS}::test_long_sums_of_the_largest_codes_are_exact",
        (
            "on VNNI, sums saturate before the excess is taken off",
            SENSITIVITY,
            "_mm512_dpbusd_epi32(sum, unsigned_bytes",
            "_mm512_dpbusds_epi32(sum, unsigned_bytes",
        ),
    ),
    *mutants_of(
        "native/code_convolutions_vnni.cpp",
        f"{_CONVOLUTIONS}::test_many_examples_are_the_references_bits",
        (
            "on VNNI, every example is multiplied by the first one's scale",
            COUPLING,
            "w.scales[w.positions.example[static_cast<size_t>(first + r)]]",
            "w.scales[0]",
        ),
        (
            "on VNNI, all examples that are convolved at once are the first of them",
            COUPLING,
            "fill_plane(s, x + g * s.channels, x + x_size, own.data() + b * s.plane());",
            "fill_plane(s, x + g * s.channels, x + x_size, own.data());",
        ),
    ),
    *mutants_of(
        "native/code_products.cpp",
        _PRODUCTS,
        (
            "each thread's examples get the clip factors of the first",
            SENSITIVITY,
            "kernel, weights.data() + first,",
            "kernel, weights.data(),",
            f"{_PRODUCTS}::test_many_examples_are_added_each_with_its_own_weight",
        ),
    ),
    *mutants_of(
        "native/code_grams.cpp",
        _PRODUCTS,
        (
            "the Gram matrix of the last example is added to",
            COUPLING,
            "patches.assign(static_cast<size_t>(length * length), 0);",
            "patches.resize(static_cast<size_t>(length * length), 0);",
            f"{_PRODUCTS}::test_the_kernels_of_this_processor_are_exact",
        ),
        (
            "a norm by Gram matrices leaves out the last position",
            SENSITIVITY,
            "for (int64_t t = 0; t < length; ++t) sum +=",
            "for (int64_t t = 0; t + 1 < length; ++t) sum +=",
            f"{_PRODUCTS}::test_the_kernels_of_this_processor_are_exact",
        ),
    ),
    *mutants_of(
        "native/float_products.cpp",
        ("tests/backends/test_conformance.py", "tests/engine/test_clip.py"),
        (
            "every example's gradient is formed with the first one's",
            COUPLING,
            "run(x.data() + b * x_size, g.data() + b * g_size,",
            "run(x.data() + b * x_size, g.data(),",
        ),
        (
            "a depthwise gradient begins with the sums of the example before it",
            COUPLING,
            "    std::vector<float> sums(static_cast<size_t>(taps * s.groups));  // a tap, a channel",
            "    static thread_local std::vector<float> sums;\n    sums.resize(static_cast<size_t>(taps * s.groups));",
            f"{_PRODUCTS}::test_direct_products_of_depthwise_convolutions_are_those_of_patches",
        ),
    ),
]
