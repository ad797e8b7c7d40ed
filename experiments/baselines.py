# SPDX-License-Identifier: Apache-2.0
"""E1: full precision, static random subsets, rotation and dpquant, at several shares of the layers and budgets.

The paper's main table (DPQuant, arXiv 2509.03472). A static row's spread is over subsets: its seed draws the subset.
"""

from experiments.runner import Table
from experiments.settings import CIFAR10, EPSILON, FASHION, GTSRB, SEEDS

FRACTIONS = ("0.5", "0.75", "0.9")
ROWS = {
    "full precision": "--policy none",
    **{
        f"{policy} {fraction}": f"--policy {policy} --fraction {fraction}"
        for fraction in ("0.5", "0.9", "0.75")
        for policy in ("dpquant", "static", "rotate")
    },
}
FEW = {row: options for row, options in ROWS.items() if row == "full precision" or row.endswith(("0.5", "0.9"))}


def _table(data: str, name: str, common: str, epsilon: str, rows: dict[str, str]) -> Table:
    title = f"{data}, ResNet18, epsilon = {epsilon.split()[1]}, luq-fp4"
    return Table(name=name, title=title, common=f"{common} {epsilon}", rows=rows, seeds=SEEDS)


TABLES = [
    _table("GTSRB", "baselines-gtsrb", GTSRB, EPSILON, ROWS),
    _table("GTSRB", "baselines-gtsrb-4", GTSRB, "--epsilon 4", FEW),
    _table("CIFAR-10", "baselines-cifar10", CIFAR10, EPSILON, FEW),
    _table("Fashion-MNIST", "baselines-fashion", FASHION, EPSILON, FEW),
]
