# SPDX-License-Identifier: Apache-2.0
"""Fashion-MNIST at epsilon 3: accuracy of a small private network under several policies.

The network is the two-convolution tanh net of Papernot et al., arXiv 2007.14191.
"""

from experiments.runner import Table

TABLES = [
    Table(
        name="fashion_mnist",
        title="Fashion-MNIST, epsilon = 3, delta = 1e-5",
        common="--data fashion-mnist --model cnn --epsilon 3 --delta 1e-5 --epochs 25 --batch-size 2048 "
        "--max-grad-norm 0.1 --optimizer sgd --lr 4 --momentum 0.9",
        rows={
            "dpquant 75 %": "--policy dpquant --fraction 0.75",
            "dpquant 75 %, impact on the loss": "--policy dpquant --fraction 0.75 --analysis-score loss",
            "full precision": "--policy none",
            "static 75 %": "--policy static --fraction 0.75",
            "all": "--policy all",
            "int8 all": "--policy all --format int8",
        },
        seeds=(0, 1),
    )
]
