# SPDX-License-Identifier: Apache-2.0
"""Ends a run between two steps when the system or the user asks for it."""

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Self

import torch

from dpquant.training.distributed import Group

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopping:
    """Context in which the first SIGTERM or SIGINT is kept for the run to find, and a second one interrupts at once.

    Signals can be handled in the main thread alone; in another one the context does nothing. torchrun passes a signal
    on that its processes may have got already, so that one which follows within `echo` seconds is the same.

    Attributes:
      asked: the signal that asked for an end; None so far.
    """

    def __init__(self, echo: float = 0.0, *, clock: Callable[[], float] = time.monotonic):
        self.asked: signal.Signals | None = None
        self._echo, self._clock, self._since = echo, clock, 0.0

    def __enter__(self) -> Self:
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {one: signal.signal(one, self._keep) for one in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for one, handler in self._before.items():
            signal.signal(one, handler)

    def asked_anywhere(self, group: Group) -> int:
        """Return the number of the signal that has asked any process for an end, so that all end at the same step."""
        return int(group.gathered(torch.tensor([self.asked or 0])).max())

    def _keep(self, number: int, _frame: FrameType | None) -> None:
        if self.asked is None:
            self.asked, self._since = signal.Signals(number), self._clock()
        elif self._clock() >= self._since + self._echo:
            raise KeyboardInterrupt
