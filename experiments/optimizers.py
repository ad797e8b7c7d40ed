# SPDX-License-Identifier: Apache-2.0
"""E7: full precision and dpquant on half of the layers, with DP-SGD, DP-Adam and DP-AdamW."""

from experiments.runner import Table
from experiments.settings import EPSILON, GTSRB, ONE_SEED, SGD, SHORT

OPTIMIZERS = {
    "sgd": SGD,
    "adam": "",
    "adamw": "--optimizer adamw --lr 8e-3 --weight-decay 1e-2",
}
POLICIES = {"full precision": "--policy none", "dpquant 0.5": "--policy dpquant --fraction 0.5"}
TABLES = [
    Table(
        name="optimizers",
        title="GTSRB, ResNet18, epsilon = 8, luq-fp4, by optimizer",
        common=f"{GTSRB} {SHORT} {EPSILON}",
        rows={
            f"{optimizer}, {policy}": f"{options} {chosen}"
            for optimizer, options in OPTIMIZERS.items()
            for policy, chosen in POLICIES.items()
        },
        seeds=ONE_SEED,
    )
]
