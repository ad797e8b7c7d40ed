# SPDX-License-Identifier: Apache-2.0
"""KDD Census-Income, 199,523 records of which 6.2 % are positive: a stand-in for fraud, of its size and imbalance.

The spec is what the published code book says. The network has three layers whose products can be quantized, so that
half of them are two, and 90 % all three.
"""

from experiments.runner import Table
from experiments.settings import SEEDS

CENSUS = (
    "--data packed:CENSUS --records 199523 --delta 1e-6 --epochs 5 --batch-size 4096 --optimizer adam "
    "--lr 8e-3 --lr-schedule cosine --backend int8"
)
LOGISTIC = "--model experiments.heads:logistic --lr 2e-2 --policy none"
ROWS = {
    "full precision": "--policy none",
    "int8, all layers": "--policy all --format int8",
    "int4-clip, dpquant 0.5": "--policy dpquant --fraction 0.5 --format int4-clip",
    "luq-fp4, dpquant 0.5": "--policy dpquant --fraction 0.5",
    "luq-fp4, static 0.5": "--policy static --fraction 0.5",
    "luq-fp4, all layers": "--policy all",
    "logistic regression, full precision": LOGISTIC,
}
TABLES = [
    Table(
        name=f"tables-{epsilon}",
        title=f"KDD Census-Income, epsilon = {epsilon}",
        common=f"{CENSUS} --epsilon {epsilon}",
        rows=ROWS,
        seeds=SEEDS,
    )
    for epsilon in (3, 1, 8)
]
