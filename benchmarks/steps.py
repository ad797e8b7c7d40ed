# SPDX-License-Identifier: Apache-2.0
"""Time and peak memory of each side's step, by network and number of threads: `scripts/bench steps`."""

import argparse
import os
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.results import COLOURS, caption, folder_here, measure_all, median
from dpquant.app.bench import BenchSettings
from dpquant.app.contenders import DESCRIPTIONS, SIDES
from dpquant.app.networks import NETWORKS


def main() -> None:
    """Measure what the results file lacks, then draw one plot per number of threads."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=list(NETWORKS), default=[n for n in NETWORKS if n != "mlp"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, os.cpu_count() or 1])
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--format", default="luq-fp4")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=None, help="of the results [benchmarks/results/<cpu>-<date>]")
    args = parser.parse_args()
    folder = args.folder or folder_here()
    threads = sorted(set(args.threads))
    table = [
        BenchSettings(
            model=model, batch_size=args.batch_size, format=args.format, threads=n, rounds=args.rounds, memory=True
        )
        for n in threads
        for model in args.models
    ]
    rows = measure_all(table, folder / "steps.json")
    for n in threads:
        draw([row for row in rows if row["threads"] == n], folder / f"steps-{n}-threads.png")


def draw(rows: list[dict], path: Path) -> None:
    """Plot bars of each side for each network, relative to plain PyTorch: time above, memory below."""
    figure, axes = plt.subplots(2, 1, figsize=(10, 7.5))
    panels = ("ms_per_example", "time of a step / plain PyTorch's"), ("peak_mib", "peak memory of a step / plain's")
    for axis, (field, label) in zip(axes, panels, strict=True):
        for number, side in enumerate(SIDES):
            quotients = {
                i + (number - 2.5) * 0.14: quotient
                for i, row in enumerate(rows)
                if (quotient := _over_plain(row, side, field)) is not None
            }
            bars = axis.bar(
                list(quotients), list(quotients.values()), 0.13, color=COLOURS[side], label=DESCRIPTIONS[side], log=True
            )
            axis.bar_label(bars, fmt="%.1f", fontsize=6)
        axis.axhline(1, color="black", linewidth=0.5)
        axis.set_xticks(range(len(rows)), [row["settings"]["model"] for row in rows])
        axis.set_ylabel(label)
    axes[0].legend(ncols=6, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 1.18), frameon=False)
    first = rows[0]
    figure.text(
        0.01, 0.01, f"batch {first['settings']['batch_size']}, {first['threads']} threads; {caption(rows)}", fontsize=6
    )
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _over_plain(row: dict, side: str, field: str) -> float | None:
    """Return a side's figure over plain PyTorch's; None if either is missing."""
    own, plain = median(row, side, field), median(row, "plain", field)
    return own / plain if own is not None and plain else None


if __name__ == "__main__":
    main()
