# SPDX-License-Identifier: Apache-2.0
"""Runs `dpquant train` for tables of settings and seeds, in parallel; it can be interrupted and started again.

Every run is a command line of `dpquant train`. A run whose record exists is not repeated, and tables that share a run
share its directory. The results keep each run's record and training times. The times may be kept here because the data
sets are public.
"""

import concurrent.futures
import dataclasses
import fnmatch
import hashlib
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import time
import typing
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType

from dpquant.app.compare import half_width
from dpquant.errors import DataError
from dpquant.runs.record import RunRecord
from dpquant.runs.settings import TrainSettings
from dpquant.runs.timings import Timings
from experiments.drawing import draw_rows
from experiments.lite0 import FACTORIES, WEIGHTS
from experiments.published import published

RESULTS = Path(__file__).parent / "results"
FOLDERS = ("GTSRB", "CIFAR10")  # placeholders in options for the folders of data sets that the user names
_PLACEHOLDER = re.compile(r"(?<=[:\s])[A-Z][A-Z0-9-]+(?=[/\s]|$)")  # these, and those of `packages` and `features`
SECONDS = ("seconds_train", "seconds_analysis")  # the timings that the results keep


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """Runs that are compared in one table.

    Attributes:
      name: name of the files of results.
      title: title of the plot.
      common: options of every run.
      rows: {row: its options}.
      seeds: seeds at which every row is run.
      once: more rows, run at the first seed only.
      draw: draws the plot from {row: records}; None: each row's accuracy.
      programs: {row: module that is run instead of `dpquant`}.
    """

    name: str
    title: str
    common: str
    rows: Mapping[str, str]
    seeds: Sequence[int]
    once: Mapping[str, str] = dataclasses.field(default_factory=dict)
    draw: Callable[["Table", Mapping[str, list[dict]], Path], None] | None = None
    programs: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def runs(self) -> list["Run"]:
        """Return all runs, ordered by seed, so that an interrupted table has every row."""
        first, *others = self.seeds
        return [
            Run(row, seed, f"{self.common} {options}", self.programs.get(row))
            for seed, rows in [(first, {**self.rows, **self.once}), *((seed, self.rows) for seed in others)]
            for row, options in rows.items()
        ]


