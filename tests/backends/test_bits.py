# SPDX-License-Identifier: Apache-2.0
"""The native kernels give the same bits on every processor: hashes that x86-64 and aarch64 (emulated) both gave."""

import types

import pytest

from bits import hashes
from dpquant.native import kernels

GIVEN = {
    "noise": "4ce9b56545fe1483b76bef2da0f3f9057a2d00171adb60e072fadc41167e32bd",
    "uniform, nearest": "9be39d6bab8b4168bb8ff2ea8c98df64744f9666a9d752b5a37f938a64c2c8d8",
    "uniform, stochastic": "d15286ac96ca013c7e1617dd2568dbabeab355b9e1e5340c81a39e18977300ee",
    "logarithmic": "f23a034073fab03acbd06b4d3a80f338caa18942f94710b2d1e73798d8e5dbee",
}
native = pytest.mark.skipif(kernels is None, reason="installed without the native module")


@native
def test_every_processor_gives_the_same_bits():
    assert hashes(kernels) == GIVEN


@native
def test_another_last_bit_would_be_seen():
    def nudged(words, noise, **given):
        kernels.fill_noise(words, noise, **given)
        noise.view("uint32")[7] ^= 1

    found = hashes(types.SimpleNamespace(fill_noise=nudged, quantize_rows=kernels.quantize_rows))
    assert found["noise"] != GIVEN["noise"] and found["logarithmic"] == GIVEN["logarithmic"]
