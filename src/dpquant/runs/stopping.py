# SPDX-License-Identifier: Apache-2.0
"""Ends a run between two steps when the system or the user asks for it."""

import signal
import threading
from types import FrameType
from typing import Self

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopping:
    """Context in which the first SIGTERM or SIGINT is kept for the run to find, and a second one interrupts at once.

    Signals can be handled in the main thread alone; in another one the context does nothing.

    Attributes:
      asked: the signal that asked for an end; None so far.
    """

    def __init__(self):
        self.asked: signal.Signals | None = None

    def __enter__(self) -> Self:
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {one: signal.signal(one, self._keep) for one in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for one, handler in self._before.items():
            signal.signal(one, handler)

    def _keep(self, number: int, _frame: FrameType | None) -> None:
        if self.asked is not None:
            raise KeyboardInterrupt
        self.asked = signal.Signals(number)
