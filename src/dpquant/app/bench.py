# SPDX-License-Identifier: Apache-2.0
"""`dpquant bench`: times a private training step against PyTorch and Opacus, and checks each side before timing it.

A side is one implementation of the step (`contenders.py`). All sides run in one process, one step each per round. The
order of the sides rotates by one place every round, and a first round warms up. Background work of the machine then
affects all sides alike. The result is the ratio of two sides' times in the same round: its median and quartiles over
the rounds.

Before a side is timed, its step is checked. Without noise, a step with learning rate a moves the parameters by
-a/B sum_i c_i g_i. The sum is therefore computed from the change of the parameters and compared with the result of a
loop over single examples in plain torch.

    full precision   ||c_i g_i - loop|| / ||loop|| < 1e-4    one example at a time, median over a few
                     ||sum - loop|| / ||loop|| < 5e-2        one physical batch
    rounded          the cosine between c_i g_i and the loop's is >= 0.1: in few bits, or at random, values differ
    private          ||c_i g_i|| <= C, and replacing one record by another changes the sum by at most 2C

with c_i = min(1, C / ||g_i||), or 1 for a side that is not private. The bound for a batch is looser than for single
examples, because a convolution may sum in another order at another batch size. A value near the kink of a ReLU can
then change sign, and one of 512 values that does so moves an example's gradient by a twentieth. C is the median norm of
a few examples, so that some of them are clipped and some are not. A side that fails is reported as wrong, not timed.

Peak memory is measured in a separate process for each side. It is the peak of resident memory while the side is set up
and takes two steps, minus resident memory before. By then network and data are in memory, and the side has taken a step
of a tiny network, which loads its libraries.

Symbols: B examples, g_i gradient of example i, C clipping norm.
"""

import copy
import dataclasses
import datetime
import json
import math
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from dpquant.app.contenders import (
    DESCRIPTIONS,
    NOT_PRIVATE,
    ROUNDED,
    SIDES,
    BenchSettings,
    MakeSide,
    StepSettings,
    example_losses,
    opacus_version,
    why_not,
)
from dpquant.app.networks import Batch, build_network, check_fits, synthetic_batch
from dpquant.engine.batches import take_rows
from dpquant.engine.randomness import seeded
from dpquant.machine import Hardware, check_threads, forget_peak, memory_mib, now
from dpquant.version import version

Watch = Callable[[str], None]

# Pairs of sides whose times are divided, first over second; above 1, the second is faster.
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