@dataclasses.dataclass(frozen=True)
class Run:
    """Run of one row of a table at one seed."""

    row: str
    seed: int
    options: str
    program: str | None = None

    @property
    def command(self) -> str:
        """Return the command line of the run, with RUN for its directory."""
        program = "dpquant" if self.program is None else f"python -m {self.program}"
        return f"{program} train {' '.join(self.options.split())} --seed {self.seed} --out RUN"

    def folder(self, work: Path) -> Path:
        """Return the directory of the run."""
        return work / hashlib.sha256(self.command.encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Site:
    """Directories, data and time limit of the experiments.

    Attributes:
      work: directory of all runs.
      folders: {placeholder: folder of the data set or the weights}.
      jobs: number of parallel runs, which share the cores.
      threads: of each run; None: its share of the cores.
      seeds: of a table that are run, from its first; None: all.
      rows: pattern of TABLE/ROW, the names of the rows that are run.
      deadline: `time.monotonic` after which no run begins.
      kept: {command: record} of runs on other machines that count as done.
      results: directory of the tables' results.
      launch: runs a command, with the arguments of `subprocess.run`.
      failed: {run that failed: its command and what it said}, of all tables; the others go on.
    """

    work: Path
    folders: Mapping[str, Path]
    jobs: int = 1
    threads: int | None = None
    seeds: int | None = None
    rows: str = "*"
    deadline: float = float("inf")
    kept: Mapping[str, dict] = dataclasses.field(default_factory=dict)
    results: Path = RESULTS
    launch: Callable[..., subprocess.CompletedProcess] = subprocess.run
    failed: dict[Run, str] = dataclasses.field(default_factory=dict)

    def do(self, runs: Sequence[Run]) -> None:
        """Perform the runs that are not done and can begin before the deadline; say at once which one fails."""
        with concurrent.futures.ThreadPoolExecutor(self.jobs) as pool:
            list(pool.map(self._do, runs))

    def records(self, runs: Sequence[Run]) -> dict[str, list[dict]]:
        """Return {row: records in the order of the runs} of the runs that are done."""
        found: dict[str, list[dict]] = {}
        for run in runs:
            if (record := self.record(run)) is not None:
                found.setdefault(run.row, []).append(record)
        return found

    def record(self, run: Run) -> dict | None:
        """Return a run's record with its times, and placeholders for the folders of data; None if it is not done."""
        path = run.folder(self.work) / "record.json"
        if path.exists():
            text = path.read_text()
            for placeholder, folder in self.folders.items():
                text = text.replace(str(folder), placeholder)
            timings = Timings.read(path.with_name("timings.json"))  # None: an older record has the seconds itself
            seconds = {} if timings is None else {name: getattr(timings, name) for name in SECONDS}
            return {**json.loads(text), **seconds, "command": run.command}
        return self.kept.get(run.command)

    def here(self, options: str, title: str) -> str | None:
        """Return options with the folders inserted. If one is not known, print so and return None."""
        missing = [name for name in placeholders(options) if name not in self.folders]
        if missing:
            option = f"as --{missing[0].lower()} is not given" if missing[0] in FOLDERS else f"without {missing[0]}"
            print(f"left out, {option}: {title}", flush=True)
            return None
        return _PLACEHOLDER.sub(lambda found: str(self.folders[found[0]]), options)

    def _do(self, run: Run) -> None:
        out = run.folder(self.work)
        if self.record(run) is not None or time.monotonic() > self.deadline:
            return
        options = self.here(run.options, run.row)
        if options is None:
            return
        threads = str(self.threads or max((os.cpu_count() or 1) // self.jobs, 1))
        command = [
            sys.executable,
            "-m",
            run.program or "dpquant",
            "train",
            *shlex.split(options),
            "--seed",
            str(run.seed),
            "--out",
            str(out),
        ]
        if out.exists():  # an interrupted run left it
            out.rename(out.with_name(f"{out.name}-interrupted-{time.time_ns()}"))
        environment = {**os.environ, "OMP_NUM_THREADS": threads}
        if "LITE0" in self.folders:
            environment[WEIGHTS] = str(self.folders["LITE0"])
        began = time.monotonic()
        result = self.launch(
            [*command, "--threads", threads], env=environment, capture_output=True, text=True, check=False
        )
        if result.returncode:
            self.failed[run] = f"{shlex.join(command)}\n{result.stderr}"
            print(f"FAILED: {run.row}, seed {run.seed}\n{self.failed[run]}", flush=True)
            return
        accuracy = json.loads((out / "record.json").read_text())["accuracy_test"]
        print(f"{run.row}, seed {run.seed}: {accuracy:.4f} after {time.monotonic() - began:.0f} s", flush=True)


def committed(results: Path = RESULTS) -> dict[str, dict]:
    """Return {command: record} of all runs in the results whose record is complete."""
    tables = [json.loads(path.read_text()) for path in sorted(results.glob("*.json"))]
    runs = [run for table in tables for records in table.get("records", {}).values() for run in records]
    return {run["command"]: run for run in runs if set(SECONDS) <= run.keys() and record_of(run) is not None}


def record_of(run: Mapping) -> RunRecord | None:
    """Return the record of a run in the results; None if it lacks a field, as very old ones do."""
    try:
        return RunRecord.from_json(json.dumps(run))
    except DataError:
        return None


def settings_of(options: str) -> TrainSettings:
    """Return the settings that `dpquant train` makes of options."""
    hints = typing.get_type_hints(TrainSettings)
    words = shlex.split(options)
    given = {}
    for option, text in zip(words[::2], words[1::2], strict=True):
        name = option.removeprefix("--").replace("-", "_")
        kind = next(kind for kind in typing.get_args(hints[name]) or (hints[name],) if kind is not NoneType)
        given[name] = kind(text)
    return TrainSettings.chosen(given)


def chosen(table: Table, rows: str, seeds: int | None) -> list[Run]:
    """Return the runs of a table that are wanted: rows whose TABLE/ROW matches the pattern, at its first seeds."""
    return [
        run
        for run in table.runs()
        if run.seed in table.seeds[:seeds] and fnmatch.fnmatchcase(f"{table.name}/{run.row}", rows)
    ]


def needed(runs: Iterable[Run], kept: Container[str], work: Path) -> Iterator[str]:
    """Yield the names that stand for folders in runs, but not in those that count as done by their commands alone."""
    for run in runs:
        if run.command not in kept or run.folder(work).exists():  # the record of one that is here has its folders
            yield from placeholders(run.options)


def placeholders(options: str) -> list[str]:
    """Return the names of the folders that a run reads: those in capitals in its options, and its model's weights."""
    return _PLACEHOLDER.findall(options) + ["LITE0"] * (FACTORIES in options)


def do_table(table: Table, site: Site) -> dict[str, dict]:
    """Perform the runs of a table before the deadline, write its results and return {row: summary}."""
    runs = table.runs()
    site.do(chosen(table, site.rows, site.seeds))
    records = site.records(runs)
    if not records:
        return {}
    rows = summary(records)
    missing = [f"{run.row}, seed {run.seed}" for run in runs if site.record(run) is None]
    site.results.mkdir(exist_ok=True)
    text = json.dumps({"title": table.title, "missing": missing, "summary": rows, "records": records}, indent=1)
    (site.results / f"{table.name}.json").write_text(text + "\n")
    (table.draw or draw_table)(table, records, site.results / f"{table.name}.png")
    print(f"\n{table.title}")
    for row, facts in rows.items():
        print(
            f"{row:36s} {facts['accuracy_mean']:6.2f} +- {facts['accuracy_spread']}   {len(facts['accuracies'])} seeds"
        )
    print(f"{len(missing)} runs missing\n", flush=True)
    return rows


def summary(records: Mapping[str, list[dict]]) -> dict[str, dict]:
    """Return {row: test accuracy in percent (mean, standard deviation, 95 % interval, each seed), epsilon and time}."""
    rows = {}
    for row, runs in records.items():
        accuracies = [100 * run["accuracy_test"] for run in runs]
        interval = half_width(accuracies)
        rows[row] = {
            "accuracy_mean": round(statistics.mean(accuracies), 2),
            "accuracy_spread": spread_of(accuracies),
            "accuracy_half_width": None if interval is None else round(interval, 2),
            "accuracies": [round(a, 2) for a in accuracies],
            "metrics": _metrics(runs),
            "epsilon": runs[0]["epsilon"],
            "epsilon_analysis_share": runs[0]["epsilon_analysis_share"],
            "quantized_fraction_layers": round(statistics.mean(run["quantized_fraction_layers"] for run in runs), 3),
            "quantized_fraction_macs": round(statistics.mean(run["quantized_fraction_macs"] for run in runs), 3),
            "four_bit_fraction_macs": round(statistics.mean(run["four_bit_fraction_macs"] for run in runs), 3),
            "seconds": round(statistics.mean(run["seconds_train"] + run["seconds_analysis"] for run in runs)),
            "command": runs[0]["command"],
        }
    return rows


def spread_of(values: Sequence[float]) -> float | None:
    """Return the standard deviation; None of a single value."""
    return round(statistics.stdev(values), 2) if len(values) > 1 else None


def _metrics(runs: Sequence[Mapping]) -> dict[str, list[float]]:
    """Return {metric beside accuracy: its percentages, run by run}; {} if there are none."""
    found = [run.get("metrics_test") or {} for run in runs]
    names = [name for name in found[0] if name != "accuracy" and all(name in one for one in found)]
    return {name: [round(100 * one[name], 2) for one in found] for name in names}


def draw_table(table: Table, records: Mapping[str, list[dict]], path: Path) -> None:
    """Draw the figure of every row, with the paper's."""
    draw_summary(summary(records), path, table.title, published(table.name))


def draw_summary(rows: Mapping[str, dict], path: Path, title: str, paper: Mapping[str, float]) -> None:
    """Draw the test accuracies in a table's summary or, where positives are rare, its average precisions."""
    rare = all("average_precision" in facts.get("metrics", {}) for facts in rows.values())
    values = {
        row: facts["metrics"]["average_precision"] if rare else facts["accuracies"] for row, facts in rows.items()
    }
    measure = "average precision, %" if rare else "test accuracy, %"
    draw_rows(values, path, title, paper=paper, measure=measure)
