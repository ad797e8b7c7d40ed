# SPDX-License-Identifier: Apache-2.0
"""Runs `dpquant train` for a table of settings and seeds, side by side, and can be interrupted and started again.

Every run is the command line that a user would type. A run whose record exists is not repeated. What is kept of a run
is its record, without the parts that only describe the machine's moment.
"""

import concurrent.futures
import dataclasses
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

RESULTS = Path(__file__).parent / "results"

# glibc gives large blocks back to the system and gets them anew at every step; kept, they save a fifth of the time.
_KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**33), "MALLOC_TRIM_THRESHOLD_": str(2**34)}


@dataclasses.dataclass(frozen=True)
class Run:
    """One row of a table, at one seed."""

    row: str
    seed: int
    options: tuple[str, ...]

    def command(self, out: Path) -> list[str]:
        """What a user would type."""
        return ["dpquant", "train", *self.options, "--seed", str(self.seed), "--out", str(out)]


def table(rows: dict[str, Sequence[str]], common: Sequence[str], seeds: Sequence[int]) -> list[Run]:
    """All rows at all seeds; seed by seed, so that an interrupted table has every row."""
    return [Run(row, seed, (*common, *options)) for seed in seeds for row, options in rows.items()]


def run_all(runs: Sequence[Run], folder: Path, jobs: int) -> dict[str, list[dict]]:
    """Do what is not done yet, `jobs` at a time, one thread each. Returns {row: records, by seed}."""
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        done = list(pool.map(lambda run: _record(run, folder, jobs), runs))
    records: dict[str, list[dict]] = {}
    for run, record in zip(runs, done, strict=True):
        records.setdefault(run.row, []).append(record)
    return records


def _record(run: Run, folder: Path, jobs: int) -> dict:
    out = folder / f"{run.row}-{run.seed}".replace(" ", "_").replace("%", "")
    if not (out / "record.json").exists():
        threads = str(max((os.cpu_count() or 1) // jobs, 1))
        binary = str(Path(sys.executable).parent / "dpquant")
        command = [binary, *run.command(out)[1:], "--threads", threads]
        environment = {**os.environ, "OMP_NUM_THREADS": threads, **_KEEP_MEMORY}
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if result.returncode:
            raise SystemExit(f"{' '.join(command)}\n{result.stderr}")
        print(
            f"{run.row}, seed {run.seed}: {json.loads((out / 'record.json').read_text())['accuracy_test']:.4f}",
            flush=True,
        )
    record = json.loads((out / "record.json").read_text())
    return {**record, "command": " ".join(run.command(Path("RUN")))}


def summary(records: dict[str, list[dict]]) -> dict[str, dict]:
    """{row: test accuracy in percent (mean, sample standard deviation, each seed), epsilon, what ran quantized}."""
    rows = {}
    for row, runs in records.items():
        accuracies = [100 * run["accuracy_test"] for run in runs]
        rows[row] = {
            "accuracy_mean": round(statistics.mean(accuracies), 2),
            "accuracy_spread": round(statistics.stdev(accuracies), 2) if len(accuracies) > 1 else None,
            "accuracies": [round(a, 2) for a in accuracies],
            "epsilon": max(run["epsilon"] for run in runs),
            "epsilon_analysis_share": max(run["epsilon_analysis_share"] for run in runs),
            "quantized_fraction_layers": round(statistics.mean(run["quantized_fraction_layers"] for run in runs), 3),
            "quantized_fraction_macs": round(statistics.mean(run["quantized_fraction_macs"] for run in runs), 3),
            "command": runs[0]["command"],
        }
    return rows


def write(name: str, records: dict[str, list[dict]]) -> dict[str, dict]:
    """results/<name>.json: the summary and every record. Returns the summary."""
    rows = summary(records)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps({"summary": rows, "records": records}, indent=1) + "\n")
    for row, facts in rows.items():
        print(f"{row:32s} {facts['accuracy_mean']:6.2f} +- {facts['accuracy_spread']}   epsilon {facts['epsilon']:.3f}")
    return rows
