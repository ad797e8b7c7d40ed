# SPDX-License-Identifier: Apache-2.0
"""E8: accuracy by format, by quantized operand and by quantized product. All layers are quantized but in the last rows.

A row for one operand quantizes it to E3M0 and the other two to int8, which costs almost no accuracy.
"""

from experiments.runner import Table
from experiments.settings import EPSILON, GTSRB, ONE_SEED, SHORT

ROWS = {
    "full precision": "--policy none",
    "luq-fp4": "--policy all --format luq-fp4",
    "luq": "--policy all --format luq",
    "int4, clipped": "--policy all --format int4@2.5,int4@2.5,e3m0~",
    "int4, clipped, a scale a channel": "--policy all --format int4@2.5#,int4@2.5,e3m0~",
    "+ codes of one sign (int4-clip)": "--policy all --format int4-clip",
    "int4-clip, activations at 3": "--policy all --format int4@2.5#,int4@3+,e3m0~",
    "int4-clip, activations at 5": "--policy all --format int4@2.5#,int4@5+,e3m0~",
    "int8": "--policy all --format int8",
    "fp8": "--policy all --format fp8 --backend simulate",
    "mxfp4": "--policy all --format mxfp4 --backend simulate",
    "nvfp4": "--policy all --format nvfp4 --backend simulate",
    "weight alone": "--policy all --format e3m0~,int8,int8~",
    "activation alone": "--policy all --format int8,e3m0~,int8~",
    "gradient alone": "--policy all --format int8,int8,e3m0~",
    "weight and activation, to nearest": "--policy all --format e3m0,e3m0,int8~",
    "forward alone": "--policy all --format luq-fp4/full/full",
    "dgrad alone": "--policy all --format full/luq-fp4/full",
    "wgrad alone": "--policy all --format full/full/luq-fp4",
    "forward int8, backward luq-fp4": "--policy all --format int8/luq-fp4/luq-fp4",
    "forward int8, backward int4-clip": "--policy all --format int8/int4-clip/int4-clip",
    "luq-fp4, dpquant 0.75, rest int8": "--policy dpquant --fraction 0.75 --rest int8",
    "luq, dpquant 0.75": "--policy dpquant --fraction 0.75 --format luq",
}
TABLES = [
    Table(
        name="formats",
        title="GTSRB, ResNet18, epsilon = 8: formats, operands and products",
        common=f"{GTSRB} {SHORT} {EPSILON}",
        rows=ROWS,
        seeds=ONE_SEED,
    )
]
