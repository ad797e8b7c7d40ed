# SPDX-License-Identifier: Apache-2.0
"""What it costs and gains that OpenMP's threads sleep while they wait, instead of spinning. `scripts/bench waiting`.

Steps of a small and of a large network run with either policy, each in a process of its own, in turn: on the machine as
it is, and beside as many processes that compute as there are cores. Given are the least and the median time of a step
and its processor time, user and system. The load lasts for the seconds that are timed.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

POLICIES: dict[str, dict[str, str]] = {"spinning": {}, "sleeping": {"OMP_WAIT_POLICY": "passive"}}
WORK = {"cnn": (64, "all"), "mlp": (4096, "full"), "resnet18": (64, "all")}  # network: batch size, side


def main() -> None:
    """Measure both policies on every network, without and with load; print and keep the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=list(WORK), default=list(WORK))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0, help="timed in each process")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--steps-of", choices=list(WORK), default=None, help=argparse.SUPPRESS)  # what a child does
    args = parser.parse_args()
    if args.steps_of is not None:
        print(json.dumps(steps(args.steps_of, args.seconds)))
        return
    rows = []
    for model in args.models:
        for load in (0, os.cpu_count() or 1):
            runs: dict[str, list[dict[str, list[float]]]] = {policy: [] for policy in POLICIES}
            for _ in range(args.rounds):
                for policy, variables in POLICIES.items():
                    runs[policy].append(measured(model, args.seconds, variables, load))
            for policy, results in runs.items():
                wall = [ms for result in results for ms in result["wall_ms"]]
                cpu = [ms for result in results for ms in result["cpu_ms"]]
                row = {"model": model, "load": load, "policy": policy, "steps": len(wall), "wall_ms": min(wall)}
                row |= {"wall_ms_median": statistics.median(wall), "cpu_ms": min(cpu)}
                row |= {"cpu_ms_median": statistics.median(cpu)}
                rows.append(row)
                print(
                    "  ".join(f"{v:10.2f}" if isinstance(v, float) else f"{v!s:10s}" for v in row.values()), flush=True
                )

    from benchmarks.results import folder_here
    from dpquant.machine import Hardware

    record = {"hardware": dataclasses.asdict(Hardware.here()), "rows": rows}
    (args.out or folder_here() / "waiting.json").write_text(json.dumps(record, indent=1) + "\n")


def measured(model: str, seconds: float, variables: dict[str, str], load: int) -> dict[str, list[float]]:
    """Time steps in a process with these variables, beside `load` busy ones, which run while it is timed."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    command = [sys.executable, "-m", "benchmarks.waiting", "--steps-of", model, "--seconds", str(seconds)]
    with subprocess.Popen(
        command, env={**inherited, **variables}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdin is not None
        child.stdout.readline()  # it is ready
        with busy(load):
            child.stdin.write("go\n")
            child.stdin.flush()
            return json.loads(child.stdout.readline())


@contextlib.contextmanager
def busy(load: int) -> Iterator[None]:
    """Keep so many processors busy until the block ends."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(load)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def steps(model: str, seconds: float) -> dict[str, list[float]]:
    """Time steps of a network for some seconds, once a line on standard input has come; milliseconds of each."""
    from dpquant.app.contenders import NETWORKS, SIDES, StepSettings, build_network, synthetic_batch

    batch_size, side = WORK[model]
    image_size = NETWORKS[model].image_size
    settings = StepSettings(format="luq-fp4", physical_batch_size=batch_size)
    step = SIDES[side](build_network(model, image_size), synthetic_batch(model, image_size, batch_size), settings)
    for _ in range(3):
        step()
    print("ready", flush=True)
    sys.stdin.readline()
    times: dict[str, list[float]] = {"wall_ms": [], "cpu_ms": []}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["wall_ms"]) < 2:
        began = time.perf_counter(), time.process_time()
        step()
        times["wall_ms"].append((time.perf_counter() - began[0]) * 1e3)
        times["cpu_ms"].append((time.process_time() - began[1]) * 1e3)
    return times


if __name__ == "__main__":
    main()
