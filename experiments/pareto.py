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

from dpquant.app.assess import Assessment, assess
from dpquant.machine import Hardware
from experiments.runner import RESULTS, Site, new_figure, settings_of
from experiments.settings import GTSRB

MEASURED = ("baselines-gtsrb", "schedules")
ROUNDS = 20  # of timings of each layer and step
COLOURS = {"static": "tab:blue", "rotate": "tab:orange", "dpquant": "tab:green"}
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
    text = json.dumps(
        {
            "hardware": dataclasses.asdict(Hardware.here()),
            "batch_size": settings.batch_size,
            "all_layers_seconds": checks,
            "cheapest_within_half_a_point": cheapest,
            "rows": rows,
        },
        indent=1,
    )
    (RESULTS / "pareto.json").write_text(text + "\n")
    _draw(rows)
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


def _draw(rows: dict[str, dict]) -> None:
    """Plot accuracy against both step times, with numbered points and a legend of the numbers."""
    figure, axes = new_figure(columns=2)
    titles = {"step_here": "measured here", "step_four_bits": "with four-bit products four times as fast"}
    for axis, (field, title) in zip(axes, titles.items(), strict=True):
        for number, (name, row) in enumerate(rows.items(), 1):
            kind = name.split()[0]
            at = row[field], row["accuracy"]
            axis.errorbar(
                *at,
                yerr=row["accuracy_spread"] or 0.0,
                fmt="o",
                color=COLOURS.get(kind, "tab:red"),
                label=f"{number}  {name}",
            )
            axis.annotate(str(number), at, (4, 3), textcoords="offset points", fontsize=8)
        axis.set(xlabel="step, in units of one in full precision", ylabel="test accuracy, %", title=title)
    axes[-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.02, 0.5))
    figure.savefig(RESULTS / "pareto.png", dpi=130, bbox_inches="tight")
