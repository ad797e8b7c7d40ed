# SPDX-License-Identifier: Apache-2.0
"""How fast a private training step is on this machine, beside PyTorch and Opacus; and whether each side is right.

All sides run in one process, one step each per round, in an order that turns by one place every round; a first round
warms up. What a machine does in the background then falls on all sides alike, and the result is the quotient of two
sides' times in the same round: its median and quartiles over the rounds.

Before anything is timed, the very steps are checked. Without noise a step with learning rate a moves the parameters by
-a/B sum_i c_i g_i, so the sum is read off the parameters and compared with a loop over single examples in plain torch.

    full precision   ||c_i g_i - loop|| / ||loop|| < 1e-4    one example at a time, the median of some
                     ||sum - loop|| / ||loop|| < 5e-2        one physical batch
    quantized        the cosine of c_i g_i with the loop's is at least 0.1: rounding is random, so values differ
    private          ||c_i g_i|| <= C, and another record in one's place changes the sum by no more than 2C

with c_i = min(1, C / ||g_i||), or 1 where nothing is private. A batch may differ by more than its examples do, because
a convolution rounds otherwise at another batch size: a value at the kink of a ReLU then falls on its other side, and
one of 512 values that does so moves an example's gradient by a twentieth. C is the median of some examples' norms, so
that some are clipped and some are not. A side that fails is reported as wrong and not timed.

Peak memory is taken in a process of its own for each side: the most that is resident while the side is set up and takes
two steps, less what is resident before, when network and data are in place and the side has taken a step of a tiny
network, so that the libraries it needs are loaded.

Symbols: B examples, g_i gradient of example i, C clip norm.
"""

import copy
import dataclasses
import datetime
import importlib.metadata
import json
import math
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from dpquant.app.contenders import (
    DESCRIPTIONS,
    SIDES,
    Batch,
    BenchSettings,
    MakeSide,
    StepSettings,
    build_network,
    example_losses,
    synthetic_batch,
)
from dpquant.engine.batches import take_rows
from dpquant.engine.randomness import seeded
from dpquant.machine import Hardware, forget_peak, memory_mib

Watch = Callable[[str], None]

# Quotients of two sides' times; above 1, the second is faster.
RATIOS = (
    ("plain", "full"),
    ("plain", "most"),
    ("plain", "all"),
    ("opacus", "ghost"),
    ("opacus", "full"),
    ("opacus", "most"),
    ("opacus", "all"),
    ("ghost", "full"),
    ("ghost", "all"),
    ("full", "most"),
    ("full", "all"),
)

_NOT_PRIVATE, _QUANTIZED = ("plain",), ("most", "all")
_TOLERANCE = 1e-4  # float32 sums in another order differ by a hundredth of it
_BATCH_TOLERANCE = 5e-2
_NORM_TOLERANCE = 1e-4  # Opacus takes norms in float32, and with many parameters they come out too small
_SMALLEST_COSINE = 0.1
_LARGE_RECORD = 100.0
_FEW = 3  # examples of which each is also taken alone
_LARGE_STEP = 2.0**20  # so that parameters of size 1 do not round away what is read off them


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spread:
    """The median of some values, and their quartiles."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """The spread of at least one value."""
        if len(values) == 1:
            return cls(low=values[0], median=values[0], high=values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(low=low, median=median, high=high)

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SideResult:
    """One side.

    Attributes:
      status: `measured`, `wrong` (it computes something else, and was not timed) or `does not run`.
      reason: what is wrong, or why it does not run; empty otherwise.
      error: relative, of the sum that its step is made of; None where it was not compared.
      peak_mib: memory of a step beyond network and data; None where it was not measured.
    """

    status: str
    reason: str = ""
    error: float | None = None
    ms_per_example: Spread | None = None
    peak_mib: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchRecord:
    """One measurement: where, what, and what came out.

    Attributes:
      threads: that torch computed with.
      busy: other work was running when it began; its timings are not to be trusted.
      ratios: {"a/b": time of a over time of b, in the same round}.
    """

    dpquant: str
    opacus: str
    date: str
    hardware: Hardware
    threads: int
    busy: bool
    settings: BenchSettings
    sides: dict[str, SideResult]
    ratios: dict[str, Spread]

    @property
    def wrong(self) -> tuple[str, ...]:
        """The sides that compute something else than they should."""
        return tuple(name for name, side in self.sides.items() if side.status == "wrong")

    def to_json(self) -> str:
        """The record as JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    def table(self) -> list[tuple[str, ...]]:
        """A header and one row a side, as text: median time, quotients with plain's and Opacus' time, memory, check."""
        rows = [("side", "ms/example", "plain / this", "Opacus / this", "MiB", "check")]
        for name, side in self.sides.items():
            rows.append(
                (
                    DESCRIPTIONS.get(name, name),
                    "-" if side.ms_per_example is None else f"{side.ms_per_example.median:.2f}",
                    self._quotient("plain", name),
                    self._quotient("opacus", name),
                    "-" if side.peak_mib is None else f"{side.peak_mib:,.0f}",
                    "right" if side.status == "measured" else f"{side.status}: {side.reason}",
                )
            )
        return rows

    def _quotient(self, first: str, second: str) -> str:
        spread = self.ratios.get(f"{first}/{second}")
        return "-" if spread is None else str(spread)