_TOLERANCE = 1e-4  # float32 sums in another order differ by a hundredth of it
_BATCH_TOLERANCE = 5e-2
_NORM_TOLERANCE = 1e-4  # Opacus computes norms in float32, which are too small for networks with many parameters
_SMALLEST_COSINE = 0.1
_LARGE_RECORD = 100.0  # factor on the inputs of the record that replaces another
_FEW = 3  # examples that are also checked one at a time
_LARGE_STEP = 2.0**20  # learning rate: the step must not be lost to round-off beside parameters of size 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spread:
    """Median and quartiles."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Return the median and the quartiles of one or more values."""
        if len(values) == 1:
            return cls(low=values[0], median=values[0], high=values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(low=low, median=median, high=high)

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SideResult:
    """Result of one side.

    Attributes:
      status: `measured`, `wrong` (the check failed, and it was not timed) or `does not run`.
      reason: which check failed, or why the side does not run; empty otherwise.
      error: relative error of a clipped gradient, median over a few examples; None if values were not compared.
      ms_per_example: time of a step over its examples, in milliseconds; None if it was not timed.
      peak_mib: peak memory of a step beyond network and data, in MiB; None if it was not measured.
    """

    status: str
    reason: str = ""
    error: float | None = None
    ms_per_example: Spread | None = None
    peak_mib: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchRecord:
    """One benchmark result with its environment.

    Attributes:
      dpquant, opacus: versions; opacus is "" where it is not installed.
      date: end of the measurement, in UTC.
      hardware: the machine.
      threads: number of threads that torch used.
      busy: other work was running when the measurement began, so that its timings are unreliable.
      settings: as given.
      sides: {name: result}.
      ratios: {"a/b": time of a over time of b in the same round}, for the pairs that were timed.
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
        """Return the names of the sides that failed their check."""
        return tuple(name for name, side in self.sides.items() if side.status == "wrong")

    def to_json(self) -> str:
        """Return the record as JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    def table(self) -> list[tuple[str, ...]]:
        """Return a header and one row per side, as text: time, plain's and Opacus' time over it, memory, check."""
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
    settings: BenchSettings,
    *,
    watch: Watch = lambda what: None,
    sides: Mapping[str, MakeSide] = SIDES,
    ratios: Sequence[tuple[str, str]] = RATIOS,
) -> BenchRecord:
    """Check every side, then time in rotation those that pass.

    Args:
      settings: network, batch and number of rounds.
      watch: called with a few words about each stage when it begins.
      sides: {name: function that makes the side's step}.
      ratios: pairs of sides whose times are divided, first over second.
    Returns: the record. A side that fails its check or does not run is in it, with the reason.
    Raises:
      ModelError, SettingError, FormatError: the settings cannot be measured.
    Privacy: reads no data; examples are synthetic.
    """
    hardware = Hardware.here()
    threads_before = torch.get_num_threads()
    if settings.threads is not None:
        check_threads(settings.threads)
        torch.set_num_threads(settings.threads)
    try:
        with warnings.catch_warnings(), seeded(0):
            warnings.simplefilter("ignore")  # Opacus warns about its hooks and its random numbers at every step
            results, steps = _checked(settings, sides, watch)
            times = _timed(steps, settings.rounds, watch)
            threads = torch.get_num_threads()
    finally:
        torch.set_num_threads(threads_before)
    for name, seconds in times.items():
        spread = Spread.of([s / settings.num_examples * 1e3 for s in seconds])
        results[name] = dataclasses.replace(results[name], ms_per_example=spread)
    return BenchRecord(
        dpquant=version(),
        opacus=opacus_version(),
        date=f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC",
        hardware=hardware,
        threads=threads,
        busy=hardware.busy,
        settings=settings,
        sides=results,
        ratios={
            f"{a}/{b}": Spread.of([x / y for x, y in zip(times[a], times[b], strict=True)])
            for a, b in ratios
            if a in times and b in times
        },
    )


def _checked(
    settings: BenchSettings, sides: Mapping[str, MakeSide], watch: Watch
) -> tuple[dict[str, SideResult], dict[str, Callable[[], None]]]:
    """Return {side: result of its check} and {side: its step}, the latter for the sides that pass."""
    network, batch = _network_and_batch(settings)
    watch("the sum of clipped gradients, one example at a time")
    oracle = Oracle(network, batch, settings.of_step)
    results, steps = {}, {}
    for name, make in sides.items():
        watch(f"checking {name}")
        try:
            reason, error = oracle.judge(name, make)
            if not reason:
                steps[name] = make(copy.deepcopy(network), batch, settings.of_step)
        except Exception as failure:  # another library may raise anything
            results[name] = SideResult(status="does not run", reason=why_not(failure))
            continue
        results[name] = SideResult(status="wrong" if reason else "measured", reason=reason, error=error)
        if settings.memory and not reason and name in SIDES:
            watch(f"memory of {name}")
            results[name] = dataclasses.replace(results[name], peak_mib=peak_mib(settings, name))
    return results, steps


def _network_and_batch(settings: BenchSettings) -> tuple[nn.Module, Batch]:
    """Return the network and its batch on the settings' device."""
    check_fits(settings.model, settings.image_size, settings.num_examples)
    inputs, labels, ids = synthetic_batch(settings.model, settings.image_size, settings.num_examples)
    network = build_network(settings.model, settings.image_size).to(settings.device)
    return network, (inputs.to(settings.device), labels.to(settings.device), ids.to(settings.device))


