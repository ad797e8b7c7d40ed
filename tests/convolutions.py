# SPDX-License-Identifier: Apache-2.0
"""Convolutions of every kind, and codes for them."""

import torch
import torch.nn.functional as F
from hypothesis import strategies as st

from dpquant.backends.geometry import Geometry
from dpquant.backends.qtensor import QTensor


def codes(shape, max_code, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-max_code, max_code + 1, shape, generator=generator, dtype=torch.int64).to(torch.int8)


def shifted(values):
    moved = (values.to(torch.int16) + 128).to(torch.uint8).contiguous(memory_format=torch.channels_last)
    return QTensor(codes=moved, scale=torch.ones(len(values)), zero_point=128)


DEPTHWISE = 35  # channels: two vectors of sixteen and three more


@st.composite
def convolutions(draw):
    """(geometry, weight shape, input size): every combination that has an output, some of them depthwise."""
    groups = draw(st.sampled_from([1, 1, 2, 3, DEPTHWISE]))
    kernel = draw(st.tuples(st.integers(1, 4), st.integers(1, 6 if groups == DEPTHWISE else 4)))
    geometry = Geometry(
        kernel=kernel,
        stride=draw(st.tuples(st.integers(1, 3), st.integers(1, 3))),
        padding=draw(st.tuples(st.integers(0, 3), st.integers(0, 3))),
        dilation=draw(st.tuples(st.integers(1, 2), st.integers(1, 2))),
        groups=groups,
    )
    size = tuple(
        draw(st.integers(max(1, d * (k - 1) + 1 - 2 * p), 12))
        for k, p, d in zip(kernel, geometry.padding, geometry.dilation, strict=True)
    )
    outputs, inputs = (1, 1) if groups == DEPTHWISE else (draw(st.integers(1, 3)), draw(st.integers(1, 4)))
    return geometry, (groups * outputs, inputs, *kernel), size


def exactly(x, weight, g):
    return F.conv2d(x.double(), weight.double(), None, g.stride, g.padding, g.dilation, g.groups)
