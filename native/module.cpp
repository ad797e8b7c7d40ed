// SPDX-License-Identifier: Apache-2.0
//
// The native module: each file binds its own functions. They are optimisations only; the Python module named in each file
// defines the results.

#include <nanobind/nanobind.h>

namespace dpquant {
void bind_attention(nanobind::module_ &m);
void bind_codes(nanobind::module_ &m);
void bind_convolutions(nanobind::module_ &m);
void bind_direct(nanobind::module_ &m);
void bind_grams(nanobind::module_ &m);
void bind_noise(nanobind::module_ &m);
void bind_norms(nanobind::module_ &m);
void bind_quantizer(nanobind::module_ &m);
void bind_sums(nanobind::module_ &m);
}

NB_MODULE(_native, m) {
    m.doc() = "The loops of dpquant that profiling proved to matter. Python modules state what they compute.";
    dpquant::bind_attention(m);
    dpquant::bind_codes(m);
    dpquant::bind_convolutions(m);
    dpquant::bind_direct(m);
    dpquant::bind_grams(m);
    dpquant::bind_noise(m);
    dpquant::bind_norms(m);
    dpquant::bind_quantizer(m);
    dpquant::bind_sums(m);
}
