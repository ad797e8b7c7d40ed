# SPDX-License-Identifier: Apache-2.0
"""A stand-in for torch.cuda on machines without a GPU: it counts, waits, and remembers what it was asked."""

import torch


class Gpus:
    """GPUs of these compute capabilities.

    Attributes:
      queued: seconds of work that nobody has waited for yet.
      waited: the devices that were waited for.
      held, peak: bytes of tensors.
    """

    def __init__(self, *capabilities: tuple[int, int]):
        self.capabilities = capabilities
        self.queued, self.held, self.peak = 0.0, 0, 0
        self.waited: list[torch.device | None] = []

    def is_available(self) -> bool:
        return bool(self.capabilities)

    def is_initialized(self) -> bool:
        return bool(self.capabilities)

    def device_count(self) -> int:
        return len(self.capabilities)

    def get_device_capability(self, index: int) -> tuple[int, int]:
        return self.capabilities[index]

    def get_device_name(self, index: int) -> str:
        return f"Test {self.capabilities[index]}"

    def synchronize(self, device: torch.device | None) -> None:
        self.queued = 0.0
        self.waited.append(device)

    def memory_allocated(self, device: torch.device) -> int:
        return self.held

    def max_memory_allocated(self, device: torch.device) -> int:
        return self.peak

    def reset_peak_memory_stats(self, device: torch.device) -> None:
        self.peak = self.held
