# SPDX-License-Identifier: Apache-2.0
"""E3: accuracy at several epsilons; accuracy and the analyses' share of epsilon by the settings of the analyses."""

from experiments.ablation import ROWS
from experiments.baselines import MAIN
from experiments.runner import Table
from experiments.settings import EPSILON, GTSRB, ONE_SEED, SHORT

EPSILONS = ("1", "2", "4", "8")
CHANGES = {
    "defaults": "",
    "every 4 epochs": "--analysis-every 4",
    "noise 4": "--analysis-noise-multiplier 4",
    "batch 32": "--analysis-batch-size 32",
    "batch 512": "--analysis-batch-size 512",
    "impact on the loss": "--analysis-score loss",
}
TABLES = [
    Table(
        name="privacy-epsilon",
        title="GTSRB, ResNet18, luq-fp4 on half of the layers or on none, by epsilon",
        common=f"{GTSRB} {SHORT}",
        rows={
            f"{row}, epsilon {epsilon}": f"--epsilon {epsilon} {MAIN[row]}"
            for epsilon in EPSILONS
            for row in ("full precision", "dpquant 0.5")
        },
        seeds=ONE_SEED,
    ),
    Table(
        name="privacy-analysis",
        title="GTSRB, ResNet18, epsilon = 8, luq-fp4 on 75 % of the layers, by the analyses' settings",
        common=f"{GTSRB} {SHORT} {EPSILON} {ROWS['dpquant']}",
        rows=CHANGES,
        seeds=ONE_SEED,
    ),
]
