# SPDX-License-Identifier: Apache-2.0
"""How the noisy mean of a step moves the parameters: the whole optimizer's step on every process, or a slice of it.

    whole      gather the noised slices of the gradient, then step all parameters, on every process
    sharded    process r steps slice r of the parameters with slice r of the gradient, then gather the parameters

Both give the same bits, because the optimizers that are accepted compute each value from its own gradient and state
alone. A sharded optimizer holds a W-th of its state on each of W processes, and as many bytes are sent.

Source: Rajbhandari et al., arXiv 1910.02054, section 5.1 (ZeRO, stage 1).
"""

import contextlib
import copy
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dpquant.errors import ModelError, SettingError
from dpquant.training.distributed import Group
from dpquant.training.exchange import Noised, Slices, named, noisy_means, own_means

_ELEMENTWISE = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)
_COUNT = "step"  # of a parameter's state, the one entry that is not of the parameter's shape


class Steps:
    """The whole optimizer, which takes the same steps on every process.

    Attributes:
      optimizer: of the user.
      group: the processes.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, group: Group):
        self.optimizer, self.group = optimizer, group

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Groups of parameters with their settings, as the user and schedulers see and change them."""
        return self.optimizer.param_groups

    def receive(self, trainable: Mapping[str, nn.Parameter], sums: Mapping[str, Tensor], noised: Noised) -> None:
        """Exchange the sums of a step, and keep the noisy means for `step`. All processes call this.

        Args:
          trainable: {name: parameter}, float32.
          sums: {name: sum over this process' share of the records}, of the same names, in the same order.
          noised: as for `exchange.noisy_means`.
        Privacy: per example; what is kept is private if `noised` adds the noise of the plan.
        """
        for name, mean in noisy_means(self.group, sums, noised, torch.float32):
            trainable[name].grad = mean

    def gather_gradients(self) -> None:
        """Let every parameter have its noised gradient. All processes call this."""

    def step(self) -> None:
        """Move the parameters. All processes call this. Privacy: post-processing."""
        self.optimizer.step()

    @contextlib.contextmanager
    def trial(self, gradients: Mapping[nn.Parameter, Tensor]) -> Iterator[Mapping[Any, Tensor]]:
        """Context: the optimizer is as `step` finds it, to be copied. Nothing is exchanged.

        Args:
          gradients: {trainable parameter: tensor of its shape}.
        Yields: {tensor that the optimizer holds: its gradient}.
        """
        yield gradients

    def gather_state(self) -> None:
        """Bring the state together on process 0, for `state_dict`. All processes call this."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state as torch's optimizers do."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over such a state. Nothing is exchanged."""
        self.optimizer.load_state_dict(state_dict)


