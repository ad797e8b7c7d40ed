# SPDX-License-Identifier: Apache-2.0
"""Wall time of each layer within a step, measured while the step runs.

Layers are not timed in isolation, because an isolated layer does not take the time that it takes in a step: caches are
in another state, memory is freshly mapped by the operating system, and a synthetic output gradient is needed.
"""

import collections
import contextlib
from collections.abc import Callable, Iterator

from dpquant import machine


class Clock:
    """Accumulates wall time per name and microbatch. The first microbatch of a step also packs the weights.

    Attributes:
      microbatches: {name: seconds} of each microbatch, in the order in which they ran.
    """

    def __init__(self, now: Callable[[], float] = machine.now):
        """Begin with nothing; `now` gives seconds, once all work is done."""
        self._now = now
        self.microbatches: list[dict[str, float]] = []

    def begin(self) -> None:
        """Begin the next microbatch; later timings are added to it."""
        self.microbatches.append(collections.defaultdict(float))

    @contextlib.contextmanager
    def timing(self, name: str) -> Iterator[None]:
        """Add the wall time of the block to the seconds of `name`."""
        began = self._now()
        try:
            yield
        finally:
            self.microbatches[-1][name] += self._now() - began
