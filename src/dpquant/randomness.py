# SPDX-License-Identifier: Apache-2.0
"""Random numbers that a user's model, data set or collate function draws: dropout, layer drop, augmentation.

They must not follow from a public seed and a position. Without one record all later records stand one place earlier; if
they then meet other dropout masks, all their gradients change, and the clipped sum moves by much more than C. So every
draw is made a function of the run's secret key, the step, and either the record or nothing else:

    a draw with an axis of examples   the part of example i follows from (key, step, number of the draw, record id i)
    any other draw                    follows from (key, step, number of the draw): the same in every microbatch

Why that suffices: given the shared draws, an example's contribution is a function of its record and of draws that are
independent of all others'. Give each record that stays the draws it had: the two sums then differ by the one record's
contribution, at most C, and since nobody sees the draws, the mixture over them is as private as each of its parts.
Torch's CPU generator keeps 32 bits of a seed. That is enough here: an example's seed is its own, and another record's
masks say nothing about it.

The global generators of torch, numpy and random are given back as they were. Generators that a user's code owns are
replaced where torch is told of them, and out of reach where they are numpy's.
"""

import contextlib
import dataclasses
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dpquant.streams import derive_key, row_keys

_SEED_BITS = 2**32 - 1  # of a seed, torch's CPU generator keeps these


@contextlib.contextmanager
def seeded(key: int) -> Iterator[None]:
    """Seed the global generators of torch, numpy and random from a key until the block ends; then give them back.

    Privacy: reads no data.
    """
    before = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    on_devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    reseed(key)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.random.set_rng_state(before[2])
        if on_devices:
            torch.cuda.set_rng_state_all(on_devices)


def reseed(key: int) -> None:
    """Seed the global generators; only inside of `seeded`."""
    random.seed(key)
    np.random.seed([key >> 32 & _SEED_BITS, key & _SEED_BITS])
    torch.default_generator.manual_seed(key)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(key)


class Position:
    """Where the global generators stand, to see whether somebody has drawn from them."""

    def __init__(self) -> None:
        self._torch = torch.random.get_rng_state()
        self._python, self._arrays = random.getstate(), np.random.get_state(legacy=False)

    def torch_moved(self) -> bool:
        """Whether torch's CPU generator has been drawn from since."""
        return not torch.equal(self._torch, torch.random.get_rng_state())

    def moved(self) -> bool:
        """Whether any of the three has been drawn from since."""
        arrays = np.random.get_state(legacy=False)
        same = str(arrays) == str(self._arrays) and np.array_equal(arrays["state"]["key"], self._arrays["state"]["key"])
        return self.torch_moved() or not same or random.getstate() != self._python


class RecordDraws(TorchDispatchMode):
    """While it is active, torch's random operators draw as this file's head says.

    The axis of examples is the first that has as many entries as there are examples, or the first axis if it is a
    multiple (heads or views of an example that follow each other). Where that is a mistake, an example's draws depend
    on its place: the isolation check and the probe of each epoch see it.
    """

    def __init__(self, key: int, record_ids: Tensor):
        """Draws for the rows of one microbatch.

        Args:
          key: 64 bits, secret, of the step.
          record_ids: int64 `(B,)`.
        """
        super().__init__()
        self._key, self._ids, self._calls = key, record_ids.cpu(), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **(kwargs or {}))
        key = derive_key(self._key, "draw", self._calls)
        self._calls += 1
        kwargs = {name: value for name, value in (kwargs or {}).items() if name != "generator"}
        axis, width = self._examples_in(args, kwargs)
        if axis is None:
            _seed(derive_key(key, "shared"))
            return func(*args, **kwargs)
        seeds = row_keys(key, self._ids).tolist()
        parts = []
        for row, seed in enumerate(seeds):
            _seed(seed & _SEED_BITS)
            mine = [_part(arg, axis, row, width, len(seeds)) for arg in args]
            named = {name: _part(arg, axis, row, width, len(seeds)) for name, arg in kwargs.items()}
            parts.append(func(*mine, **named))
        if func._schema.is_mutable:
            return args[0]  # in place, on a view of its rows
        if isinstance(parts[0], tuple):
            return tuple(torch.cat(of_one, axis) for of_one in zip(*parts, strict=True))
        return torch.cat(parts, axis)

    def _examples_in(self, args: Any, kwargs: Any) -> tuple[int | None, int]:
        """The axis of examples in what is drawn and how many entries of it belong to one; None: there is none."""
        count = len(self._ids)
        shape = next(filter(None, map(_shape, (*args, *kwargs.values()))), ())
        if count in shape:
            return shape.index(count), 1
        if shape and shape[0] and shape[0] % count == 0:
            return 0, shape[0] // count
        return None, 0


@dataclasses.dataclass
class Drawing:
    """Whether a model draws random numbers, as dropout does: remembered once it was seen.

    Attributes:
      seen: True from the first draw on. From then on draws are made record by record, which takes time.
    """

    seen: bool = False


def drawn_by_record(compute: Callable[[], Tensor], key: int, record_ids: Tensor, drawing: Drawing) -> Tensor:
    """Compute something whose random numbers follow from records; only inside of `seeded(key)`.

    Args:
      compute: what is computed, for instance losses. It is called again if it is seen to draw for the first time.
      key: of the draws.
      record_ids: int64 `(B,)`, of the rows.
      drawing: what is known of the model.
    """
    if not drawing.seen:
        position = Position()
        computed = compute()
        if not position.torch_moved():
            return computed
        drawing.seen = True
        reseed(key)
    with RecordDraws(key, record_ids):
        return compute()


def _seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


def _shape(value: Any) -> tuple[int, ...] | None:
    """The shape of a tensor argument, or one that is given as a list of sizes."""
    if isinstance(value, Tensor):
        return tuple(value.shape)
    if isinstance(value, list | tuple) and value and all(isinstance(size, int) for size in value):
        return tuple(value)
    return None


def _part(value: Any, axis: int, row: int, width: int, count: int) -> Any:
    """What of an argument belongs to one example."""
    shape = _shape(value)
    if shape is None or len(shape) <= axis or shape[axis] != width * count:
        return value
    if isinstance(value, Tensor):
        return value.narrow(axis, row * width, width)
    return [width if place == axis else size for place, size in enumerate(shape)]