class ShardedSteps(Steps):
    """An optimizer that steps, on each process, on this process' slice of the parameters, laid end to end.

    The user's optimizer itself takes the step, with slices in the place of its parameters, so that schedulers and
    changes of its settings have their effect. Between two steps it holds its parameters, and no state.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, trainable: Mapping[str, nn.Parameter], group: Group):
        """Make the slices; the state that the optimizer has, if any, is cut at the first step.

        Args:
          optimizer: one that `check_shardable` accepts.
          trainable: {name: parameter}: float32, on one device.
          group: the processes, more than one.
        """
        super().__init__(optimizer, group)
        self._trainable, self._slices = dict(trainable), Slices.of(trainable, group)
        device = next(iter(trainable.values())).device
        self._values = torch.zeros(self._slices.length, device=device)
        self._gradient = self._values[:0]  # of the step that is being taken
        self._own = self._slices.views(self._values)
        self._state: dict[Tensor, dict[str, Any]] = defaultdict(dict)  # of slices, as torch's optimizers keep it
        self._whole: dict[str, Any] | None = None

    def receive(self, trainable: Mapping[str, nn.Parameter], sums: Mapping[str, Tensor], noised: Noised) -> None:
        """Exchange the sums of a step, and keep the noisy means of this process' slice.

        Raises:
          ModelError: these are not the parameters with which the run began.
        """
        if list(trainable) != list(self._trainable) or any(p is not self._trainable[n] for n, p in trainable.items()):
            raise ModelError(
                "Expected the trainable parameters with which the run began; got others. With shard_optimizer each "
                "process holds a slice of these. Freeze or replace parameters before the run, or leave "
                "shard_optimizer out. What was charged stays charged."
            )
        self._gradient = own_means(self.group, sums, noised, torch.float32)

    def gather_gradients(self) -> None:
        for name, gradient in named(self.group.gathered(self._gradient), self._trainable):
            self._trainable[name].grad = gradient

    def step(self) -> None:
        self._whole = None
        self._cut_state()
        self._read_parameters()
        for name, gradient in self._slices.views(self._gradient).items():
            self._own[name].grad = gradient
        with self._holding(self._state):
            self.optimizer.step()
        for mine in self._own.values():
            mine.grad = None
        self._gradient = self._values[:0]
        with torch.no_grad():
            for name, values in named(self.group.gathered(self._values), self._trainable):
                self._trainable[name].copy_(values)
                self._trainable[name].grad = None  # of the first step, or of the user

    @contextlib.contextmanager
    def trial(self, gradients: Mapping[nn.Parameter, Tensor]) -> Iterator[Mapping[Any, Tensor]]:
        self._read_parameters()
        parts = self._slices.parts()
        with self._holding(self._cut()):
            yield {mine: gradients[self._trainable[name]].reshape(-1)[parts[name]] for name, mine in self._own.items()}

    def gather_state(self) -> None:
        self._cut_state()
        entries = {name: self._state[mine] for name, mine in self._own.items() if mine in self._state}
        counts = {
            name: {key: float(value) if key == _COUNT else None for key, value in state.items()}
            for name, state in entries.items()
        }
        found: dict[str, dict[str, float | None]] = {}
        for answer in self.group.from_all(json.dumps(counts).encode()):
            found = {**json.loads(answer), **found}
        whole: dict[str, dict[str, Any]] = {
            name: {key: None if count is None else torch.tensor(count) for key, count in found[name].items()}
            for name in self._trainable
            if name in found
        }
        for key in dict.fromkeys(key for state in found.values() for key, count in state.items() if count is None):
            flat = torch.zeros_like(self._values)
            for name, view in self._slices.views(flat).items():
                if key in entries.get(name, {}):
                    view.copy_(entries[name][key])
            for name, values in named(self.group.gathered(flat), self._trainable):
                if self.group.rank == 0 and key in whole.get(name, {}):
                    whole[name][key] = values.cpu().clone()
        if self.group.rank == 0:
            kept, self.optimizer.state = self.optimizer.state, defaultdict(dict)
            self.optimizer.state.update({self._trainable[name]: state for name, state in whole.items()})
            self._whole, self.optimizer.state = self.optimizer.state_dict(), kept

    def state_dict(self) -> dict[str, Any]:
        """Return, once, the state that `gather_state` has brought together, as the whole optimizer would.

        Raises:
          SettingError: it was not called after the last step, or this is not process 0.
        """
        whole, self._whole = self._whole, None
        if whole is None:
            raise SettingError(
                "Expected private.gather_state() on every process before private.save() on process 0; got no such "
                "call since the last step or save. With shard_optimizer each process holds a part of the state. Call "
                "it on all."
            )
        return whole

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state of a whole optimizer, of which the slice of this process is kept."""
        self._whole = None
        self.optimizer.load_state_dict(state_dict)
        self._state = defaultdict(dict)
        self._cut_state()

    def _read_parameters(self) -> None:
        """Copy the parameters' values into this process' slice."""
        parts = self._slices.parts()
        for name, mine in self._own.items():
            mine.copy_(self._trainable[name].detach().reshape(-1)[parts[name]])

    def _cut_state(self) -> None:
        """Keep this process' part of a whole state, if the optimizer has one."""
        if self.optimizer.state:
            self._state = self._cut()
            self.optimizer.state.clear()

    def _cut(self) -> dict[Tensor, dict[str, Any]]:
        """Return a copy of this process' part of the state that the optimizer has."""
        parts = self._slices.parts()
        return defaultdict(
            dict,
            {
                mine: {
                    key: copy.deepcopy(value) if key == _COUNT else value.reshape(-1)[parts[name]].clone()
                    for key, value in self.optimizer.state[self._trainable[name]].items()
                }
                for name, mine in self._own.items()
                if self._trainable[name] in self.optimizer.state
            },
        )

    @contextlib.contextmanager
    def _holding(self, state: dict[Tensor, dict[str, Any]]) -> Iterator[None]:
        """Context: the optimizer holds this process' slices, with this state, in the parameters' place."""
        mine = {self._trainable[name]: own for name, own in self._own.items()}
        held, whole = [group["params"] for group in self.param_groups], self.optimizer.state
        try:
            for group in self.param_groups:
                group["params"] = [mine[p] for p in group["params"] if p in mine]
            self.optimizer.state = state  # pyright: ignore[reportAttributeAccessIssue]: a defaultdict, as torch's
            yield
        finally:
            for group, params in zip(self.param_groups, held, strict=True):
                group["params"] = params
            self.optimizer.state = whole


def steps_of(
    optimizer: torch.optim.Optimizer, trainable: Mapping[str, nn.Parameter], group: Group, *, sharded: bool
) -> Steps:
    """Return what takes the steps of a run. One process has nothing to share.

    Raises:
      SettingError: sharded, and the optimizer is not of those that step each value by itself.
    """
    if not sharded or group.size == 1:
        return Steps(optimizer, group)
    check_shardable(optimizer)
    return ShardedSteps(optimizer, trainable, group)


def check_shardable(optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer whose step on a slice could differ from that slice of its step on everything.

    Raises:
      SettingError: it is not one of torch's SGD, Adam and AdamW, is fused, or has hooks.
    """
    rule = f"Expected torch's {', '.join(one.__name__ for one in _ELEMENTWISE)} with shard_optimizer"
    if type(optimizer) not in _ELEMENTWISE:
        raise SettingError(
            f"{rule}; got {type(optimizer).__name__}. Each process steps a slice of the parameters, which is right for "
            "an optimizer that computes each value by itself. Take one of these, or leave shard_optimizer out."
        )
    if any(group.get("fused") for group in optimizer.param_groups):
        raise SettingError(
            f"{rule}, not fused; got fused=True. The last bits of a fused step depend on where a slice begins. Leave "
            "fused out, or shard_optimizer."
        )
    if any(getattr(optimizer, f"_optimizer_step_{when}_hooks", None) for when in ("pre", "post")):
        raise SettingError(
            f"{rule}, without hooks; got a hook of its step. It would see slices in the place of parameters. Remove "
            "it, or leave shard_optimizer out."
        )
