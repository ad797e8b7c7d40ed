# SPDX-License-Identifier: Apache-2.0
"""Whether a data set and a network fit into this machine's memory, from public numbers, before they are allocated."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dpquant.data.sizes import public_size
from dpquant.errors import SettingError
from dpquant.machine import memory_gib
from dpquant.runs.launched import Launch
from dpquant.runs.settings import TrainSettings

_GIB = 2**30
_COPIES = 4  # of the parameters: themselves, their summed gradients, noise, and the least that an optimizer keeps
_BYTES_A_PIXEL = {"cifar10": 3, "gtsrb": 6}  # of the records in memory; the others that are published have one
_BYTES_A_FOLDERS_PIXEL = 6


def check_data_fits(settings: TrainSettings, memory: float | None = None) -> None:
    """Check that records of the settings' image_size fit into memory. Reads no data.

    Args:
      settings: of the run.
      memory: GiB that the process may use; None: those of this machine.
    Raises:
      SettingError: they do not.
    """
    side, memory = settings.image_size, memory or memory_gib()
    published = public_size(settings.data)
    records = published or settings.records
    if side is None or memory is None or (records is None and settings.sample_rate is None):
        return
    records = records or settings.batch_size / (settings.sample_rate or 1)
    if settings.partition == "range":
        records /= Launch.here().size  # each process holds its own part
    pixel = _BYTES_A_PIXEL.get(settings.data, 1) if published else _BYTES_A_FOLDERS_PIXEL
    needed = records * side**2 * pixel / _GIB
    if needed > memory:
        raise SettingError(
            f"Expected records that fit into the memory of {memory:.0f} GiB; got image_size={side}, with which they "
            f"take {needed:,.0f} GiB. They are held in memory. Give a smaller image_size."
        )


def check_network_fits(build: Callable[[], nn.Module], inputs: Tensor, what: str, memory: float | None = None) -> None:
    """Check that a network's parameters, and what it computes for some examples, fit into memory.

    Args:
      build: makes the network; called on the meta device, where tensors have shapes and no memory.
      inputs: a batch on the meta device.
      what: the settings on which its size depends, for the message.
      memory: GiB that the process may use; None: those of this machine.
    Raises:
      SettingError: they do not.
    """
    memory = memory or memory_gib()
    if memory is None:
        return
    try:
        needed = _bytes(build, inputs) / _GIB
    except (RuntimeError, OverflowError) as error:
        if "overflow" not in str(error).lower():
            return  # it does not run on these inputs, which the checks of the network itself explain
        needed = float("inf")
    if needed > memory:
        raise SettingError(
            f"Expected a network that fits into the memory of {memory:.0f} GiB; got {what}, which takes "
            f"{needed:,.0f} GiB or more. The machine would stop. Give smaller ones."
        )


@torch.no_grad()
def _bytes(build: Callable[[], nn.Module], inputs: Tensor) -> float:
    """Return the bytes of a network's parameters, their copies, and all outputs of its layers."""
    with torch.device("meta"):
        network = build()
        elements = [_COPIES * sum(p.numel() for p in network.parameters()), inputs.numel()]
        for module in network.modules():
            if not list(module.children()):
                module.register_forward_hook(lambda _m, _x, output: elements.append(output.numel()))
        network(inputs)
    return 4.0 * sum(elements)
