# SPDX-License-Identifier: Apache-2.0
"""Measurements before a run: the time of each layer, the fastest microbatch size, and the memory that a size needs.

All measurements use synthetic data. Their results depend on shapes and on the machine, never on a private record.
"""

import dataclasses
import math
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
from dpquant.engine.passes import Objective, PerExampleLoss, out_of_memory
from dpquant.engine.randomness import seeded
from dpquant.errors import SettingError
from dpquant.formats import Precision
from dpquant.machine import device_memory_mib, memory_mib, reset_device_peak, reset_peak
from dpquant.privacy.analysis_plan import Score
from dpquant.training.cost import LayerTimes
from dpquant.training.filling import fitted, rows_of_step
from dpquant.training.impact import analysis_keys, impact_sum

# microbatch sizes: the smallest, from which memory limits the search; the first whose time is compared; the size where
# nothing is compared, as the run is short; and the one above which a doubled size costs much memory
_SMALLEST, _LEAN, _FIRST, _USUAL = 4, 16, 32, 256
_TRIALS = 0.05  # share of a run's examples that the search, or the timing of layers, may pass through the model
_PASSES = 4  # of each candidate of a comparison: one that warms up, and three that count
_WORTHWHILE = 1.05  # speed-up of a step for which the microbatch, and with it the memory, is doubled
_WORTH_MEMORY = 1.1  # the same from _USUAL on
ANALYSIS_MICROBATCH = 64  # examples a pass of an analysis; fewer only where memory is limited
_TIMED_MICROBATCHES = 3  # at most this many microbatches are timed in a round
_MIB = 2**10  # MiB in a GiB


@dataclasses.dataclass(frozen=True, kw_only=True)
class Instruments:
    """Functions that measure time and memory, and the functions that are measured. Tests pass their own.

    Attributes:
      timed: takes {name: function}, returns {name: seconds of a call}.
      memory_mib: returns the resident memory of the process and its peak, MiB.
      reset_peak: resets the peak to the resident memory. Returns the resident memory, MiB, and whether the system
        allows the reset.
      clipped_sum: the sum of a training step.
      impact_sum: the sum of an analysis.
      clock: makes a clock for the layers of a step.
    """

    timed: Callable[[Mapping[str, Callable[[], object]]], Mapping[str, float]] = timed
    memory_mib: Callable[[], tuple[float, float]] = memory_mib
    reset_peak: Callable[[], tuple[float, bool]] = reset_peak
    clipped_sum: Callable[..., object] = clipped_sum
    impact_sum: Callable[..., object] = impact_sum
    clock: Callable[[], Clock] = Clock

    def peak(self) -> float:
        """Return the peak of the resident memory, GiB."""
        return self.memory_mib()[1] / _MIB

    def start(self) -> float:
        """Reset the peak and return it, GiB: the resident memory or, where the system allows no reset, the old peak."""
        resident, reset = self.reset_peak()
        return (resident if reset else self.memory_mib()[1]) / _MIB

    def too_little(self, memory: float, needed: float, what: str) -> SettingError:
        """Return an error that states how much memory synthetic records need.

        It does not state how much memory is in use, which depends on private records.

        Args:
          memory: the limit, GiB.
          needed: peak above the memory at the start, GiB.
          what: the smallest pass that was tried, in words.
        """
        held = "what the process holds already"
        if not self.reset_peak()[1]:
            held = "the most that the process has held before, which this system goes on counting,"
        return SettingError(
            f"Expected memory enough for this model; got memory={memory:g}. Besides {held} it needs {needed:.2f} GiB "
            f"with {what}. Allow more, or take a smaller model."
        )


HERE = Instruments()
"""Instruments that measure this process."""


def instruments_on(device: torch.device) -> Instruments:
    """Return instruments that measure a model on a device: the memory of a GPU is what the process' tensors hold."""
    if device.type != "cuda":
        return HERE
    return Instruments(
        memory_mib=partial(device_memory_mib, device),
        reset_peak=partial(reset_device_peak, device),
    )


