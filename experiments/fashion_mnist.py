# SPDX-License-Identifier: Apache-2.0
"""Fashion-MNIST at epsilon 3: what quantizing costs a small private network, policy by policy.

    python -m experiments.fashion_mnist [--jobs 2] [--work DIR]

Needs the Fashion-MNIST IDX files (Debian: dataset-fashion-mnist; else downloaded). Writes
results/fashion_mnist.{json,png}. The network is the two-convolution tanh net of Papernot et al., arXiv 2007.14191.
"""

import argparse
import shlex
from pathlib import Path

import matplotlib

from experiments.runner import RESULTS, run_all, table, write

SEEDS = (0, 1, 2)
COMMON = shlex.split(
    "--data fashion-mnist --model cnn --epsilon 3 --delta 1e-5 --epochs 25 --batch-size 2048 --max-grad-norm 0.1 "
    "--optimizer sgd --lr 4 --momentum 0.9"
)
ROWS = {
    "dpquant 75 %": ["--policy", "dpquant", "--fraction", "0.75"],
    "full precision": ["--policy", "none"],
    "static 75 %": ["--policy", "static", "--fraction", "0.75"],
    "75 %, first layer full": ["--policy", "static", "--layers", "3,8,10"],
    "all": ["--policy", "all"],
    "int8 all": ["--policy", "all", "--format", "int8"],
    "dpquant 50 %": ["--policy", "dpquant", "--fraction", "0.5"],
    "dpquant 25 %": ["--policy", "dpquant", "--fraction", "0.25"],
}


def draw(records: dict[str, list[dict]], path: Path) -> None:
    """Test accuracy over epochs, one line a row, its band the seeds' extremes."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for row, runs in records.items():
        curves = [[100 * a for a in run["accuracy_per_epoch"]] for run in runs]
        epochs = range(1, len(curves[0]) + 1)
        mean = [sum(values) / len(values) for values in zip(*curves, strict=True)]
        (line,) = axes.plot(epochs, mean, label=f"{row}: {mean[-1]:.1f} %")
        low, high = ([pick(values) for values in zip(*curves, strict=True)] for pick in (min, max))
        axes.fill_between(epochs, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set(xlabel="epoch", ylabel="test accuracy, %", ylim=(70, 88), title="Fashion-MNIST, epsilon = 3, delta = 1e-5")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("runs/fashion_mnist"))
    arguments = parser.parse_args()
    records = run_all(table(ROWS, COMMON, SEEDS), arguments.work, arguments.jobs)
    write("fashion_mnist", records)
    draw(records, RESULTS / "fashion_mnist.png")


if __name__ == "__main__":
    main()
