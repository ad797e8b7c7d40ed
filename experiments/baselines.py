# SPDX-License-Identifier: Apache-2.0
"""E1: full precision, static random subsets, rotation and dpquant, at several shares of the layers and budgets.

The paper's main table (DPQuant, arXiv 2509.03472). A static row's spread is over subsets: its seed draws the subset.
"""

from experiments.runner import Table
from experiments.settings import CIFAR10, EPSILON, FASHION, GTSRB, ONE_SEED, SEEDS, SHORT


def _rows(*choices: str) -> dict[str, str]:
    """{policy and fraction: options}."""
    pairs = {choice: choice.split() for choice in choices}
    return {choice: f"--policy {policy} --fraction {fraction}" for choice, (policy, fraction) in pairs.items()}


MAIN = {"full precision": "--policy none", **_rows("dpquant 0.5", "static 0.5", "dpquant 0.9", "static 0.9")}
OTHERS = _rows("rotate 0.9", "rotate 0.5", "dpquant 0.75", "static 0.75", "rotate 0.75")


def _table(data: str, name: str, common: str, epsilon: str, rows: dict[str, str], seeds: tuple[int, ...]) -> Table:
    title = f"{data}, ResNet18, epsilon = {epsilon.split()[1]}, luq-fp4"
    return Table(name=name, title=title, common=f"{common} {epsilon}", rows=rows, seeds=seeds)


TABLES = [
    _table("GTSRB", "baselines-gtsrb", GTSRB, EPSILON, MAIN, SEEDS),
    _table("GTSRB", "baselines-gtsrb-others", GTSRB, EPSILON, OTHERS, ONE_SEED),
    _table("GTSRB", "baselines-gtsrb-4", f"{GTSRB} {SHORT}", "--epsilon 4", MAIN, ONE_SEED),
    _table("CIFAR-10", "baselines-cifar10", f"{CIFAR10} {SHORT}", EPSILON, MAIN, ONE_SEED),
    _table("Fashion-MNIST", "baselines-fashion", f"{FASHION} {SHORT}", EPSILON, MAIN, ONE_SEED),
]
