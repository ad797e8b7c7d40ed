# SPDX-License-Identifier: Apache-2.0
"""What a run measures on this machine before it begins: which layers gain from being quantized, how many examples a
backward pass should take, and how much memory that needs.

All of it is measured on synthetic data: the choices depend on shapes and on the machine, never on a record.
"""

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from dpquant.backends.choose import timed
from dpquant.backends.malloc import give_back
from dpquant.engine.batches import Microbatch, num_rows, take_rows
from dpquant.engine.clip import clipped_sum
from dpquant.engine.clock import Clock
from dpquant.engine.layers import current_precisions, quantizable_layers, set_policy, set_precisions
from dpquant.engine.passes import Objective, PerExampleLoss
from dpquant.engine.randomness import seeded
from dpquant.errors import SettingError
from dpquant.formats import Precision
from dpquant.machine import memory_mib, reset_peak
from dpquant.privacy.plan import Score
from dpquant.training.cost import LayerTimes
from dpquant.training.impact import analysis_keys, impact_sum

# microbatches: the smallest, the first that is tried, the last whose memory costs little
_SMALLEST, _FIRST, _USUAL = 4, 32, 256
_WORTHWHILE = 1.03  # speed-up for which a microbatch is doubled
_WORTH_MEMORY = 1.1  # and from 256 on, where the memory that it takes begins to count
ANALYSIS_MICROBATCH = 64  # examples a pass of an analysis, where memory is not bounded
_TIMED_MICROBATCHES = 3  # in which layers are timed
_MIB = 2**10  # in a GiB


@dataclasses.dataclass(frozen=True, kw_only=True)
class Instruments:
    """What is measured, and by what: a step and an analysis, time and memory.

    Attributes:
      timed: {name: seconds} of {name: work}.
      memory_mib: MiB that are resident now, and the most that ever were.
      reset_peak: counts the most from what is resident now, which it returns, and whether the system lets it.
      clipped_sum: a step's sum.
      impact_sum: an analysis' sum.
      clock: makes a clock for the layers of a step.
    """

    timed: Callable[[Mapping[str, Callable[[], object]]], Mapping[str, float]] = timed
    memory_mib: Callable[[], tuple[float, float]] = memory_mib
    reset_peak: Callable[[], tuple[float, bool]] = reset_peak
    clipped_sum: Callable[..., object] = clipped_sum
    impact_sum: Callable[..., object] = impact_sum
    clock: Callable[[], Clock] = Clock

    def peak(self) -> float:
        """Return the most that was resident, GiB."""
        return self.memory_mib()[1] / _MIB

    def start(self) -> float:
        """Return the GiB from which a peak is counted: what is resident or, where it cannot be reset, the last peak."""
        resident, reset = self.reset_peak()
        return (resident if reset else self.memory_mib()[1]) / _MIB

    def too_little(self, memory: float, needed: float, what: str) -> SettingError:
        """Return an error with what synthetic records need, not with what is in use: that tells of private ones."""
        held = "what the process holds already"
        if not self.reset_peak()[1]:
            held = "the most that the process has held before, which this system goes on counting,"
        return SettingError(
            f"Expected memory enough for this model; got memory={memory:g}. Besides {held} it needs {needed:.2f} GiB "
            f"with {what}. Allow more, or take a smaller model."
        )


HERE = Instruments()
"""The instruments of this process."""


def layer_times(
    model: nn.Module,
    loss_fn: PerExampleLoss,
    batch: Any,
    *,
    microbatch_size: int,
    expected_batch_size: float,
    rounds: int = 2,
    by: Instruments = HERE,
) -> dict[str, LayerTimes]:
    """Return each layer's time within a step, the usual one of several rounds; arguments as of `layer_times_once`."""
    times = [
        layer_times_once(
            model,
            loss_fn,
            batch,
            microbatch_size=microbatch_size,
            expected_batch_size=expected_batch_size,
            by=by,
        )
        for _ in range(1 + rounds)
    ]
    return median_times(times)


def layer_times_once(
    model: nn.Module,
    loss_fn: PerExampleLoss,
    batch: Any,
    *,
    microbatch_size: int,
    expected_batch_size: float,
    by: Instruments = HERE,
) -> dict[str, LayerTimes]:
    """Return each layer's time within a step, once while all run in full precision and once while all are quantized.

    Args:
      model: a prepared model.
      loss_fn: `(model, batch) -> Tensor (B,)`.
      batch: synthetic; its rows are used again and again.
      microbatch_size: examples a backward pass.
      expected_batch_size: examples a step, over which a weight is quantized once.
      by: the instruments; their clock measures.
    Returns: for every layer that is called.
    """
    before = current_precisions(model)
    num_microbatches = min(max(round(expected_batch_size / microbatch_size), 1), _TIMED_MICROBATCHES)
    examples = take_rows(batch, torch.arange(microbatch_size * num_microbatches) % num_rows(batch))
    layers = quantizable_layers(model)
    seconds = []
    try:
        for names in ((), layers):
            set_policy(model, names)
            clock = by.clock()
            _run(clipped_sum, model, loss_fn, examples, microbatch_size, clock)
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


