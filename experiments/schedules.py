# SPDX-License-Identifier: Apache-2.0
"""Schedules with recipes other than luq-fp4, and the share of the multiply-accumulates that they run in four bits.

"int4-clip" is a uniform format with nearest rounding and scales below the largest value for weights and activations,
and E3M0 for output gradients. "rest int8" runs the layers in int8 that the policy does not choose.
"""

from experiments.runner import Table
from experiments.settings import EPSILON, GTSRB, SEEDS

ROWS = {
    "full precision": "--policy none",
    "int8, all layers": "--policy all --format int8",
    "int4-clip, dpquant 0.75": "--policy dpquant --fraction 0.75 --format int4-clip",
}
ONCE = {
    "int4-clip, dpquant 0.75, rest int8": "--policy dpquant --fraction 0.75 --format int4-clip --rest int8",
    "int4-clip, dpquant 0.9, rest int8": "--policy dpquant --fraction 0.9 --format int4-clip --rest int8",
    "int4-clip, all layers": "--policy all --format int4-clip",
}
TABLES = [
    Table(
        name="schedules",
        title="GTSRB, ResNet18, epsilon = 8: what four bits cost, recipe by recipe",
        common=f"{GTSRB} {EPSILON}",
        rows=ROWS,
        once=ONCE,
        seeds=SEEDS,
    )
]
