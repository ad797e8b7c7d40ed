# SPDX-License-Identifier: Apache-2.0
"""Processes of a run as threads of this one, which take turns: one walks on until it has come to an exchange.

They exchange what processes do, without sockets, so that seven cost as little as two. `tests/distributed` has real
ones.
"""

import dataclasses
import threading

import torch

from dpquant.backends.choose import Choices
from dpquant.errors import GroupError


class World:
    """What the threads share: the turn to walk, the values of one exchange, and which exchanges each has made."""

    def __init__(self, size):
        self.turn, self.met = threading.Lock(), threading.Barrier(size, timeout=60)
        self.values, self.made = [None] * size, [[] for _ in range(size)]


@dataclasses.dataclass
class Thread:
    """The group as one of the threads sees it."""

    rank: int
    size: int
    world: World

    def from_first(self, value):
        return self._swapped("first", value)[0]

    def from_all(self, value):
        return self._swapped("all", value)

    def exchanged(self, flat):
        sent = self._swapped("exchange", flat.clone())
        assert len({(one.dtype, one.shape) for one in sent}) == 1, "processes would read beyond what was sent"
        return torch.stack([one.view(self.size, -1)[self.rank] for one in sent])

    def gathered(self, part):
        parts = self._swapped("gather", part.clone())
        assert len({(one.dtype, one.shape) for one in parts}) == 1, "processes would read beyond what was sent"
        return torch.cat(parts)

    def _swapped(self, what, value):
        self.world.made[self.rank].append(what)
        self.world.values[self.rank] = value
        self._meet()
        values = list(self.world.values)
        self._meet()
        return values

    def _meet(self):
        self.world.turn.release()
        try:
            self.world.met.wait()
        except threading.BrokenBarrierError:
            raise GroupError("Expected all processes of the run to answer; got one that has ended.") from None
        finally:
            self.world.turn.acquire()


def each(size, work, *, group=Thread):
    """Return `work(group)` of every thread, in their order, an exception where it raises, and what was exchanged."""
    world, results = World(size), [None] * size

    def walk(rank):
        with world.turn:
            try:
                results[rank] = work(group(rank, size, world))
            except Exception as error:
                results[rank] = error
                world.met.abort()

    with Choices().active():
        threads = [threading.Thread(target=walk, args=(rank,)) for rank in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return results, world.made
