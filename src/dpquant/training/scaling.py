# SPDX-License-Identifier: Apache-2.0
"""Model of time of a step on several workers: predicts it from times of one worker. Loads no torch and reads no data.

A step of B examples on W workers, each of which takes n = B / W of them, takes

    T(W) = T_fixed + t n - T_noise (1 - 1 / W) + T_exchange

    T_exchange = (W - 1) / W * (s + 4) P / bandwidth + 2 (W - 1) latency

T_fixed is what no example takes: quantizing and packing the weights, the noise, the optimizer. Every worker does all of
it but the noise, of which each draws the W-th part. The exchange has two legs. In the first each worker sends every
other one its part of the clipped sums, s bytes a value: 4 of float32, 8 of exact sums. In the second it sends its part
of the noised gradient, 4 bytes a value.

The model leaves out that some workers are slower than others, that a step waits for the slowest, and that workers on
one machine share its cores and memory.

Symbols: B examples a step, W workers, n examples a worker, t seconds an example, P trainable values.
"""

import dataclasses
from collections.abc import Sequence
from typing import Self

LATENCY = 50e-6  # seconds of a message between two machines of one data centre; assumed
NOISE = 2e-9  # seconds a value of Gaussian noise, on two cores (`scripts/bench noise`)
WORKERS = (1, 2, 4, 8, 16, 64, 256, 1024)
_SUM_BYTES, _EXACT_SUM_BYTES, _GRADIENT_BYTES = 4, 8, 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepTimes:
    """Time of a step on one worker, as a straight line in the number of examples.

    Attributes:
      fixed: seconds that no example takes.
      per_example: seconds an example.
      values: number of trainable values.
      source: where the times come from, in words.
    """

    fixed: float
    per_example: float
    values: int
    source: str

    @classmethod
    def through(
        cls, few: tuple[float, float], many: tuple[float, float], *, values: int, source: str, whole: float
    ) -> Self:
        """Return the line with the slope between two measurements that passes through a third one.

        Args:
          few: number of examples, and seconds of the sum of their clipped gradients.
          many: the same for more examples.
          values: number of trainable values.
          source: where the times come from.
          whole: seconds of a whole step of as many examples as `many`, with noise and optimizer.
        """
        slope = max((many[1] - few[1]) / (many[0] - few[0]), 0.0)
        slope = min(slope, whole / many[0])
        return cls(fixed=whole - slope * many[0], per_example=slope, values=values, source=source)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Network:
    """What connects the workers.

    Attributes:
      bandwidth: of each worker, Gbit a second in each direction.
      latency: seconds of a message.
      exact: whether the sums are exact, so that each value takes 8 bytes instead of 4.
    """

    bandwidth: float
    latency: float = LATENCY
    exact: bool = False

    def bytes_sent(self, values: int, workers: int) -> float:
        """Return the bytes that each worker sends in a step, and receives as well."""
        sums = _EXACT_SUM_BYTES if self.exact else _SUM_BYTES
        return (workers - 1) / workers * (sums + _GRADIENT_BYTES) * values

    def seconds(self, values: int, workers: int) -> float:
        """Return the seconds of a step's exchange."""
        return self.bytes_sent(values, workers) * 8e-9 / self.bandwidth + 2 * (workers - 1) * self.latency


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scaled:
    """A predicted step on several workers.

    Attributes:
      workers: their number, W.
      examples: that each takes of a step, n.
      seconds: of the step.
      exchange_seconds: of them, in which the workers exchange sums.
      speedup: time of the step on one worker over this one.
      efficiency: speed-up over W, in 0..1.
      efficiency_growing: the same where the batch is W times as large, so that each worker takes as many examples as
        one does alone.
      megabytes: that each worker sends in a step.
    """

    workers: int
    examples: float
    seconds: float
    exchange_seconds: float
    speedup: float
    efficiency: float
    efficiency_growing: float
    megabytes: float


def scaled(times: StepTimes, network: Network, batch_size: float, workers: int) -> Scaled:
    """Return the predicted step of so many workers.

    Args:
      times: of one worker.
      network: that connects them.
      batch_size: expected examples of a step, of all workers together.
      workers: their number, >= 1.
    """
    alone, together = (_seconds(times, network, batch_size / each, each) for each in (1, workers))
    return Scaled(
        workers=workers,
        examples=batch_size / workers,
        seconds=together,
        exchange_seconds=network.seconds(times.values, workers),
        speedup=alone / together,
        efficiency=alone / together / workers,
        efficiency_growing=alone / _seconds(times, network, batch_size, workers),
        megabytes=network.bytes_sent(times.values, workers) / 1e6,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scaling:
    """Predicted steps on 1 to 1,024 workers, and on `world_size`.

    Attributes:
      world_size: number of workers that was asked for.
      times: of one worker.
      network: that connects the workers.
      workers: the predictions.
    """

    world_size: int
    times: StepTimes
    network: Network
    workers: Sequence[Scaled]

    @classmethod
    def of(cls, times: StepTimes, network: Network, batch_size: float, world_size: int) -> Self:
        """Return the predictions; arguments as for `scaled`."""
        workers = [scaled(times, network, batch_size, one) for one in sorted({*WORKERS, world_size})]
        return cls(world_size=world_size, times=times, network=network, workers=workers)


def _seconds(times: StepTimes, network: Network, examples: float, workers: int) -> float:
    shared_noise = min(NOISE * times.values, times.fixed) * (1 - 1 / workers)
    return times.fixed + times.per_example * examples - shared_noise + network.seconds(times.values, workers)
