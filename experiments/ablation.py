# SPDX-License-Identifier: Apache-2.0
"""E2: what each half of dpquant gives. Rotation alone, prioritising alone (deterministic), both; beta and ema swept.

The paper gives neither beta nor the moving average's weight.
"""

from experiments.runner import Table
from experiments.settings import EPSILON, GTSRB, ONE_SEED, SHORT

SHARE = "--fraction 0.75"
ROWS = {
    "full precision": "--policy none",
    "static": f"--policy static {SHARE}",
    "rotate": f"--policy rotate {SHARE}",
    "prioritise": f"--policy prioritise {SHARE}",
    "dpquant": f"--policy dpquant {SHARE}",
    "dpquant, impact on the loss": f"--policy dpquant {SHARE} --analysis-score loss",
    "dpquant, 0.75 of the MACs": "--policy dpquant --macs 0.75",
    **{f"dpquant, beta {beta}": f"--policy dpquant {SHARE} --beta {beta}" for beta in ("1", "10")},
    **{f"dpquant, ema {ema}": f"--policy dpquant {SHARE} --ema {ema}" for ema in ("0.1", "1.0")},
}
TABLES = [
    Table(
        name="ablation",
        title="GTSRB, ResNet18, epsilon = 8, luq-fp4 on 75 % of the layers",
        common=f"{GTSRB} {SHORT} {EPSILON}",
        rows=ROWS,
        seeds=ONE_SEED,
    )
]
