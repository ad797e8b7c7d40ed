# SPDX-License-Identifier: Apache-2.0
"""Options that the tables share. Seeds, networks and budgets are chosen here, and nowhere else."""

SEEDS = (0, 1, 2)

# DP-Adam; int8, so that no layer is spared
GTSRB = (
    "--data image-folder:GTSRB --records 39209 --model resnet18 --delta 1e-5 --epochs 12 --batch-size 1024 "
    "--max-grad-norm 1 --optimizer adam --lr 1e-3 --backend int8"
)
CIFAR10 = (
    "--data image-folder:CIFAR10 --records 50000 --model resnet18 --delta 1e-5 --epochs 12 --batch-size 1024 "
    "--max-grad-norm 1 --optimizer adam --lr 1e-3 --backend int8"
)
FASHION = (
    "--data fashion-mnist --model resnet18 --delta 1e-5 --epochs 6 --batch-size 2048 "
    "--max-grad-norm 1 --optimizer adam --lr 1e-3 --momentum 0 --backend int8"
)
EPSILON = "--epsilon 8"
