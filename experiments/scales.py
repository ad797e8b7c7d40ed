# SPDX-License-Identifier: Apache-2.0
"""Accuracy with scales per example and with scales per tensor, which are not private."""

from experiments.runner import Table
from experiments.settings import EPSILON, GTSRB, ONE_SEED

NOT_PRIVATE = "dpquant 0.9, scales per tensor (not private)"
OPTIONS = "--policy dpquant --fraction 0.9"
TABLES = [
    Table(
        name="scales",
        title="GTSRB, ResNet18, luq-fp4: whose largest value is the scale",
        common=f"{GTSRB} {EPSILON}",
        rows={"dpquant 0.9": OPTIONS, NOT_PRIVATE: OPTIONS},
        seeds=ONE_SEED,
        programs={NOT_PRIVATE: "experiments.per_tensor"},
    )
]
