# SPDX-License-Identifier: Apache-2.0
"""E1 for the larger networks: torchvision's ResNet50 and DenseNet121, a quarter of the width, fewer epochs."""

from experiments.runner import Table
from experiments.settings import EPSILON, GTSRB, ONE_SEED, SHORT

NETWORKS = {"resnet50": ("0.75", "0.9"), "densenet121": ("0.5",)}
ROWS = {
    f"{network}, {row}": f"--model {network} --width 0.25 {options}"
    for network, fractions in NETWORKS.items()
    for row, options in {
        "full precision": "--policy none",
        **{
            f"{policy} {fraction}": f"--policy {policy} --fraction {fraction}"
            for fraction in fractions
            for policy in ("dpquant", "static")
        },
    }.items()
}
TABLES = [
    Table(
        name="networks",
        title="GTSRB, epsilon = 8, luq-fp4: ResNet50 and DenseNet121, a quarter as wide",
        common=f"{GTSRB} {SHORT} {EPSILON}",
        rows=ROWS,
        seeds=ONE_SEED,
    )
]
