# SPDX-License-Identifier: Apache-2.0
"""Beyond layers: schedules of products and recipes, with the part of the multiply-accumulates that runs in four bits.

"int4" is the uniform format, to nearest, clipped at 2.5 times the root mean square, with a scale for each of a weight's
channels, for weights and activations; output gradients are in E3M0, stochastic, throughout. "4-bit backward" runs both
backward products of every layer so, and the forward product in int8 where the policy does not choose four bits.
"""

from experiments.runner import Table
from experiments.settings import EPSILON, GTSRB, ONE_SEED, SEEDS

INT4 = "int4@2.5#,int4@2.5,e3m0~"
BACKWARD = f"int8/{INT4}/{INT4}"
MAIN = {
    "full precision": "--policy none",
    "int8, all layers": "--policy all --format int8",
    "int4, dpquant 0.75": f"--policy dpquant --fraction 0.75 --format {INT4}",
}
OTHERS = {
    "4-bit backward, int8 forward": f"--policy all --format {BACKWARD}",
    "4-bit backward, int4 forward, dpquant 0.25 of MACs": (
        f"--policy dpquant --macs 0.25 --format {INT4} --rest {BACKWARD}"
    ),
    "int4, dpquant 0.9, rest int8": f"--policy dpquant --fraction 0.9 --format {INT4} --rest int8",
    "int4, all layers": f"--policy all --format {INT4}",
}
TITLE = "GTSRB, ResNet18, epsilon = 8: what four bits cost, product by product"
COMMON = f"{GTSRB} {EPSILON}"
TABLES = [
    Table(name="schedules", title=TITLE, common=COMMON, rows=MAIN, seeds=SEEDS),
    Table(name="schedules-others", title=TITLE, common=COMMON, rows=OTHERS, seeds=ONE_SEED),
]