def memory_gone() -> SettingError:
    """Return the error for a step that is charged and for which memory does not suffice."""
    return SettingError(
        "Expected memory enough for the step; got too little, after it was charged. What was charged stays charged. "
        "Start again with a smaller microbatch_size, or with memory= (GiB), by which it is chosen."
    )


def largest_tried(examples: float) -> int:
    """Return the largest microbatch size that is tried for a run of so many examples: trials cost time, too.

    Comparing n with 2 n takes `2 * _PASSES` passes of 2 n examples.
    """
    size = _FIRST
    while 4 * _PASSES * (2 * size - _FIRST) <= _TRIALS * examples:
        size *= 2
    return size


def worth_timing(examples: float, microbatch_size: int, rounds: int = 2) -> bool:
    """Return whether a run of so many examples is long enough to time its layers first, as `layer_times` does."""
    return (1 + rounds) * 2 * _TIMED_MICROBATCHES * microbatch_size <= _TRIALS * examples


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
    """Return each layer's time within a step, the median over several rounds.

    Args: as for `layer_times_once`, and
      rounds: number of rounds that count; one more warms up.
    Returns: {layer: its times}, for every layer that is called.
    Privacy: reads no private data, as long as `batch` is synthetic.
    """
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
    """Time each layer within a step, once with all layers in full precision and once with all layers quantized.

    The model's precisions are restored afterwards.

    Args:
      model: a prepared model.
      loss_fn: `(model, batch) -> Tensor (B,)`.
      batch: a synthetic batch; its rows are repeated to fill the microbatches.
      microbatch_size: examples a backward pass.
      expected_batch_size: examples a step. A weight is quantized once a step, so its time is spread over them.
      by: makes the clock that measures.
    Returns: {layer: its times}, for every layer that is called.
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
    """Return {layer: seconds an example}, averaged over a whole step.

    A step has one first microbatch, which also quantizes and packs the weights. All others take the mean time of the
    later microbatches on the clock.
    """
    first, *later = clock.microbatches
    num_later = max(expected_batch_size / microbatch_size, 1.0) - 1
    return {
        name: (first[name] + num_later * statistics.mean(one[name] for one in later or [first]))
        / ((1 + num_later) * microbatch_size)
        for name in first
    }


def median_times(rounds: Sequence[Mapping[str, LayerTimes]]) -> dict[str, LayerTimes]:
    """Return medians over all rounds but the first, which fills caches and autotunes the products."""
    return {
        name: LayerTimes(
            full=statistics.median(times[name].full for times in rounds[1:]),
            quantized=statistics.median(times[name].quantized for times in rounds[1:]),
        )
        for name in rounds[0]
    }


def fastest_microbatch_size(
    objective: Objective,
    batch: Any,
    precisions: Mapping[str, Precision],
    *,
    expected_batch_size: float,
    memory: float | None,
    largest: float = math.inf,
    groups: int = 1,
    by: Instruments = HERE,
) -> int:
    """Return the microbatch size with which a step takes the least time within the memory limit.

    The size is doubled as long as that saves a twentieth of the time and fits, up to the whole batch: networks of small
    layers gain up to there. Where layers are large it stays small, as activations fill the memory. The last microbatch
    of a batch is filled up with copies; larger sizes have to gain enough to make up for these, and the size is fitted
    to the batches in the end.

    Args:
      objective: a prepared model and its loss.
      batch: a synthetic batch; its rows are repeated to fill the microbatches.
      precisions: {layer: its precision}, as in an epoch.
      expected_batch_size: examples a step.
      memory: largest peak memory of the process, GiB; None sets no limit.
      largest: size that is tried, as by `largest_tried`.
      groups: of records, within which microbatches are made; each ends in one that is filled up.
      by: measures time and memory.
    Returns: examples a backward pass.
    Raises:
      SettingError: not even the smallest microbatch fits.
    """
    model, loss_fn = objective.model, objective.loss_fn
    before = current_precisions(model)
    start = 0.0 if memory is None else by.start()

    def run(size: int, num_examples: int, precisions: Mapping[str, Precision]) -> None:
        set_precisions(model, precisions)
        rows = torch.arange(num_examples) % num_rows(batch)
        _run(by.clipped_sum, model, loss_fn, take_rows(batch, rows), size)

    def peak(size: int) -> float:
        """Return the peak GiB after a full-precision pass at this size, which needs more than a quantized one."""
        run(size, size, {})
        return by.peak()

    def fit(size: int) -> int:
        return fitted(size, expected_batch_size) if groups == 1 else size  # the groups' shares of a batch are private

    try:
        size = _SMALLEST if memory is not None else _LEAN if largest > _FIRST else _FIRST
        used = 0.0 if memory is None else peak(size)
        if memory is not None and used > memory:
            raise by.too_little(memory, used - start, f"{size} examples a backward pass")
        while size < expected_batch_size / groups and 2 * size <= largest:
            # the memory above `start` at most doubles with the size
            if memory is not None and used + (used - start) > memory:
                break
            try:
                used = 0.0 if memory is None else peak(2 * size)
                works = {str(number): partial(run, number, 2 * size, precisions) for number in (size, 2 * size)}
                seconds = by.timed(works)
            except Exception as error:
                if not out_of_memory(error):
                    raise
                break  # the device holds no more
            one, other = (rows_of_step(fit(n), expected_batch_size, groups) for n in (size, 2 * size))
            worthwhile = other / one * (_WORTHWHILE if size < _USUAL else _WORTH_MEMORY)
            if size >= _LEAN and seconds[str(size)] < worthwhile * seconds[str(2 * size)]:
                break
            size *= 2
    finally:
        set_precisions(model, before)
        give_back()  # return the memory of the largest size that was tried, which the run may not need
    best = fit(size)
    return best if memory is None or used + (used - start) * (best / size - 1) <= memory else size


def step_gain(
    objective: Objective, batch: Any, precisions: Mapping[str, Precision], size: int, *, by: Instruments = HERE
) -> float:
    """Return the time of a microbatch in full precision over its time with these precisions; above 1 it gets faster.

    Args:
      objective: a prepared model and its loss.
      batch: a synthetic batch; its rows are repeated to fill the microbatch.
      precisions: {layer: its precision}; all others are in full precision.
      size: examples of the microbatch.
      by: measures time.
    """
    model, before = objective.model, current_precisions(objective.model)
    examples = take_rows(batch, torch.arange(size) % num_rows(batch))

    def run(precisions: Mapping[str, Precision]) -> None:
        set_precisions(model, precisions)
        _run(by.clipped_sum, model, objective.loss_fn, examples, size)

    try:
        seconds = by.timed({"full": partial(run, {}), "quantized": partial(run, precisions)})
    finally:
        set_precisions(model, before)
    return seconds["full"] / seconds["quantized"]


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
    """Return the largest microbatch size with which an analysis stays within the memory limit.

    Args:
      model: a prepared model.
      loss_fn: `(model, batch) -> Tensor (B,)`.
      batch: a synthetic batch; its rows are repeated to fill the microbatches.
      names: layers whose impact is measured; one is enough, because layers are measured one after the other and need
        the same memory.
      score: `loss` or `gradient`.
      memory: largest peak memory of the process, GiB.
      by: measures memory.
    Returns: examples a pass, at most `ANALYSIS_MICROBATCH`.
    Raises:
      SettingError: not even the smallest microbatch fits.
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
    """Compute the sum of a training step over a batch, in microbatches of `size` examples."""
    ids = torch.arange(num_rows(batch))
    with seeded(0):
        clipped_sum(
            model, loss_fn, batch, max_grad_norm=1.0, record_ids=ids, step=0, seed=0, microbatch_size=size, clock=clock
        )