def measure(
    settings: BenchSettings, *, watch: Watch = lambda what: None, sides: Mapping[str, MakeSide] = SIDES
) -> BenchRecord:
    """Check every side, then time those that are right, in turn.

    Args:
      settings: what to measure.
      watch: told in a few words what happens now.
      sides: what to compare, by name.
    Returns: the record; a side that fails or does not run is in it, with the reason.
    Raises:
      ModelError, SettingError, FormatError: the settings cannot be measured.
    Privacy: reads no data; examples are synthetic.
    """
    hardware = Hardware.here()
    threads_before = torch.get_num_threads()
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    try:
        with warnings.catch_warnings(), seeded(0):
            warnings.simplefilter("ignore")  # Opacus warns of its hooks and of its random numbers, at every step
            results, steps = _checked(settings, sides, watch)
            times = _timed(steps, settings.rounds, watch)
            threads = torch.get_num_threads()
    finally:
        torch.set_num_threads(threads_before)
    for name, seconds in times.items():
        spread = Spread.of([s / settings.num_examples * 1e3 for s in seconds])
        results[name] = dataclasses.replace(results[name], ms_per_example=spread)
    return BenchRecord(
        dpquant=importlib.metadata.version("dpquant"),
        opacus=importlib.metadata.version("opacus"),
        date=f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC",
        hardware=hardware,
        threads=threads,
        busy=hardware.busy,
        settings=settings,
        sides=results,
        ratios={
            f"{a}/{b}": Spread.of([x / y for x, y in zip(times[a], times[b], strict=True)])
            for a, b in RATIOS
            if a in times and b in times
        },
    )


def _checked(
    settings: BenchSettings, sides: Mapping[str, MakeSide], watch: Watch
) -> tuple[dict[str, SideResult], dict[str, Callable[[], None]]]:
    """What is known of each side before it is timed, and the steps of those that are right."""
    network = build_network(settings.model, settings.image_size)
    batch = synthetic_batch(settings.model, settings.image_size, settings.num_examples)
    watch("the sum of clipped gradients, one example at a time")
    oracle = Oracle(network, batch, settings.of_step)
    results, steps = {}, {}
    for name, make in sides.items():
        watch(f"checking {name}")
        try:
            reason, error = oracle.judge(name, make)
            if not reason:
                steps[name] = make(copy.deepcopy(network), batch, settings.of_step)
        except Exception as failure:  # another library's, for any reason that it may have
            first_line = (str(failure).strip() or "no message").splitlines()[0]
            results[name] = SideResult(status="does not run", reason=f"{type(failure).__name__}: {first_line}")
            continue
        results[name] = SideResult(status="wrong" if reason else "measured", reason=reason, error=error)
        if settings.memory and not reason and name in SIDES:
            watch(f"memory of {name}")
            results[name] = dataclasses.replace(results[name], peak_mib=peak_mib(settings, name))
    return results, steps


