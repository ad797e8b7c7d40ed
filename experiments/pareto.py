# SPDX-License-Identifier: Apache-2.0
"""E9: accuracy against the time of a step, for every row of the GTSRB tables.

Times are in units of a step in full precision. The time on this machine is 1, plus each layer's difference between its
time in the precision that it ran in and in full precision, averaged over the epochs. The difference is divided by the
full-precision step measured in the same rounds. The time on four-bit hardware follows the paper's assumption: a
multiply-accumulate takes a quarter of its time in four bits, half of it in eight bits, and nothing else takes time.

Times are measured when this runs, so the machine must be idle.
"""

import dataclasses
import json
import statistics
from pathlib import Path

from dpquant.app.assess import Assessment, assess
from dpquant.machine import Hardware
from experiments.drawing import OTHER, colour_of, label_ends, new_figure
from experiments.runner import RESULTS, Site, settings_of
from experiments.settings import GTSRB

MEASURED = ("baselines-gtsrb", "schedules")
ROUNDS = 20  # of timings of each layer and step
LOST = 0.5  # points of accuracy that the cheapest schedule may lose against full precision
FOUR_BITS, EIGHT_BITS = 0.25, 0.5  # time of a multiply-accumulate over its time in full precision


def run(site: Site) -> None:
    """Time every precision that the tables' runs used; write results/pareto.json and results/pareto.png."""
    records = {}
    for table in MEASURED:
        path = RESULTS / f"{table}.json"
        if path.exists():
            records |= json.loads(path.read_text())["records"]
    options = site.here(GTSRB, "pareto")
    if options is None or not records:
        return
    settings = settings_of(options)
    formats = {run[field] for runs in records.values() for run in runs for field in ("format", "rest")} - {"full"}
    assessed = {name: assess(dataclasses.replace(settings, format=name), rounds=ROUNDS) for name in sorted(formats)}
    rows = {row: _row(runs, assessed) for row, runs in records.items()}
    cheapest = {axis: _cheapest(rows, axis) for axis in ("step_here", "step_four_bits")}
    checks = {
        name: {
            "full_precision": result.full_step,
            "predicted": result.policies[-1].predicted,
            "measured": result.policies[-1].measured,
        }
        for name, result in assessed.items()
    }
    found = {
        "hardware": dataclasses.asdict(Hardware.here()),
        "batch_size": settings.batch_size,
        "all_layers_seconds": checks,
        "cheapest_within_half_a_point": cheapest,
        "rows": rows,
    }
    (RESULTS / "pareto.json").write_text(json.dumps(found, indent=1) + "\n")
    draw(found, RESULTS / "pareto.png")
    print(f"the cheapest within {LOST} points: {cheapest}")


def _row(runs: list[dict], assessed: dict[str, Assessment]) -> dict:
    """Return a row's accuracy and step times, means over seeds; times are in units of a full-precision step."""
    accuracies = [100 * run["accuracy_test"] for run in runs]
    return {
        "accuracy": statistics.mean(accuracies),
        "accuracy_spread": statistics.stdev(accuracies) if len(runs) > 1 else None,
        "step_here": statistics.mean(_step(run, assessed) for run in runs),
        "step_four_bits": statistics.mean(_step_in_four_bits(run) for run in runs),
    }


def _step(run: dict, assessed: dict[str, Assessment]) -> float:
    """Return the predicted mean time of a run's steps on this machine."""
    step = 1.0
    for layer in run["layers"]:
        chosen = layer["times_quantized"] / run["epochs"]
        for precision, share in ((run["format"], chosen), (run["rest"], 1 - chosen)):
            if precision != "full" and share:
                assessment = assessed[precision]
                times = assessment.layers[layer["name"]]
                step += share * assessment.batch_size * (times.quantized - times.full) / assessment.full_step
    return step


def _step_in_four_bits(run: dict) -> float:
    """Return the mean time of a run's steps if only multiply-accumulates take time."""
    four = run["four_bit_fraction_macs"]
    eight = run["quantized_fraction_macs"] - four
    return 1 - four * (1 - FOUR_BITS) - eight * (1 - EIGHT_BITS)


def _cheapest(rows: dict[str, dict], axis: str) -> str:
    """Return the fastest row among those that lose at most `LOST` points."""
    least = rows["full precision"]["accuracy"] - LOST
    return min((row for row in rows if rows[row]["accuracy"] >= least), key=lambda row: rows[row][axis])


def draw(results: dict, path: Path) -> None:
    """Draw what `run` found: accuracy against both step times, with names at the rows that nothing beats."""
    rows = results["rows"]
    titles = {
        "step_here": "step as measured here",
        "step_four_bits": "step if four-bit products were four times as fast",
    }
    figure, axes = new_figure(columns=2, width=6.4)
    for axis, (field, title) in zip(axes, titles.items(), strict=True):
        for name, row in rows.items():
            axis.errorbar(
                row[field], row["accuracy"], yerr=row["accuracy_spread"] or 0.0, fmt="o", color=colour_of(name)
            )  # fmt: skip
        named = {name: (rows[name][field], rows[name]["accuracy"], colour_of(name)) for name in _unbeaten(rows, field)}
        label_ends(axis, named, lines=True)
        axis.set(xlabel="in units of a step in full precision", ylabel="test accuracy, %")
        axis.set_title(title, loc="left", fontsize=10)
    figure.supxlabel(
        "named: no row is both faster and more accurate; blue dpquant, red static, orange rotate, green int8, "
        "light blue int4", fontsize=8, color=OTHER,
    )  # fmt: skip
    figure.savefig(path, dpi=130)


def _unbeaten(rows: dict[str, dict], field: str) -> list[str]:
    """Return the rows than which none is both faster and more accurate."""
    return [
        name
        for name, row in rows.items()
        if not any(other[field] < row[field] and other["accuracy"] > row["accuracy"] for other in rows.values())
    ]
