# SPDX-License-Identifier: Apache-2.0
"""E1: full precision, static random subsets, rotation and dpquant, at several shares of the layers and budgets.

The paper's main table (DPQuant, arXiv 2509.03472). A static row's spread is over subsets: its seed draws the subset.
"""

from experiments.runner import Table
from experiments.settings import CIFAR10, EPSILON, FASHION, GTSRB, SEEDS, SHORT, TWO_SEEDS

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


def _table(data: str, name: str, common: str, epsilon: str, rows: dict[str, str], seeds: tuple[int, ...]) -> Table:
    title = f"{data}, ResNet18, epsilon = {epsilon.split()[1]}, luq-fp4"
    return Table(name=name, title=title, common=f"{common} {epsilon}", rows=rows, seeds=seeds)


TABLES = [
    _table("GTSRB", "baselines-gtsrb", GTSRB, EPSILON, ROWS, SEEDS),
    _table("GTSRB", "baselines-gtsrb-4", GTSRB, "--epsilon 4", FEW, TWO_SEEDS),
    _table("CIFAR-10", "baselines-cifar10", f"{CIFAR10} {SHORT}", EPSILON, FEW, TWO_SEEDS),
    _table("Fashion-MNIST", "baselines-fashion", f"{FASHION} {SHORT}", EPSILON, FEW, TWO_SEEDS),
]
