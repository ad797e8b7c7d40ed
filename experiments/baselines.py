# SPDX-License-Identifier: Apache-2.0
"""E1: full precision, static random subsets, rotation and dpquant, at several shares of the layers and budgets.

This is the main table of the paper (DPQuant, arXiv 2509.03472). A static policy draws its subset from the seed, so that
the spread of a static row is over subsets.
"""

from collections.abc import Mapping

from experiments.runner import Table
from experiments.settings import CIFAR10, FASHION, GTSRB, ONE_SEED, SEEDS, SHORT


def _rows(*choices: str) -> dict[str, str]:
    """Return {choice: options} for choices of a policy and a fraction."""
    pairs = {choice: choice.split() for choice in choices}
    return {choice: f"--policy {policy} --fraction {fraction}" for choice, (policy, fraction) in pairs.items()}


MAIN = {"full precision": "--policy none", **_rows("dpquant 0.5", "static 0.5", "dpquant 0.9", "static 0.9")}
ONCE = _rows("rotate 0.5", "rotate 0.9", "dpquant 0.75", "static 0.75", "rotate 0.75")


def _table(
    name: str, data: str, common: str, epsilon: int, seeds: tuple[int, ...] = ONE_SEED, once: Mapping[str, str] = ONCE
) -> Table:
    title = f"{data}, ResNet18, epsilon = {epsilon}, luq-fp4"
    common = f"{common} --epsilon {epsilon}"
    return Table(name=f"baselines-{name}", title=title, common=common, rows=MAIN, once=once, seeds=seeds)


TABLES = [
    _table("gtsrb", "GTSRB", GTSRB, 8, SEEDS),
    _table("cifar10", "CIFAR-10", f"{CIFAR10} {SHORT}", 8),
    _table("fashion", "Fashion-MNIST", f"{FASHION} {SHORT}", 8),
    _table("gtsrb-4", "GTSRB", f"{GTSRB} {SHORT}", 4, once={}),
    _table("cifar10-4", "CIFAR-10", f"{CIFAR10} {SHORT}", 4, once={}),
    _table("fashion-4", "Fashion-MNIST", f"{FASHION} {SHORT}", 4, once={}),
]
