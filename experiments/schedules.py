# SPDX-License-Identifier: Apache-2.0
"""Beyond layers: schedules of products and recipes, with the part of the multiply-accumulates that runs in four bits.

"backward" rows run the backward products of every layer in four bits and let the policy choose only where the forward
product does, too. "int4" is the uniform format, to nearest, clipped at 2.5 times the root mean square, with a scale for
each of a weight's channels, for weights and activations; output gradients stay in E3M0.
"""

from experiments.runner import Table
from experiments.settings import EPSILON, GTSRB, SEEDS

BACKWARD = "full/luq-fp4/luq-fp4"
INT4 = "int4@2.5#,int4@2.5,e3m0~"
ROWS = {
    "full precision": "--policy none",
    "int8, all layers": "--policy all --format int8",
    "int4, dpquant 0.75": f"--policy dpquant --fraction 0.75 --format {INT4}",
    "luq-fp4, dpquant 0.75": "--policy dpquant --fraction 0.75",
    "int4, dpquant 0.9, rest int8": f"--policy dpquant --fraction 0.9 --format {INT4} --rest int8",
    "backward luq-fp4, all layers": f"--policy all --format {BACKWARD}",
    "+ forward luq-fp4, dpquant 0.25 of MACs": f"--policy dpquant --macs 0.25 --rest {BACKWARD}",
    "luq-fp4, dpquant 0.75, rest int8": "--policy dpquant --fraction 0.75 --rest int8",
    "luq, dpquant 0.75": "--policy dpquant --fraction 0.75 --format luq",
    "int4, all layers": f"--policy all --format {INT4}",
    "luq-fp4, all layers": "--policy all",
}
TABLES = [
    Table(
        name="schedules",
        title="GTSRB, ResNet18, epsilon = 8: what four bits cost, product by product",
        common=f"{GTSRB} {EPSILON}",
        rows=ROWS,
        seeds=SEEDS,
    )
]
