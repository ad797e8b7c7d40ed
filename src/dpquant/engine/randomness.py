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
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from dpquant.errors import ModelError
from dpquant.rounding import derive_key, row_keys

_SEED_BITS = 2**32 - 1  # of a seed, torch's CPU generator keeps these
_DROPS = ("dropout_p", "dropout")  # what kernels call the share that they drop
_DRAW_ALONG_THE_LAST_AXIS = {torch.ops.aten.multinomial, torch.ops.aten._sample_dirichlet}


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

    def __init__(self, cuda: Any = torch.cuda) -> None:
        """Note where they stand now.

        Args:
          cuda: `is_initialized()` and `get_rng_state_all()` of the devices, as torch.cuda has them.
        """
        self._cuda = cuda
        self._torch, self._devices = torch.random.get_rng_state(), self._device_states()
        self._python, self._arrays = random.getstate(), np.random.get_state(legacy=False)

    def torch_moved(self) -> bool:
        """Whether one of torch's generators, on the CPU or on a CUDA device, has been drawn from since."""
        devices = self._device_states()
        same = len(devices) == len(self._devices) and all(map(torch.equal, devices, self._devices))
        return not same or not torch.equal(self._torch, torch.random.get_rng_state())

    def moved(self) -> bool:
        """Whether any of torch's, numpy's and Python's has been drawn from since."""
        arrays = np.random.get_state(legacy=False)
        same = str(arrays) == str(self._arrays) and np.array_equal(arrays["state"]["key"], self._arrays["state"]["key"])
        return self.torch_moved() or not same or random.getstate() != self._python

    def _device_states(self) -> list[Tensor]:
        return self._cuda.get_rng_state_all() if self._cuda.is_initialized() else []


class Watch(TorchDispatchMode):
    """Notices whether torch draws random numbers, from a user's own generators too. It slows every operator down.

    Attributes:
      drew: whether anything was drawn.
    """

    drew = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.drew = self.drew or _draws(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


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
    """Whether a call of an operator draws: attention and dropout are tagged even where they drop nothing."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    if not any(isinstance(one.type, torch.TensorType) for one in func._schema.returns):
        return False  # a choice between kernels
    for place, argument in enumerate(func._schema.arguments):
        if argument.name in (*_DROPS, "train", "training"):
            given = args[place] if place < len(args) else kwargs.get(argument.name, argument.default_value)
            if given is not None and not given:
                return False
    return True


def _refuse_fused(func: Any) -> None:
    """Refuse dropout that a kernel draws by itself and draws again in its backward pass."""
    if any(argument.name in _DROPS for argument in func._schema.arguments):
        raise ModelError(
            f"Expected dropout whose random numbers can be given to each example; got {func.name()}, a kernel that "
            "draws them by itself, by place. Switch its dropout off, or build the layer of modules with nn.Dropout."
        )


def _without_generator(value: Any) -> Any:
    """The argument itself; None, which means the default generator, in place of a user's own."""
    return None if isinstance(value, torch.Generator) else value


def _written(func: Any, args: Any, kwargs: Any) -> Any | None:
    """The argument that an operator writes its result to and returns; None where it returns something new."""
    returned = func._schema.returns[0].alias_info
    if returned is None or not returned.is_write:
        return None
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.before_set == returned.before_set:
            return args[place] if place < len(args) else kwargs[argument.name]
    return None


@dataclasses.dataclass(frozen=True)
class _Drawn:
    """How what an operator draws is divided into examples.

    Attributes:
      axis: of the examples.
      width: how many entries of the axis belong to one.
      count: the number of examples.
      ndim: axes of what is drawn.
    """

    axis: int
    width: int
    count: int
    ndim: int

    @classmethod
    def of(cls, func: Any, args: Any, kwargs: Any, count: int) -> "_Drawn | None":
        """None: there is no axis of examples."""
        shape = _drawn_shape(args, kwargs)
        candidates = shape[:-1] if func.overloadpacket in _DRAW_ALONG_THE_LAST_AXIS else shape
        if count in candidates:
            return cls(candidates.index(count), 1, count, len(shape))
        if candidates and candidates[0] and candidates[0] % count == 0:
            return cls(0, candidates[0] // count, count, len(shape))
        return None

    def part(self, value: Any, row: int) -> Any:
        """What of an argument belongs to one example. Axes are counted from the last: what is missing is broadcast."""
        if isinstance(value, Tensor):
            axis = self.axis - self.ndim + value.ndim
            if axis < 0 or value.shape[axis] != self.width * self.count:
                return value
            return value.narrow(axis, row * self.width, self.width)
        if _is_sizes(value) and len(value) == self.ndim:
            return [self.width if place == self.axis else size for place, size in enumerate(value)]
        return value


def _drawn_shape(args: Any, kwargs: Any) -> tuple[int, ...]:
    """The shape of what is drawn: a list of sizes, or that of all tensors together."""
    values = [*args, *(value for name, value in kwargs.items() if name != "out")]
    for value in values:
        if _is_sizes(value):
            return tuple(value)
    shapes = [value.shape for value in values if isinstance(value, Tensor)]
    try:
        return tuple(torch.broadcast_shapes(*shapes))
    except RuntimeError:  # operands of another kind, as of attention
        return tuple(shapes[0])


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) > 0 and all(isinstance(size, int) for size in value)


@dataclasses.dataclass
class Drawing:
    """Makes what a computation draws follow from records, once it was seen to draw, as with dropout.

    Attributes:
      seen: True from the first draw on. From then on draws are made record by record, which takes time.
      by_operator: whether the next computation is watched operator by operator, once: slow, and it sees draws from a
        user's own generators too. Otherwise only the global generators are looked at.
    """

    seen: bool = False
    by_operator: bool = False

    def unknown(self) -> Self:
        """Return one of the same kind that has seen nothing, for a computation in another mode."""
        return type(self)()

    def by_record(self, compute: Callable[[], Tensor], key: int, record_ids: Tensor) -> Tensor:
        """Compute something whose random numbers follow from records; only inside of `seeded(key)`.

        Args:
          compute: what is computed, for instance losses. It is called again if it is seen to draw for the first time.
          key: of the draws.
          record_ids: int64 `(B,)`, of the rows.
        """
        if not self.seen:
            position, watch = Position(), Watch()
            with watch if self.by_operator else contextlib.nullcontext():
                computed = compute()
            self.by_operator = False
            if not position.torch_moved() and not watch.drew:
                return computed
            self.seen = True
            reseed(key)
        # fused attention on a CUDA device draws its dropout by place
        plain = sdpa_kernel(SDPBackend.MATH) if torch.cuda.is_initialized() else contextlib.nullcontext()
        with plain, RecordDraws(key, record_ids):
            return compute()


def _seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
