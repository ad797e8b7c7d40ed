# SPDX-License-Identifier: Apache-2.0
"""Writes and reads results: benchmarks/results/<cpu>-<date>/<name>.json and .png."""

import dataclasses
import datetime
import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from dpquant.app.bench import BenchSettings
from dpquant.machine import Hardware

COLOURS = {
    "plain": "#555555",
    "opacus": "#d55e00",
    "ghost": "#e69f00",
    "full": "#56b4e9",
    "most": "#0072b2",
    "all": "#004466",
}


def folder_here() -> Path:
    """Return the folder of results of this machine and day; create it if it is missing."""
    folder = Path(__file__).parent / "results" / f"{Hardware.here().slug}-{datetime.date.today():%Y-%m-%d}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def keep_rows(name: str, rows: list[dict], rounds: int) -> None:
    """Write rows of medians of so many rounds to a file of this name, with the machine and whether it is busy."""
    machine = Hardware.here()
    result = {"hardware": str(machine), "busy": machine.busy, "rounds": rounds, "rows": rows}
    (folder_here() / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")


def measure_all(table: Iterable[BenchSettings], path: Path) -> list[dict]:
    """Measure the settings that the file lacks, and return the rows of all settings in order.

    The file is written after each measurement, so that an interrupted benchmark can continue.
    """
    done: list[dict] = json.loads(path.read_text()) if path.exists() else []
    rows = []
    for settings in table:
        wanted = dataclasses.asdict(settings)
        row = next((row for row in done if row["settings"] == wanted), None)
        if row is None:
            print(settings, file=sys.stderr, flush=True)
            row = _measured(settings)
            done.append(row)
            draft = path.with_name(path.name + ".tmp")
            draft.write_text(json.dumps(done, indent=1) + "\n")
            draft.replace(path)
        rows.append(row)
    return rows


def _measured(settings: BenchSettings) -> dict:
    """Return a row, measured in a separate process: a heap used by other networks slows a small one down."""
    options = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    command = [str(Path(sys.executable).parent / "dpquant"), "bench", "--json"]
    command += ["--memory"] if options.pop("memory") else []
    for name, value in options.items():
        command += [] if value is None else [f"--{name.replace('_', '-')}", str(value)]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if result.returncode not in (0, 1):  # 1: a side failed its check, which the row records
        raise SystemExit(f"{' '.join(command)} failed")
    return json.loads(result.stdout)


def median(row: dict, side: str, field: str) -> float | None:
    """Return a side's time or memory in a row; None if it was not measured."""
    value = row["sides"].get(side, {}).get(field)
    return value["median"] if isinstance(value, dict) else value


def caption(rows: list[dict]) -> str:
    """Return a line about machine and versions, for the foot of a plot."""
    machine, first = rows[0]["hardware"], rows[0]
    busy = "; OTHER WORK WAS RUNNING" if any(row["busy"] for row in rows) else ""
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {' '.join(machine['instructions'])}; torch {machine['torch']}, "
        f"opacus {first['opacus']}, dpquant {first['dpquant']}; {first['date']}{busy}"
    )
