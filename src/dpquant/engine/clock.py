# SPDX-License-Identifier: Apache-2.0
"""Where the time of a step goes, layer by layer, while the step runs.

A layer that runs alone is not what it is in a step: caches are empty, memory comes anew from the kernel, and something
has to make its output's gradient. So layers are timed where they are.
"""

import collections
import contextlib
import time
from collections.abc import Callable, Iterator


class Clock:
    """Adds up seconds by name, microbatch by microbatch: the first one prepares the weights for all of them.

    Attributes:
      microbatches: {name: seconds} of each, in their order.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter):
        """Begin with nothing; `now` gives seconds."""
        self._now = now
        self.microbatches: list[dict[str, float]] = []

    def begin(self) -> None:
        """What is timed from now on belongs to the next microbatch."""
        self.microbatches.append(collections.defaultdict(float))

    @contextlib.contextmanager
    def timing(self, name: str) -> Iterator[None]:
        """What the block takes counts for the name."""
        began = self._now()
        try:
            yield
        finally:
            self.microbatches[-1][name] += self._now() - began
