# SPDX-License-Identifier: Apache-2.0
"""Beyond layers: schedules of products and recipes, with the part of the multiply-accumulates that runs in four bits.

A precision is what forward, dgrad and wgrad run in. "backward" rows keep the backward products of every layer in four
bits and let the policy choose only where the forward product is, too.
"""

from experiments.runner import Table
from experiments.settings import EPSILON, GTSRB, SEEDS

BACKWARD = "full/luq-fp4/luq-fp4"
FORWARD_INT4 = "luq/luq-fp4/luq-fp4"
ROWS = {
    "full precision": "--policy none",
    "int8, all layers": "--policy all --format int8",
    "backward 4 bits, all layers": f"--policy all --format {BACKWARD}",
    "+ forward luq-fp4, dpquant 0.25 of MACs": f"--policy dpquant --macs 0.25 --rest {BACKWARD}",
    "+ forward luq-fp4, dpquant 0.5 of MACs": f"--policy dpquant --macs 0.5 --rest {BACKWARD}",
    "+ forward luq, dpquant 0.25 of MACs": f"--policy dpquant --macs 0.25 --format {FORWARD_INT4} --rest {BACKWARD}",
    "forward int8, backward 4 bits": "--policy all --format int8/luq-fp4/luq-fp4",
    "luq, all layers": "--policy all --format luq",
    "luq-fp4 dpquant 0.75, rest int8": "--policy dpquant --fraction 0.75 --rest int8",
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
