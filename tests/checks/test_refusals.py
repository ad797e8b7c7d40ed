# SPDX-License-Identifier: Apache-2.0
"""Wrapped, compiled, sharded and checkpointed models are refused by type, with the way out."""

import pytest
import torch
from torch import nn

from dpquant.checks.refusals import check_trainable
from dpquant.errors import ModelError


class Checkpointed(nn.Linear):
    is_gradient_checkpointing = True


def compiled():
    model = nn.Linear(2, 2)
    model._compiled_call_impl = model.forward  # as `compile()` leaves it, which takes seconds
    return model


FSDP = type("FullyShardedDataParallel", (nn.Module,), {})


def sharded():
    model = FSDP()
    model.inner = nn.Linear(2, 2)
    return model


WRAPPED = {
    "torch.compile": (lambda: torch.compile(nn.Linear(2, 2)), "_orig_mod"),
    "compile()": (compiled, "without calling compile"),
    "data parallel": (lambda: nn.DataParallel(nn.Linear(2, 2)), "model.module"),
    "sharded": (sharded, "before it is sharded"),
    "checkpointing": (lambda: Checkpointed(2, 2), "gradient_checkpointing_disable"),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_what_hides_the_layers_is_refused_with_the_way_out(name):
    make, way_out = WRAPPED[name]
    for model in (make(), nn.Sequential(make())):
        with pytest.raises(ModelError, match=way_out):
            check_trainable(model)


def test_a_model_that_could_checkpoint_is_accepted():
    model = Checkpointed(2, 2)
    model.is_gradient_checkpointing = False
    check_trainable(model)
