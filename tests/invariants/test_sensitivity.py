# SPDX-License-Identifier: Apache-2.0
"""T2, T3: each example's part is at most C, and the sum is that of its parts, on records that nobody would choose.

Both together bound what one record can move, for every data set.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dpquant
from dpquant.backends.quantize import quantize_rows
from dpquant.engine.batches import microbatches
from dpquant.engine.clip import clipped_sum
from dpquant.engine.passes import Objective
from dpquant.formats import recipe
from dpquant.rounding import row_keys
from dpquant.training.impact import analysis_keys, impact_sum
from networks import loss, zoo


def flat(grads):
    return torch.cat([g.double().flatten() for g in grads.values()])


# Sensitivity: each example's part is at most C, and the sum is that of its parts. Both together bound what one record
# can move, for every data set.


@st.composite
def nasty_images(draw):
    """A few images: tiny, ordinary, huge, blank, repeated, denormal, flat or not finite."""
    count = draw(st.integers(0, 6))
    kinds = draw(st.lists(st.sampled_from(["normal", "flat", "spike", "nan", "inf"]), min_size=count, max_size=count))
    sizes = draw(st.lists(st.sampled_from([0.0, 1e-40, 1e-3, 1.0, 1e3, 1e6]), min_size=count, max_size=count))
    images = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(draw(st.integers(0, 9))))
    for image, kind, size in zip(images, kinds, sizes, strict=True):
        if kind == "flat":
            image.fill_(1.0)
        elif kind == "spike":
            image[0, 3, 4] = 1e4
        image *= size
        if kind in ("nan", "inf"):
            image[0, 0, 0] = float(kind)
    return images, torch.tensor([draw(st.integers(0, 4)) for _ in range(count)], dtype=torch.int64)


def quantized(name, format):
    model = dpquant.prepare(zoo()[name][0], format=format)
    dpquant.set_policy(model, dpquant.quantizable_layers(model))
    return model


NETS = {
    (name, format): quantized(name, format)
    for name in ("strided", "residual")
    for format in ("luq-fp4", "luq", "int4-clip", "int8", "mxfp4", "nvfp4")
}


def clipped(model, batch, max_grad_norm=1.0):
    """rows -> their clipped sum; records keep their ids whatever company they are in."""

    def summed(rows):
        rows = torch.as_tensor(rows, dtype=torch.int64)
        part = tuple(t[rows] for t in batch)
        out = clipped_sum(model, loss, part, max_grad_norm=max_grad_norm, record_ids=rows, step=0, seed=0)
        return flat(out.grads)

    return summed


def assert_a_sum_of_parts_of_at_most(bound, summed, count):
    whole, parts = summed(range(count)), [summed([i]) for i in range(count)]
    assert summed([]).abs().max() == 0
    assert all(part.norm() <= bound * (1 + 1e-6) for part in parts)
    assert (whole - sum(parts, torch.zeros_like(whole))).norm() <= 1e-4 * bound * max(count, 1)


@pytest.mark.always
@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.sampled_from(sorted(NETS)), nasty_images())
def test_clipped_gradients_are_a_sum_of_bounded_parts_whatever_the_records(net, batch):
    assert_a_sum_of_parts_of_at_most(1.0, clipped(NETS[net], batch), len(batch[1]))


@pytest.mark.always
@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.sampled_from(sorted(NETS)), nasty_images())
def test_clipped_impacts_are_a_sum_of_bounded_parts_whatever_the_records(net, batch):
    model = NETS[net]
    names = list(dpquant.quantizable_layers(model))

    def summed(rows):
        rows = torch.as_tensor(rows, dtype=torch.int64)
        part = tuple(t[rows] for t in batch)
        pieces = microbatches(part, rows, 8)
        out = impact_sum(Objective(model, loss), pieces, names=names, max_norm=0.2, keys=analysis_keys(0, 0, 2))
        return out.impacts

    assert_a_sum_of_parts_of_at_most(0.2, summed, len(batch[1]))


def mean_over_the_batch(summed):
    return lambda rows: summed(rows) / max(len(rows), 1)


def quantized_once_more(summed):
    """A second quantization, after the clip, with the sum's own scale."""

    def planted(rows):
        total = summed(rows).float()[None]
        role = recipe("luq-fp4").gradient
        return quantize_rows(total, role, row_keys(7, torch.zeros(1).long())).dequantize()[0]

    return planted


def clipped_after_adding(summed):
    return lambda rows: (total := summed(rows)) / max(total.norm().item(), 1.0)


@pytest.mark.parametrize("planted", [mean_over_the_batch, quantized_once_more, clipped_after_adding])
def test_a_sum_that_is_not_one_of_bounded_parts_is_caught(planted):
    batch = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 5
    honest = clipped(NETS["strided", "luq-fp4"], batch)
    assert_a_sum_of_parts_of_at_most(1.0, honest, 6)
    with pytest.raises(AssertionError):
        assert_a_sum_of_parts_of_at_most(1.0, planted(honest), 6)
