# SPDX-License-Identifier: Apache-2.0
"""Beyond layers: schedules of products and recipes, with the part of the multiply-accumulates that runs in four bits.

"int4-clip" is the uniform format, to nearest, for weights and activations, with scales below the largest value, and
E3M0 for output gradients. "4-bit backward" runs both backward products of every layer so, and the forward product in
int8 where the policy does not choose four bits.
"""

from experiments.runner import Table
from experiments.settings import EPSILON, GTSRB, ONE_SEED, SEEDS

BACKWARD = "int8/int4-clip/int4-clip"
MAIN = {
    "full precision": "--policy none",
    "int8, all layers": "--policy all --format int8",
    "int4-clip, dpquant 0.75": "--policy dpquant --fraction 0.75 --format int4-clip",
}
OTHERS = {
    "4-bit backward, int8 forward": f"--policy all --format {BACKWARD}",
    "4-bit backward, int4 forward, dpquant 0.25 of MACs": (
        f"--policy dpquant --macs 0.25 --format int4-clip --rest {BACKWARD}"
    ),
    "int4-clip, dpquant 0.9, rest int8": "--policy dpquant --fraction 0.9 --format int4-clip --rest int8",
    "int4-clip, all layers": "--policy all --format int4-clip",
}
TITLE = "GTSRB, ResNet18, epsilon = 8: what four bits cost, product by product"
COMMON = f"{GTSRB} {EPSILON}"
TABLES = [
    Table(name="schedules", title=TITLE, common=COMMON, rows=MAIN, seeds=SEEDS),
    Table(name="schedules-others", title=TITLE, common=COMMON, rows=OTHERS, seeds=ONE_SEED),
]
