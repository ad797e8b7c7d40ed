# SPDX-License-Identifier: Apache-2.0
"""Time and memory of a step by batch size, image size and number of threads: `scripts/bench growth`."""

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

BATCH_SIZE, IMAGE_SIZE = 64, 32  # fixed while the other one varies


def main() -> None:
    """Measure what the results file lacks, then draw one plot for each network."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=list(NETWORKS), default=["resnet18-cifar", "cnn", "transformer"])
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[16, 64, 256])
    parser.add_argument("--image-sizes", nargs="+", type=int, default=[16, 32, 64])
    parser.add_argument("--threads", nargs="+", type=int, default=[os.cpu_count() or 1])
    parser.add_argument("--format", default="luq-fp4")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None, help="of the results [benchmarks/results/<cpu>-<date>]")
    args = parser.parse_args()
    folder = args.folder or folder_here()
    for model in args.models:
        pairs = [(size, IMAGE_SIZE) for size in args.batch_sizes] + [(BATCH_SIZE, side) for side in args.image_sizes]
        table = [
            BenchSettings(
                model=model,
                batch_size=batch_size,
                image_size=image_size,
                format=args.format,
                threads=threads,
                rounds=args.rounds,
                memory=True,
            )
            for threads in args.threads
            for batch_size, image_size in dict.fromkeys(pairs)
        ]
        draw(measure_all(table, folder / "growth.json"), folder / f"growth-{model}.png")


def draw(rows: list[dict], path: Path) -> None:
    """Plot time per example and peak memory against batch size at one image size, and the reverse."""
    figure, axes = plt.subplots(2, 2, figsize=(10, 7.5))
    fewest = min(row["threads"] for row in rows)
    columns = ("batch_size", "image_size", IMAGE_SIZE), ("image_size", "batch_size", BATCH_SIZE)
    panels = ("ms_per_example", "ms an example"), ("peak_mib", "peak memory of a step, MiB")
    for column, (grows, stays, value) in enumerate(columns):
        shown = [row for row in rows if row["settings"][stays] == value]
        for axis, (field, label) in zip(axes[:, column], panels, strict=True):
            for threads in sorted({row["threads"] for row in shown}):
                for side in SIDES:
                    points = [
                        (row["settings"][grows], figure_of)
                        for row in shown
                        if row["threads"] == threads and (figure_of := median(row, side, field)) is not None
                    ]
                    axis.loglog(
                        *zip(*sorted(points), strict=True) if points else ((), ()),
                        "o-" if threads == fewest else "s--",
                        color=COLOURS[side],
                        markersize=4,
                        label=f"{DESCRIPTIONS[side]}; threads: {threads}",
                    )
            sizes = sorted({row["settings"][grows] for row in shown})
            axis.set_xticks(sizes, [str(size) for size in sizes])
            axis.minorticks_off()
            axis.set_xlabel(f"{grows.replace('_', ' ')} ({stays.replace('_', ' ')} {value})")
            axis.set_ylabel(label)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, ncols=4, fontsize=7, loc="upper center", frameon=False)
    figure.text(0.01, 0.01, f"{rows[0]['settings']['model']}; {caption(rows)}", fontsize=6)
    figure.tight_layout(rect=(0, 0.03, 1, 0.92))
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    main()
