# SPDX-License-Identifier: Apache-2.0
"""EfficientNet-lite0 with public weights of ImageNet, on CIFAR-10 and traffic signs at epsilon 8, 3 and 1.

What is trained: a last layer on features that are computed once for each record, or the whole network with frozen
BatchNorm. ImageNet is public here and is not covered by any epsilon.
"""

from experiments.runner import Table
from experiments.settings import SEEDS, in_each_format

DATA = {"GTSRB": "--records 39209 --delta 1e-5", "CIFAR10": "--records 50000 --delta 1e-5"}
OPTIMIZER = "--optimizer adam --lr-schedule cosine --epochs 10 --batch-size 2048 --backend int8"
LOGISTIC = "--model experiments.heads:logistic --lr 0.1"
WHOLE = "--model experiments.lite0:finetuned --lr 1e-3 --epochs 2"  # fewer: every step runs all of it
FORMATS_OF = "GTSRB"  # the set on which formats of the whole network are compared
EPSILONS = (8, 3, 1)


def _rows(name: str) -> dict[str, str]:
    return in_each_format("last layer", f"--data packed:FROZEN-{name} {LOGISTIC}")


def _once(name: str, epsilon: int) -> dict[str, str]:
    """Return the rows that train the whole network, at the largest epsilon."""
    if epsilon < EPSILONS[0]:
        return {}
    whole = f"--data image-folder:{name} {WHOLE}"
    int8 = f"{whole} --policy all --format int8"
    rows = {"whole network, int8, all layers": int8}
    if name == FORMATS_OF:
        rows |= {
            "whole network, full precision": f"{whole} --policy none",
            "whole network, luq-fp4, dpquant 0.5": f"{whole} --policy dpquant --fraction 0.5",
        }
    return rows


TABLES = [
    Table(
        name=f"transfer-{name.lower()}-{epsilon}",
        title=f"{name}, EfficientNet-lite0 (public weights of ImageNet), epsilon = {epsilon}",
        common=f"{DATA[name]} {OPTIMIZER} --epsilon {epsilon}",
        rows=_rows(name),
        once=_once(name, epsilon),
        seeds=SEEDS,
    )
    for epsilon in EPSILONS
    for name in DATA
]
