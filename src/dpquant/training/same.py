# SPDX-License-Identifier: Apache-2.0
"""Whether the processes of a run still compute the same: started with the same facts, and with equal parameters.

Nothing of what is compared is shown, because a number of records is private.
"""

import hashlib
import json
from collections.abc import Mapping

import torch
from torch import nn

from dpquant.errors import GroupError, SettingError
from dpquant.training.distributed import Group

EVERY = 100  # steps between two comparisons of parameters, beside the one at an epoch's end


def check_same(group: Group, facts: Mapping[str, str]) -> None:
    """Check that all processes were started on the same run.

    Args:
      group: the processes.
      facts: {what: its value, which is sent as a hash}.
    Raises:
      SettingError: on every process, if one has another value. The message says of what, and not which.
    """
    if group.size == 1:
        return
    own = {what: hashlib.sha256(value.encode()).hexdigest() for what, value in facts.items()}
    everywhere = [json.loads(answer) for answer in group.from_all(json.dumps(own).encode())]
    for rank, theirs in enumerate(everywhere):
        if other := [what for what in everywhere[0] if theirs.get(what) != everywhere[0][what]]:
            raise SettingError(
                f"Expected every process to be started on the same run; got another {other[0]} on process {rank} than "
                "on process 0. Their sums would belong to different models. Start all with the same arguments, data "
                "and initial parameters (torch.manual_seed before the model is made)."
            )


def check_parameters(group: Group, model: nn.Module) -> None:
    """Check that all processes have the same parameters and buffers, bit for bit.

    Raises:
      GroupError: on every process, if one has others.
    Privacy: post-processing.
    """
    if group.size == 1:
        return
    hashes = group.from_all(parameters_hash(model).encode())
    for rank, one in enumerate(hashes):
        if one != hashes[0]:
            raise GroupError(
                f"Expected equal parameters on all processes; got others on process {rank} than on process 0. They "
                "take the same steps, so that the machine, an optimizer's own random numbers or a change from outside "
                "is the cause. What was charged stays charged. Resume from the last checkpoint."
            )


def parameters_hash(model: nn.Module) -> str:
    """Return a hash of a model's parameters and buffers, with names, types and shapes."""
    found = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted({**dict(model.named_parameters()), **dict(model.named_buffers())}.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor.numel():
            bits = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
            found.update(bits.numpy())
    return found.hexdigest()
