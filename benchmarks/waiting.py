# SPDX-License-Identifier: Apache-2.0
"""Time operators under several settings of how OpenMP's threads wait. `scripts/bench waiting`.

The operators run with each setting in a process of its own; the processes take turns. First they run for some
hundredths of a second whenever all processors have been idle for a moment, so that a shared machine can be used too.
Then they run while as many other processes compute as there are processors. The result is the least and the median
microseconds of an operator.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

SETTINGS: dict[str, dict[str, str]] = {
    "as OpenMP does": {},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
}
BURST_S, MOMENT_S = 0.04, 0.06
IDLE_SHARE = 0.8
BUSY_TURNS = 4
Times = dict[str, float]  # {operator: microseconds, the median of a burst}


def main() -> None:
    """Measure every setting, when idle and when busy; print and keep the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=120.0, help="to wait for moments in which nobody computes")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    children = {name: Child({**inherited, **variables}) for name, variables in SETTINGS.items()}
    results = {"idle": when_idle(children, args.seconds), "busy": when_busy(children)}
    for child in children.values():
        child.stop()
    for when, by_setting in results.items():
        for setting, bursts in by_setting.items():
            words = [
                f"{name} {min(all_times):.0f} {statistics.median(all_times):.0f}"
                for name in (bursts[0] if bursts else ())
                if (all_times := [burst[name] for burst in bursts])
            ]
            print(f"{when}, {setting}, {len(bursts)} bursts: {'; '.join(words)}")

    from benchmarks.results import folder_here
    from dpquant.machine import Hardware

    record = {"hardware": dataclasses.asdict(Hardware.here()), "microseconds": results}
    (args.out or folder_here() / "waiting.json").write_text(json.dumps(record, indent=1) + "\n")


class Child:
    """A process that runs the operators for a moment on request."""

    def __init__(self, environment: dict[str, str]):
        program = "from benchmarks.waiting import serve; serve()"
        self._process = subprocess.Popen(
            [sys.executable, "-c", program], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        self._stdout.readline()  # it is ready

    def burst(self) -> Times:
        """Run the operators."""
        self._stdin.write("\n")
        self._stdin.flush()
        return json.loads(self._stdout.readline())

    def stop(self) -> None:
        """End the process."""
        self._stdin.close()
        self._process.wait()


def when_idle(children: dict[str, Child], seconds: float) -> dict[str, list[Times]]:
    """Let the children take turns at moments in which all processors are idle."""
    results: dict[str, list[Times]] = {name: [] for name in children}
    end, number = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        before = ticks()
        time.sleep(MOMENT_S)
        now = ticks()
        shares = [(n[0] - b[0]) / max(n[1] - b[1], 1) for n, b in zip(now, before, strict=True)]
        if min(shares) >= IDLE_SHARE:
            name = list(children)[number % len(children)]
            results[name].append(children[name].burst())
            number += 1
    return results


def when_busy(children: dict[str, Child]) -> dict[str, list[Times]]:
    """Let the children take turns while other processes compute, one per processor."""
    load = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    try:
        return {name: [child.burst() for _ in range(BUSY_TURNS)] for name, child in children.items()}
    finally:
        for process in load:
            process.kill()
            process.wait()


def ticks() -> list[tuple[int, int]]:
    """Return the clock ticks that each processor was idle, and all ticks that passed."""
    lines = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
    counts = [[int(n) for n in line[1:9]] for line in lines if line[0].startswith("cpu") and line[0] != "cpu"]
    return [(count[3] + count[4], sum(count)) for count in counts]


def serve() -> None:
    """Run every operator for a burst at each line on standard input, and print the times: the body of a child."""
    import torch

    map_, matrix = torch.randn(2**17), torch.randn(256, 256)
    convolution, images = torch.nn.Conv2d(16, 32, 3), torch.randn(64, 16, 16, 16)
    operators: dict[str, Callable[[], object]] = {
        "relu of 131,072": lambda: torch.relu(map_),
        "256x256 @ 256x256": lambda: matrix @ matrix,
        "convolution": lambda: convolution(images),
    }
    with torch.no_grad():
        for work in operators.values():
            work()
        print("ready", flush=True)
        for _ in sys.stdin:
            print(json.dumps({name: usual(work) for name, work in operators.items()}), flush=True)


def usual(work: Callable[[], object]) -> float:
    """Return the microseconds that the work takes, the median over a burst."""
    times, end = [], time.perf_counter() + BURST_S
    while not times or time.perf_counter() < end:
        began = time.perf_counter()
        work()
        times.append((time.perf_counter() - began) * 1e6)
    return statistics.median(times)


if __name__ == "__main__":
    main()
