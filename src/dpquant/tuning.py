# SPDX-License-Identifier: Apache-2.0
"""What a run measures on this machine before it begins: which layers gain from being quantized, how many examples a
backward pass should take, and how much memory that needs.

All of it is measured on made-up data: the choices depend on shapes and on the machine, never on a record.
"""

import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dpquant.choice import timed
from dpquant.clip import PerExampleLoss, clipped_sum, take_rows
from dpquant.clock import Clock
from dpquant.cost import LayerTimes
from dpquant.errors import SettingError
from dpquant.formats import Precision
from dpquant.hardware import forget_peak, memory_mib
from dpquant.layers import current_precisions, quantizable_layers, set_policy, set_precisions
from dpquant.working_memory import give_back

_SMALLEST, _FIRST, _LARGEST = 4, 32, 256  # microbatches: the smallest, the first that is tried, the largest
_WORTHWHILE = 1.03  # speed-up for which a microbatch is doubled
_TIMED_MICROBATCHES = 3  # in which layers are timed
_MIB = 2**10  # in a GiB


def layer_times(
    model: nn.Module,
    loss_fn: PerExampleLoss,
    batch: Any,
    *,
    microbatch_size: int,
    expected_batch_size: float,
    rounds: int = 2,
) -> dict[str, LayerTimes]:
    """Each layer's time within a step, the usual one of several rounds; arguments as of `layer_times_once`."""
    times = [
        layer_times_once(
            model, loss_fn, batch, microbatch_size=microbatch_size, expected_batch_size=expected_batch_size
        )
        for _ in range(1 + rounds)
    ]
    return usual_times(times)


def layer_times_once(
    model: nn.Module, loss_fn: PerExampleLoss, batch: Any, *, microbatch_size: int, expected_batch_size: float
) -> dict[str, LayerTimes]:
    """Each layer's time within a step: once while the whole model runs in full precision, once while all is quantized.

    Args:
      model: a prepared model.
      loss_fn: `(model, batch) -> Tensor (B,)`.
      batch: made-up; its rows are used again and again.
      microbatch_size: examples a backward pass.
      expected_batch_size: examples a step, over which a weight is quantized once.
    Returns: for every layer that is called.
    """
    before = current_precisions(model)
    num_microbatches = min(max(round(expected_batch_size / microbatch_size), 1), _TIMED_MICROBATCHES)
    examples = take_rows(batch, torch.arange(microbatch_size * num_microbatches) % len(_first_tensor(batch)))
    layers = quantizable_layers(model)
    seconds = []
    try:
        for names in ((), layers):
            set_policy(model, names)
            clock = Clock()
            _clipped_sum(model, loss_fn, examples, microbatch_size, clock)
            seconds.append(_seconds_per_example(clock, microbatch_size, expected_batch_size))
    finally:
        set_precisions(model, before)
    full, quantized = seconds
    return {name: LayerTimes(full=full[name], quantized=quantized[name]) for name in layers if name in full}


def _seconds_per_example(clock: Clock, microbatch_size: int, expected_batch_size: float) -> dict[str, float]:
    """By layer, in a step whose first microbatch is as the first that was timed, and all others as the others."""
    first, *later = clock.microbatches
    num_later = max(expected_batch_size / microbatch_size, 1.0) - 1
    return {
        name: (first[name] + num_later * statistics.mean(one[name] for one in later or [first]))
        / ((1 + num_later) * microbatch_size)
        for name in first
    }


def usual_times(rounds: Sequence[Mapping[str, LayerTimes]]) -> dict[str, LayerTimes]:
    """Medians over all rounds but the first, which fills caches and chooses the ways of the products."""
    return {
        name: LayerTimes(
            full=statistics.median(times[name].full for times in rounds[1:]),
            quantized=statistics.median(times[name].quantized for times in rounds[1:]),
        )
        for name in rounds[0]
    }


def fastest_microbatch_size(
    model: nn.Module,
    loss_fn: PerExampleLoss,
    batch: Any,
    precisions: Mapping[str, Precision],
    *,
    expected_batch_size: float,
    memory: float | None,
) -> int:
    """The number of examples a backward pass with which a step takes the least time, within the memory.

    It is doubled as long as that gains and fits. A batch fills its last microbatch up, which counts against large ones.

    Args:
      model: a prepared model.
      loss_fn: `(model, batch) -> Tensor (B,)`.
      batch: made-up; its rows are used again and again.
      precisions: of the layers that run quantized, as in an epoch.
      expected_batch_size: examples a step.
      memory: that the process may use at its peak, GiB; None: no limit.
    Raises:
      SettingError: not even the smallest microbatch fits.
    """
    before = current_precisions(model)
    start = 0.0 if memory is None else forget_peak() / _MIB

    def run(size: int, num_examples: int, precisions: Mapping[str, Precision]) -> None:
        set_precisions(model, precisions)
        rows = torch.arange(num_examples) % len(_first_tensor(batch))
        _clipped_sum(model, loss_fn, take_rows(batch, rows), size)

    def peak(size: int) -> float:
        """GiB in use so far, once microbatches of this size have been tried: most where nothing is quantized."""
        run(size, size, {})
        return memory_mib()[1] / _MIB

    try:
        size = _FIRST if memory is None else _SMALLEST
        used = 0.0 if memory is None else peak(size)
        if memory is not None and used > memory:
            raise SettingError(
                f"Expected memory of at least {used:.2f} GiB for this model and data; got memory={memory:g}. So "
                f"much is in use with {size} examples a backward pass. Allow more, or take a smaller model."
            )
        while size < min(_LARGEST, expected_batch_size):
            # what is in use grows at most in proportion to the examples
            if memory is not None and used + (used - start) > memory:
                break
            used = 0.0 if memory is None else peak(2 * size)
            seconds = timed({str(number): partial(run, number, 2 * size, precisions) for number in (size, 2 * size)})
            filled_up = (1 + size / expected_batch_size) / (1 + size / 2 / expected_batch_size)
            if size >= _FIRST and seconds[str(size)] < _WORTHWHILE * filled_up * seconds[str(2 * size)]:
                break
            size *= 2
    finally:
        set_precisions(model, before)
        give_back()  # a run with smaller microbatches does not need what the largest one took
    return size


def _clipped_sum(model: nn.Module, loss_fn: PerExampleLoss, batch: Any, size: int, clock: Clock | None = None) -> None:
    ids = torch.arange(len(_first_tensor(batch)))
    with torch.random.fork_rng(devices=[]):
        clipped_sum(
            model, loss_fn, batch, max_grad_norm=1.0, record_ids=ids, step=0, seed=0, microbatch_size=size, clock=clock
        )


def _first_tensor(batch: Any) -> Tensor:
    """Some tensor of a batch; all have the same number of rows."""
    if isinstance(batch, Tensor):
        return batch
    return _first_tensor(next(iter(batch.values() if isinstance(batch, dict) else batch)))
