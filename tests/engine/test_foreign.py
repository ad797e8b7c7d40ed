# SPDX-License-Identifier: Apache-2.0
"""Weights that another library has quantized are refused, by a sentence that says what to do."""

import pytest
import torch
from torch import nn

import dpquant
from dpquant.errors import ModelError

Linear4bit = type("Linear4bit", (nn.Linear,), {"__module__": "bitsandbytes.nn.modules"})
AffineTensor = type("AffineTensor", (torch.Tensor,), {"__module__": "torchao.dtypes"})


class Codes(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 2, dtype=torch.uint8), requires_grad=False)


def of_tensors():
    layer = nn.Linear(2, 2)
    layer.weight = nn.Parameter(torch.zeros(2, 2).as_subclass(AffineTensor), requires_grad=False)
    return layer


@pytest.mark.parametrize("make", [lambda: Linear4bit(2, 2), Codes, of_tensors], ids=["module", "type", "tensor"])
def test_weights_that_another_library_has_quantized_are_refused(make):
    with pytest.raises(ModelError, match=r"got 0 \(.*another library has quantized.*quantization_config"):
        dpquant.prepare(nn.Sequential(make(), nn.Linear(2, 2)))


def test_a_class_of_another_home_is_not():
    mine = type("Linear4bit", (nn.Linear,), {"__module__": "awqward.layers"})
    dpquant.prepare(nn.Sequential(mine(2, 2)))
