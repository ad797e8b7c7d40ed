# SPDX-License-Identifier: Apache-2.0
"""A stand-in for a GPU: tensors that claim to be on another device, are computed on the CPU, and tell who waits.

Within `Device()`, `.to(DEVICE)` gives such tensors, and operators on them give more of them. What makes Python wait for
a GPU is refused: reading a number, a result whose size depends on values, copies to the host, and copies from the host
that are not marked as non_blocking. So is an operator on tensors of both devices. What may wait is named to `waits`.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

DEVICE = torch.device("lazy", 0)  # a device of torch that autograd runs on the caller's thread, as the CPU

_SIZE_FOLLOWS_VALUES = {
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::unique_consecutive",
    "aten::repeat_interleave",
}
_READS = {"aten::_local_scalar_dense", "aten::equal"}


class Waits(AssertionError):
    """Python would wait for the device."""


class TwoDevices(AssertionError):
    """An operator has operands on both devices."""


class Elsewhere(Tensor):
    """A tensor that claims to be on `DEVICE`; its values are those of `held`."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "Elsewhere":
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )

    def __init__(self, held: Tensor):
        self.held = held

    @property
    def data(self) -> Tensor:
        with torch.no_grad():
            return self.detach()

    @data.setter
    def data(self, value: "Elsewhere") -> None:
        Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.held = value.held

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.held.untyped_storage()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} runs outside of the mode that counts who waits")


class Device(TorchDispatchMode):
    """While active, `DEVICE` exists.

    Attributes:
      waited: names of the blocks of `waits` in which Python waited, once for each time.
    """

    def __init__(self):
        super().__init__()
        self.waited: list[str] = []
        self._may_wait = ""

    @contextlib.contextmanager
    def waits(self, name: str) -> Iterator[None]:
        """Allow waiting in the block, and note it under this name."""
        before, self._may_wait = self._may_wait, name
        try:
            yield
        finally:
            self._may_wait = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        leaves = tree_leaves((args, kwargs))
        here = [leaf for leaf in leaves if isinstance(leaf, Tensor) and not isinstance(leaf, Elsewhere)]
        there = [leaf for leaf in leaves if isinstance(leaf, Elsewhere)]
        target = kwargs.get("device")
        target = None if target is None else torch.device(target)
        copies = func.overloadpacket in (torch.ops.aten.copy_, torch.ops.aten._to_copy)
        if copies and (kwargs.get("device") is not None or (here and there)):
            self._check_copy(func, args, kwargs)
        elif there:
            self._check(func, args, [one for one in here if one.ndim > 0])
        if target is not None and target.type == DEVICE.type:
            kwargs["device"] = torch.device("cpu")
        arguments, named = tree_map_only(Elsewhere, lambda one: one.held, (args, kwargs))
        result = func(*arguments, **named)
        on_device = target.type == DEVICE.type if target is not None else bool(there)
        if func.overloadpacket is torch.ops.aten.copy_:
            return args[0]
        return self._wrapped(func, result, args, kwargs, there) if on_device else result

    def _check(self, func: Any, args: Any, here: list[Tensor]) -> None:
        name = func._schema.name
        masks = name in ("aten::index", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_") and any(
            one is not None and one.dtype == torch.bool for one in args[1]
        )
        if name in _READS | _SIZE_FOLLOWS_VALUES or masks:
            self._wait(f"{name} waits for the device")
        if here:
            raise TwoDevices(f"{name} has operands on both devices")

    def _check_copy(self, func: Any, args: Any, kwargs: Any) -> None:
        """Check a copy from one device to the other."""
        copies_into = func.overloadpacket is torch.ops.aten.copy_
        source = args[1] if copies_into else args[0]
        goes_there = isinstance(args[0], Elsewhere) if copies_into else kwargs["device"].type == DEVICE.type
        non_blocking = kwargs.get("non_blocking", len(args) > 2 and args[2])
        if isinstance(source, Elsewhere) == goes_there:
            return
        if not (goes_there and non_blocking):
            self._wait(f"a copy {'to' if goes_there else 'from'} the device waits for it")

    def _wait(self, message: str) -> None:
        if not self._may_wait:
            raise Waits(message)
        self.waited.append(self._may_wait)

    def _wrapped(self, func: Any, result: Any, args: Any, kwargs: Any, there: list[Elsewhere]) -> Any:
        """Return the result as tensors of the device; what an operator was told to write to is returned itself."""
        written = {id(one.held): one for one in there}
        return tree_map_only(Tensor, lambda one: written[id(one)] if id(one) in written else Elsewhere(one), result)
