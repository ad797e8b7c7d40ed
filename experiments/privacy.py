# SPDX-License-Identifier: Apache-2.0
"""E3: budgets, and what the analyses' settings do to their share of epsilon and to accuracy."""

from experiments.runner import Table
from experiments.settings import EPSILON, GTSRB, SHORT, TWO_SEEDS

EPSILONS = ("1", "2", "4", "8")
CHANGES = {
    "defaults": "",
    "every 4 epochs": "--analysis-every 4",
    "noise 0.5": "--analysis-noise-multiplier 0.5",
    "noise 4": "--analysis-noise-multiplier 4",
    "batch 32": "--analysis-batch-size 32",
    "batch 512": "--analysis-batch-size 512",
    "clipped to 0.25": "--analysis-max-norm 0.25",
    "clipped to 2": "--analysis-max-norm 2",
    "impact on the loss": "--analysis-score loss",
}
TABLES = [
    Table(
        name="privacy-epsilon",
        title="GTSRB, ResNet18, luq-fp4 on half of the layers, by epsilon",
        common=f"{GTSRB} {SHORT}",
        rows={
            f"{policy}, epsilon {epsilon}": f"--policy {policy} --fraction 0.5 --epsilon {epsilon}"
            for epsilon in EPSILONS
            for policy in ("none", "dpquant")
        },
        seeds=TWO_SEEDS,
    ),
    Table(
        name="privacy-analysis",
        title="GTSRB, ResNet18, epsilon = 8, luq-fp4 on half of the layers, by the analyses' settings",
        common=f"{GTSRB} {EPSILON} {SHORT} --policy dpquant --fraction 0.5",
        rows=CHANGES,
        seeds=TWO_SEEDS,
    ),
]
