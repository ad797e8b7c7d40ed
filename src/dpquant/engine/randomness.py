# SPDX-License-Identifier: Apache-2.0
"""Keyed random numbers for a user's model, data set and collate function: dropout, layer drop, augmentation.

These random numbers must not be a function of a public seed and a position. Removing one record moves all later records
by one position; if they then get other dropout masks, all of their gradients change, and the clipped sum changes by
much more than C. So every draw is a function of the run's secret key, the step, and either the record or nothing else:

    a draw with an axis of examples   the part of example i follows from (key, step, number of the draw, record id i)
    any other draw                    follows from (key, step, number of the draw): equal in every microbatch

Why this preserves the sensitivity: given the shared draws, an example's contribution is a function of its record and of
draws that are independent of those of all other examples. Couple the two runs so that each remaining record has equal
draws in both. The sums then differ by the contribution of one record, at most C. The draws are secret, so the mechanism
is a mixture over them, and a mixture is at least as private as each of its components.
Torch's CPU generator uses only 32 bits of a seed. That suffices here: each example has its own seed, and the masks of
one record reveal nothing about those of another.

The global generators of torch, numpy and random are restored afterwards. A torch generator of the user's own is
replaced when it is passed to a torch operator. A numpy generator of the user's own cannot be intercepted.
"""

import contextlib
import dataclasses
import random
from collections.abc import Callable, Iterator
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from dpquant.errors import ModelError
from dpquant.rounding import derive_key, row_keys

_SEED_BITS = 2**32 - 1  # torch's CPU generator uses these bits of a seed
_DROPS = ("dropout_p", "dropout")  # arguments of fused kernels that give the dropout rate
_DRAW_ALONG_THE_LAST_AXIS = {torch.ops.aten.multinomial, torch.ops.aten._sample_dirichlet}


@contextlib.contextmanager
def seeded(key: int) -> Iterator[None]:
    """Seed the global generators of torch, numpy and random from a key, and restore them when the block ends.

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
    """Seed the global generators from a key. Call it only within `seeded`, which restores them."""
    random.seed(key)
    np.random.seed([key >> 32 & _SEED_BITS, key & _SEED_BITS])
    torch.default_generator.manual_seed(key)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(key)


class TorchPosition:
    """Snapshot of the states of torch's global generators, to detect whether numbers were drawn since."""

    def __init__(self, cuda: Any = torch.cuda) -> None:
        """Take a snapshot of the states.

        Args:
          cuda: an object with `is_initialized()` and `get_rng_state_all()` like torch.cuda.
        """
        self._cuda = cuda
        self._torch, self._devices = torch.random.get_rng_state(), self._device_states()

    def torch_moved(self) -> bool:
        """Return whether a global torch generator, of the CPU or a CUDA device, has changed since the snapshot."""
        devices = self._device_states()
        same = len(devices) == len(self._devices) and all(map(torch.equal, devices, self._devices))
        return not same or not torch.equal(self._torch, torch.random.get_rng_state())

    def _device_states(self) -> list[Tensor]:
        return self._cuda.get_rng_state_all() if self._cuda.is_initialized() else []


class Position(TorchPosition):
    """Snapshot of the states of all global generators. Numpy's takes thirty times as long to read as torch's."""

    def __init__(self, cuda: Any = torch.cuda) -> None:
        super().__init__(cuda)
        self._python, self._arrays = random.getstate(), np.random.get_state(legacy=False)

    def moved(self) -> bool:
        """Return whether a global generator of torch, numpy or Python has changed since the snapshot."""
        same = _same(np.random.get_state(legacy=False), self._arrays)
        return self.torch_moved() or not same or random.getstate() != self._python


def _same(one: Any, other: Any) -> bool:
    """Whether two states of numpy's generator are equal: numbers, arrays, and dictionaries of them."""
    if isinstance(one, dict) or isinstance(other, dict):
        alike = isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys()
        return alike and all(_same(value, other[name]) for name, value in one.items())
    return bool(np.array_equal(one, other))