def _timed(steps: Mapping[str, Callable[[], None]], rounds: int, watch: Watch) -> dict[str, list[float]]:
    """Return {side: seconds of its step in each round}. One more round is run first, to warm up, and not counted."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for number in range(rounds + 1):
        watch(f"round {number} of {rounds}" if number else "warming up")
        turn = number % max(len(names), 1)
        for name in names[turn:] + names[:turn]:
            start = now()
            steps[name]()
            if number:
                times[name].append(now() - start)
    return times


# Correctness


class Oracle:
    """Reference gradients from a loop over examples in plain torch, and the checks of a side against them."""

    def __init__(self, network: nn.Module, batch: Batch, settings: StepSettings) -> None:
        """Compute the reference for the first physical batch, and for a few of its examples one at a time."""
        self._network = network
        self._batch: Batch = take_rows(batch, slice(settings.physical_batch_size))
        self._few: list[Batch] = [take_rows(batch, slice(i, i + 1)) for i in range(min(_FEW, len(batch[1])))]
        self._gradients = [gradient_of(network, example) for example in self._few]
        bound = statistics.median(_norm(gradient) for gradient in self._gradients)
        self._settings = dataclasses.replace(settings, max_grad_norm=bound, noise_multiplier=0.0, lr=_LARGE_STEP)
        self._sums = {limit: summed(network, self._batch, limit) for limit in (bound, math.inf)}

    def judge(self, name: str, make: MakeSide) -> tuple[str, float | None]:
        """Return the check that a side fails, as a phrase, and its relative error.

        The phrase is empty if the side passes. The error is None if values were not compared, as in low precision.
        """
        bound = math.inf if name in NOT_PRIVATE else self._settings.max_grad_norm
        alone = [self._sum_of(make, example) for example in self._few]
        expected = [gradient * _factor(gradient, bound) for gradient in self._gradients]
        if (largest := max(_norm(vector) for vector in alone)) > bound * (1 + _NORM_TOLERANCE):
            excess = largest - bound
            return f"one example contributes a norm of {largest:.4g}, {excess:.1e} above the bound", None
        if bound < math.inf and (change := self._change_of_neighbour(make)) > 2 * bound * (1 + _NORM_TOLERANCE):
            return f"another record in one's place changes the sum by {change:.4g}, above 2C = {2 * bound:.4g}", None
        if name in ROUNDED:
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
        """Return the sum `(P,)` over the batch in one step of the side, computed from the change of the parameters."""
        network = copy.deepcopy(self._network)
        parameters = list(network.parameters())
        before = _flat(parameters)
        make(network, batch, self._settings)()
        return (before - _flat(parameters)) * (len(batch[1]) / self._settings.lr)

    def _change_of_neighbour(self, make: MakeSide) -> float:
        """Return the norm of the change of the sum when a large record replaces the last one of a small batch."""
        inputs, labels, ids = (torch.cat(parts) for parts in zip(*self._few, strict=True))
        others = inputs.clone(), labels.clone(), ids.clone()
        others[0][-1] = -_LARGE_RECORD * inputs[-1] if inputs.is_floating_point() else inputs[-1].flip(0)
        others[2][-1] += len(ids)
        return _norm(self._sum_of(make, (inputs, labels, ids)) - self._sum_of(make, others))


def gradient_of(network: nn.Module, example: Batch) -> Tensor:
    """Return the gradient of one example's loss by autograd, flattened to `(P,)`."""
    return _flat(torch.autograd.grad(example_losses(network, example).sum(), list(network.parameters())))


def summed(network: nn.Module, batch: Batch, max_grad_norm: float) -> Tensor:
    """Return sum_i min(1, C / ||g_i||) g_i, flattened to `(P,)`, from one backward pass per example."""
    total = torch.zeros_like(_flat(list(network.parameters())))
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
    """Return the peak memory of a side's step beyond network and data, in MiB; None if the side fails.

    A separate process measures it, and reads its own status on Linux: `getrusage` starts from the parent's peak there.
    """
    argument = json.dumps({"settings": dataclasses.asdict(settings), "side": side, "threads": torch.get_num_threads()})
    program = "import sys; from dpquant.app.bench import print_peak; print_peak(sys.argv[1])"
    result = subprocess.run([sys.executable, "-c", program, argument], capture_output=True, text=True, check=False)
    return float(result.stdout) if result.returncode == 0 else None


def print_peak(argument: str) -> None:
    """Take two steps of a side and print their peak memory in MiB: the program that `peak_mib` runs."""
    given = json.loads(argument)
    torch.set_num_threads(given["threads"])
    settings, make = BenchSettings(**given["settings"]), SIDES[given["side"]]
    warnings.simplefilter("ignore")
    make(build_network("cnn", 8), synthetic_batch("cnn", 8, 1), settings.of_step)()
    network, batch = _network_and_batch(settings)
    before = forget_peak()
    step = make(network, batch, settings.of_step)
    forget_peak()  # of the trials by which dpquant chooses its microbatch
    for _ in range(2):
        step()
    print(max(memory_mib()[1] - before, 0.0))