def median_times(rounds: Sequence[Mapping[str, LayerTimes]]) -> dict[str, LayerTimes]:
    """Return medians over all rounds but the first, which fills caches and chooses the ways of the products."""
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
    by: Instruments = HERE,
) -> int:
    """Return the number of examples a backward pass with which a step takes the least time, within the memory.

    It is doubled as long as that gains and fits, up to the whole batch: a network of small layers gains up to there. A
    batch fills its last microbatch up, which counts against large ones.

    Args:
      model: a prepared model.
      loss_fn: `(model, batch) -> Tensor (B,)`.
      batch: synthetic; its rows are used again and again.
      precisions: of the layers that run quantized, as in an epoch.
      expected_batch_size: examples a step.
      memory: that the process may use at its peak, GiB; None: no limit.
      by: measures.
    Raises:
      SettingError: not even the smallest microbatch fits.
    """
    before = current_precisions(model)
    start = 0.0 if memory is None else by.start()

    def run(size: int, num_examples: int, precisions: Mapping[str, Precision]) -> None:
        set_precisions(model, precisions)
        rows = torch.arange(num_examples) % num_rows(batch)
        _run(by.clipped_sum, model, loss_fn, take_rows(batch, rows), size)

    def peak(size: int) -> float:
        """GiB in use so far, once microbatches of this size have been tried: most where nothing is quantized."""
        run(size, size, {})
        return by.peak()

    try:
        size = _FIRST if memory is None else _SMALLEST
        used = 0.0 if memory is None else peak(size)
        if memory is not None and used > memory:
            raise by.too_little(memory, used - start, f"{size} examples a backward pass")
        while size < expected_batch_size:
            # what is in use grows at most in proportion to the examples
            if memory is not None and used + (used - start) > memory:
                break
            used = 0.0 if memory is None else peak(2 * size)
            seconds = by.timed({str(number): partial(run, number, 2 * size, precisions) for number in (size, 2 * size)})
            filled_up = (1 + size / expected_batch_size) / (1 + size / 2 / expected_batch_size)
            worthwhile = filled_up * (_WORTHWHILE if size < _USUAL else _WORTH_MEMORY)
            if size >= _FIRST and seconds[str(size)] < worthwhile * seconds[str(2 * size)]:
                break
            size *= 2
    finally:
        set_precisions(model, before)
        give_back()  # a run with smaller microbatches does not need what the largest one took
    return size


def largest_analysis_size(
    model: nn.Module,
    loss_fn: PerExampleLoss,
    batch: Any,
    names: Sequence[str],
    *,
    score: Score,
    memory: float,
    by: Instruments = HERE,
) -> int:
    """Return the largest number of examples a pass with which an analysis stays within the memory.

    Args:
      model: a prepared model.
      loss_fn: `(model, batch) -> Tensor (B,)`.
      batch: synthetic; its rows are used again and again.
      names: a layer whose impact is measured; each takes the same memory, one after the other.
      score: what an impact is measured by.
      memory: that the process may use at its peak, GiB.
      by: measures.
    Raises:
      SettingError: not even the smallest number fits.
    """
    start = by.start()
    size, used = _SMALLEST, 0.0
    while True:
        rows = torch.arange(size) % num_rows(batch)
        piece = Microbatch(take_rows(batch, rows), torch.arange(size), size)
        by.impact_sum(
            Objective(model, loss_fn), [piece], names=names, max_norm=1.0, keys=analysis_keys(0, 0), score=score
        )
        used = by.peak()
        if used > memory and size == _SMALLEST:
            raise by.too_little(memory, used - start, f"{size} examples a pass of an analysis")
        if size == ANALYSIS_MICROBATCH or used + (used - start) > memory:
            return size
        size *= 2


def _run(
    clipped_sum: Callable[..., object],
    model: nn.Module,
    loss_fn: PerExampleLoss,
    batch: Any,
    size: int,
    clock: Clock | None = None,
) -> None:
    """Compute a step's sum over a batch, in microbatches of a size."""
    ids = torch.arange(num_rows(batch))
    with seeded(0):
        clipped_sum(
            model, loss_fn, batch, max_grad_norm=1.0, record_ids=ids, step=0, seed=0, microbatch_size=size, clock=clock
        )
