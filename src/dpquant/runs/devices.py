# SPDX-License-Identifier: Apache-2.0
"""The device that a run computes on, from its setting: auto, cpu, cuda or cuda:N."""

from typing import Any

import torch

from dpquant.errors import SettingError
from dpquant.machine import check_threads, processor
from dpquant.runs.launched import Launch

OLDEST = (7, 0)
"""Lowest compute capability: older GPUs lack tensor cores, and current versions of torch and Triton leave them out."""


def device_of(
    name: str,
    cuda: Any = torch.cuda,
    *,
    built_for: str | None = torch.version.cuda,
    launch: Launch | None = None,
) -> torch.device:
    """Return the device that a setting names; `auto` is the first GPU or, without one, the CPU.

    Of several processes on a machine each takes a GPU of its own.

    Args:
      name: auto, cpu, cuda or cuda:N.
      cuda: an object like torch.cuda.
      built_for: the version of CUDA that torch was built for; None: for CPUs only.
      launch: how this process was started; None: as the environment says.
    Raises:
      SettingError: there is no such GPU, or it is too old, or several processes would share it.
    """
    launch = launch or Launch.here()
    if name == "cpu" or (name == "auto" and not cuda.is_available()):
        return torch.device("cpu")
    number = int(name.partition(":")[2] or launch.local_rank)
    if ":" in name and launch.local_size > 1:
        raise SettingError(
            f"Expected device=cuda for {launch.local_size} processes on a machine; got device={name}. They would share "
            "one GPU. Give --device cuda, with which each takes its own."
        )
    if not cuda.is_available():
        why = "this torch is built for CPUs only" if built_for is None else "there is no GPU, or no driver for it"
        raise SettingError(
            f"Expected device={name} to be a GPU of this machine; got none that torch sees: {why}. Nothing was read. "
            "Give --device cpu, or install a driver and a torch that is built for CUDA."
        )
    if number >= cuda.device_count():
        raise SettingError(
            f"Expected device=cuda:N with N in 0 .. {cuda.device_count() - 1}; got device={name}. torch sees no others "
            "(CUDA_VISIBLE_DEVICES can hide some). Give one of them."
        )
    capability = cuda.get_device_capability(number)
    if capability < OLDEST:
        needed, found = (".".join(map(str, one)) for one in (OLDEST, capability))
        raise SettingError(
            f"Expected a GPU of compute capability {needed} or newer; got device={name}, "
            f"{cuda.get_device_name(number)} of {found}. Its kernels are not built any more. Give --device cpu."
        )
    return torch.device("cuda", number)


def use_threads(threads: int | None, launch: Launch | None = None) -> None:
    """Compute with so many threads; None: all cores, of which each process that torchrun starts takes its part.

    Raises:
      SettingError: they are too many for this machine.
    """
    if threads is None:
        threads = (launch or Launch.here()).threads(processor()[2])
    else:
        check_threads(threads)
    if threads is not None:
        torch.set_num_threads(threads)


def described(device: torch.device, cuda: Any = torch.cuda) -> str:
    """Return a device in words: the name of a GPU beside its number."""
    return str(device) if device.type != "cuda" else f"{device} ({cuda.get_device_name(device.index)})"
