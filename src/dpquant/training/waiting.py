# SPDX-License-Identifier: Apache-2.0
"""How long the processes of a run wait for each other before one counts as lost.

    within a step     20 steps, and a minute at least: how long one takes has been measured before the first
    elsewhere         ten minutes, as process 0 tests and writes the model while the others wait

A step's charge is not within it: process 0 may come to it later than the others, by what it had to write. A group that
a program has initialised itself keeps the timeout that it was given.
"""

import contextlib
import datetime
import functools
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar

import torch.distributed as dist

TIMEOUT = datetime.timedelta(minutes=10)  # after which a process that does not answer counts as lost
SHORTEST = datetime.timedelta(minutes=1)
STEPS = 20
_own: datetime.timedelta | None = None  # timeout of the default group, if dpquant has initialised it

Result = TypeVar("Result")


class Timed(Protocol):
    """What knows the seconds of its steps; 0 if they have not been measured."""

    step_seconds: float


def initialised(timeout: datetime.timedelta) -> None:
    """Note that dpquant has initialised torch.distributed's default group, with this timeout."""
    global _own
    _own = timeout


def of_step(step_seconds: float) -> datetime.timedelta:
    """Return how long an exchange within a step waits, if a step takes so many seconds on synthetic records."""
    return max(SHORTEST, STEPS * datetime.timedelta(seconds=step_seconds))


def in_time(work: Callable[..., Result]) -> Callable[..., Result]:
    """Return a method of a `Timed` whose exchanges wait as those of a step; afterwards they wait as before."""

    @functools.wraps(work)
    def timed(self: Timed, *arguments: Any) -> Result:
        with _waiting(self.step_seconds):
            return work(self, *arguments)

    return timed


@contextlib.contextmanager
def _waiting(step_seconds: float) -> Iterator[None]:
    if _own is None or step_seconds == 0:
        yield
        return
    _set(of_step(step_seconds))
    try:
        yield
    finally:
        _set(_own)


def _set(timeout: datetime.timedelta) -> None:
    """Set the timeout of the default group's next exchanges."""
    if hasattr(dist, "set_timeout"):
        dist.set_timeout(timeout)
    else:  # before torch 2.14
        dist.distributed_c10d._set_pg_timeout(timeout)
