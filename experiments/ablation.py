# SPDX-License-Identifier: Apache-2.0
"""E2: ablation of dpquant: rotation alone, prioritising alone (deterministic), and both; sweeps of beta and ema.

The paper states neither beta nor the weight of the moving average.
"""

from experiments.runner import Table
from experiments.settings import EPSILON, GTSRB, ONE_SEED, SEEDS, SHORT

SHARE = "--fraction 0.75"
ROWS = {
    "full precision": "--policy none",
    **{policy: f"--policy {policy} {SHARE}" for policy in ("static", "rotate", "prioritise", "dpquant")},
}
SWEPT = {"beta 10": f"--policy dpquant {SHARE} --beta 10"}
CHANGES = {
    "impact on the loss": f"--policy dpquant {SHARE} --analysis-score loss",
    "0.75 of the MACs": "--policy dpquant --macs 0.75",
    "beta 1": f"--policy dpquant {SHARE} --beta 1",
    **{f"ema {ema}": f"--policy dpquant {SHARE} --ema {ema}" for ema in ("0.1", "1.0")},
}
LONGER = {"prioritise 0.9": "--policy prioritise --fraction 0.9"}
TITLE = "GTSRB, ResNet18, epsilon = 8, luq-fp4 on 75 % of the layers"
COMMON = f"{GTSRB} {SHORT} {EPSILON}"
TABLES = [
    Table(name="ablation", title=TITLE, common=COMMON, rows=ROWS, seeds=SEEDS),
    Table(name="ablation-settings", title=f"{TITLE}, dpquant", common=COMMON, rows=SWEPT, once=CHANGES, seeds=SEEDS),
    Table(
        name="ablation-longer",
        title="GTSRB, ResNet18, epsilon = 8, luq-fp4, without rotation",
        common=f"{GTSRB} {EPSILON}",
        rows=LONGER,
        seeds=ONE_SEED,
    ),
]