def _timed(steps: Mapping[str, Callable[[], None]], rounds: int, watch: Watch) -> dict[str, list[float]]:
    """Seconds of every side in each round; the round before the first does not count."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for number in range(rounds + 1):
        watch(f"round {number} of {rounds}" if number else "warming up")
        turn = number % max(len(names), 1)
        for name in names[turn:] + names[:turn]:
            start = time.perf_counter()
            steps[name]()
            if number:
                times[name].append(time.perf_counter() - start)
    return times


# Correctness


class Oracle:
    """Gradients by a loop over examples in plain torch, and whether what a side's step makes of them is right."""

    def __init__(self, network: nn.Module, batch: Batch, settings: StepSettings) -> None:
        """Takes the first physical batch, and of it a few examples to be looked at one at a time."""
        self._network = network
        self._batch: Batch = take_rows(batch, slice(settings.physical_batch_size))
        self._few: list[Batch] = [take_rows(batch, slice(i, i + 1)) for i in range(min(_FEW, len(batch[1])))]
        self._gradients = [gradient_of(network, example) for example in self._few]
        bound = statistics.median(_norm(gradient) for gradient in self._gradients)
        self._settings = dataclasses.replace(settings, max_grad_norm=bound, noise_multiplier=0.0, lr=_LARGE_STEP)
        self._sums = {limit: summed(network, self._batch, limit) for limit in (bound, math.inf)}

    def judge(self, name: str, make: MakeSide) -> tuple[str, float | None]:
        """What is wrong with a side, empty if nothing is; and its relative error, None for a quantized one."""
        bound = math.inf if name in _NOT_PRIVATE else self._settings.max_grad_norm
        alone = [self._sum_of(make, example) for example in self._few]
        expected = [gradient * _factor(gradient, bound) for gradient in self._gradients]
        if (largest := max(_norm(vector) for vector in alone)) > bound * (1 + _NORM_TOLERANCE):
            excess = largest - bound
            return f"one example contributes a norm of {largest:.4g}, {excess:.1e} above the bound", None
        if bound < math.inf and (change := self._change_of_neighbour(make)) > 2 * bound * (1 + _NORM_TOLERANCE):
            return f"another record in one's place changes the sum by {change:.4g}, above 2C = {2 * bound:.4g}", None
        if name in _QUANTIZED:
            cosine = statistics.median(_cosine(*pair) for pair in zip(alone, expected, strict=True))
            if not cosine >= _SMALLEST_COSINE:
                return f"its gradients have a cosine of {cosine:.2g} with those in full precision", None
            return "", None
        error = statistics.median(_error(*pair) for pair in zip(alone, expected, strict=True))
        if not error < _TOLERANCE:
            return f"its gradient of an example is off by {error:.1e} of the right one's norm", error
        if not (error_of_batch := _error(self._sum_of(make, self._batch), self._sums[bound])) < _BATCH_TOLERANCE:
            return f"its sum over a batch is off by {error_of_batch:.1e} of the right one's norm", error
        return "", error

    def _sum_of(self, make: MakeSide, batch: Batch) -> Tensor:
        """The sum over the batch that one step of the side is made of, read off the parameters."""
        network = copy.deepcopy(self._network)
        parameters = list(network.parameters())
        before = _flat(parameters)
        make(network, batch, self._settings)()
        return (before - _flat(parameters)) * (len(batch[1]) / self._settings.lr)

    def _change_of_neighbour(self, make: MakeSide) -> float:
        """By how much the sum changes where a large record takes the last one's place, in a batch of the same size."""
        inputs, labels, ids = (torch.cat(parts) for parts in zip(*self._few, strict=True))
        others = inputs.clone(), labels.clone(), ids.clone()
        others[0][-1] *= -_LARGE_RECORD
        others[2][-1] += len(ids)
        return _norm(self._sum_of(make, (inputs, labels, ids)) - self._sum_of(make, others))


def gradient_of(network: nn.Module, example: Batch) -> Tensor:
    """The gradient of one example's loss as one vector `(P,)`, by autograd."""
    return _flat(torch.autograd.grad(example_losses(network, example).sum(), list(network.parameters())))


def summed(network: nn.Module, batch: Batch, max_grad_norm: float) -> Tensor:
    """sum_i min(1, C / ||g_i||) g_i as one vector `(P,)`, from one backward pass for each example."""
    total = torch.zeros(sum(p.numel() for p in network.parameters()))
    for i in range(len(batch[1])):
        gradient = gradient_of(network, take_rows(batch, slice(i, i + 1)))
        total.add_(gradient, alpha=_factor(gradient, max_grad_norm))
    return total


def _factor(gradient: Tensor, max_grad_norm: float) -> float:
    return min(1.0, max_grad_norm / _norm(gradient))


def _error(found: Tensor, expected: Tensor) -> float:
    return _norm(found - expected) / _norm(expected)


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a, b, dim=0))


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def _norm(vector: Tensor) -> float:
    return float(torch.linalg.vector_norm(vector, dtype=torch.float64))


# Memory


def peak_mib(settings: BenchSettings, side: str) -> float | None:
    """Peak memory of a side's step beyond network and data, in MiB, from a process of its own; None if it fails.

    The system's own record of a process' peak is used on Linux, where it is read from the process' status: the one in
    `getrusage` starts from the parent's peak there. It does on no other system, so `getrusage` serves those.
    """
    argument = json.dumps({"settings": dataclasses.asdict(settings), "side": side, "threads": torch.get_num_threads()})
    program = "import sys; from dpquant.app.bench import print_peak; print_peak(sys.argv[1])"
    result = subprocess.run([sys.executable, "-c", program, argument], capture_output=True, text=True, check=False)
    return float(result.stdout) if result.returncode == 0 else None


def print_peak(argument: str) -> None:
    """What the process that `peak_mib` starts does: take two steps, print MiB."""
    given = json.loads(argument)
    torch.set_num_threads(given["threads"])
    settings, make = BenchSettings(**given["settings"]), SIDES[given["side"]]
    warnings.simplefilter("ignore")
    make(build_network("cnn", 8), synthetic_batch("cnn", 8, 1), settings.of_step)()
    network = build_network(settings.model, settings.image_size)
    batch = synthetic_batch(settings.model, settings.image_size, settings.num_examples)
    before = forget_peak()
    step = make(network, batch, settings.of_step)
    forget_peak()  # in the trials by which ours chooses its microbatch
    for _ in range(2):
        step()
    print(max(memory_mib()[1] - before, 0.0))
