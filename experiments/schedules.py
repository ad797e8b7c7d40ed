# SPDX-License-Identifier: Apache-2.0
"""Beyond luq-fp4 and full precision: recipes, with the part of the multiply-accumulates that runs in four bits.

"int4-clip" is the uniform format, to nearest, for weights and activations, with scales below the largest value, and
E3M0 for output gradients. "rest int8" runs the layers that are not chosen in int8: a recipe for each layer.
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