class Watch(TorchDispatchMode):
    """Detects whether torch operators draw random numbers, also from a user's own generators. It slows all operators.

    Attributes:
      drew: whether a random operator has run.
    """

    drew = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.drew = self.drew or _draws(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


class RecordDraws(TorchDispatchMode):
    """While active, makes torch's random operators draw each example's part from a key of its record id.

    The axis of examples is the first axis whose size is the number of examples; else the first axis, if its size is a
    multiple of it (consecutive heads or views of one example). An operator without such an axis draws equal numbers in
    every microbatch. If an axis is taken for the axis of examples by mistake, an example's draws depend on its position
    in the batch; the isolation check and the probe of each epoch detect that.
    """

    def __init__(self, key: int, record_ids: Tensor):
        """Prepare the draws of the rows of one microbatch.

        Args:
          key: 64 bits, secret, of the step.
          record_ids: int64 `(B,)`.
        """
        super().__init__()
        self._key, self._ids, self._calls = key, record_ids.cpu(), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not _draws(func, args, kwargs):
            return func(*args, **kwargs)
        key = derive_key(self._key, "draw", self._calls)
        self._calls += 1
        args = [_without_generator(value) for value in args]
        kwargs = {name: _without_generator(value) for name, value in kwargs.items()}
        count = len(self._ids)
        drawn = _Drawn.of(func, args, kwargs, count)
        if drawn is None:
            _seed(derive_key(key, "shared"))
            return func(*args, **kwargs)
        _refuse_fused(func)
        parts = []
        for row, seed in enumerate(row_keys(key, self._ids).tolist()):
            _seed(seed & _SEED_BITS)
            mine = [drawn.part(value, row) for value in args]
            named = {name: drawn.part(value, row) for name, value in kwargs.items()}
            parts.append(func(*mine, **named))
        written = _written(func, args, kwargs)
        if written is not None:
            return written
        if isinstance(parts[0], tuple):
            return tuple(torch.cat(of_one, drawn.axis) for of_one in zip(*parts, strict=True))
        return torch.cat(parts, drawn.axis)


def _draws(func: Any, args: Any, kwargs: Any) -> bool:
    """Return whether an operator call draws. Attention and dropout are tagged as random even if they drop nothing."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    if not any(isinstance(one.type, torch.TensorType) for one in func._schema.returns):
        return False  # it only selects a kernel
    for place, argument in enumerate(func._schema.arguments):
        if argument.name in (*_DROPS, "train", "training"):
            given = args[place] if place < len(args) else kwargs.get(argument.name, argument.default_value)
            if given is not None and not given:
                return False
    return True


def _refuse_fused(func: Any) -> None:
    """Raise ModelError for a kernel with built-in dropout, which draws its mask itself and again in backward."""
    if any(argument.name in _DROPS for argument in func._schema.arguments):
        raise ModelError(
            f"Expected dropout whose random numbers can be given to each example; got {func.name()}, a kernel that "
            "draws them by itself, by place. Switch its dropout off, or build the layer of modules with nn.Dropout."
        )


def _without_generator(value: Any) -> Any:
    """Return the argument, or None (torch's default generator) if it is a generator of the user's own."""
    return None if isinstance(value, torch.Generator) else value


def _written(func: Any, args: Any, kwargs: Any) -> Any | None:
    """Return the argument that an operator writes its result to and returns; None if it returns a new tensor."""
    returned = func._schema.returns[0].alias_info
    if returned is None or not returned.is_write:
        return None
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.before_set == returned.before_set:
            return args[place] if place < len(args) else kwargs[argument.name]
    return None


@dataclasses.dataclass(frozen=True)
class _Drawn:
    """The division of a random operator's output into examples.

    Attributes:
      axis: the axis of examples.
      width: entries of that axis per example.
      count: number of examples.
      ndim: number of axes of the output.
    """

    axis: int
    width: int
    count: int
    ndim: int

    @classmethod
    def of(cls, func: Any, args: Any, kwargs: Any, count: int) -> "_Drawn | None":
        """Find the axis of examples in an operator call; None if there is none."""
        shape = _drawn_shape(args, kwargs)
        candidates = shape[:-1] if func.overloadpacket in _DRAW_ALONG_THE_LAST_AXIS else shape
        if count in candidates:
            return cls(candidates.index(count), 1, count, len(shape))
        if candidates and candidates[0] and candidates[0] % count == 0:
            return cls(0, candidates[0] // count, count, len(shape))
        return None

    def part(self, value: Any, row: int) -> Any:
        """Return one example's part of an argument. Axes are aligned from the last one, as in broadcasting."""
        if isinstance(value, Tensor):
            axis = self.axis - self.ndim + value.ndim
            if axis < 0 or value.shape[axis] != self.width * self.count:
                return value
            return value.narrow(axis, row * self.width, self.width)
        if _is_sizes(value) and len(value) == self.ndim:
            return [self.width if place == self.axis else size for place, size in enumerate(value)]
        return value


def _drawn_shape(args: Any, kwargs: Any) -> tuple[int, ...]:
    """Return the output's shape: the sizes among the arguments, else the broadcast shape of all tensors."""
    values = [*args, *(value for name, value in kwargs.items() if name != "out")]
    for value in values:
        if _is_sizes(value):
            return tuple(value)
    shapes = [value.shape for value in values if isinstance(value, Tensor)]
    try:
        return tuple(torch.broadcast_shapes(*shapes))
    except RuntimeError:  # operands that do not broadcast, as those of attention
        return tuple(shapes[0])


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) > 0 and all(isinstance(size, int) for size in value)


@dataclasses.dataclass
class Drawing:
    """Makes the random numbers of a computation follow from record ids, once it has been seen to draw any.

    Attributes:
      seen: whether the computation has been seen to draw. If so, numbers are drawn record by record, which is slower.
      by_operator: whether the next computation is watched operator by operator. This is slow, is done once, and detects
        draws from a user's own torch generators too. Otherwise only the global generators are compared.
    """

    seen: bool = False
    by_operator: bool = False

    def unknown(self) -> Self:
        """Return a new instance of this class that has seen no draws, for a computation in another mode."""
        return type(self)()

    def by_record(self, compute: Callable[[], Tensor], key: int, record_ids: Tensor) -> Tensor:
        """Run a computation with random numbers that follow from record ids. Call it only within `seeded(key)`.

        Args:
          compute: the computation, for instance of losses. It runs a second time when it first is seen to draw.
          key: of the draws.
          record_ids: int64 `(B,)`, of the rows.
        Returns: the result of `compute`.
        """
        if not self.seen:
            position, watch = TorchPosition(), Watch()
            with watch if self.by_operator else contextlib.nullcontext():
                computed = compute()
            self.by_operator = False
            if not position.torch_moved() and not watch.drew:
                return computed
            self.seen = True
            reseed(key)
        # fused attention on a CUDA device draws its dropout mask by position
        plain = sdpa_kernel(SDPBackend.MATH) if torch.cuda.is_initialized() else contextlib.nullcontext()
        with plain, RecordDraws(key, record_ids):
            return compute()


def _seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
