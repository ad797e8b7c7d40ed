# SPDX-License-Identifier: Apache-2.0
"""German traffic signs from image folders: torchvision's ResNet18 at epsilon 8, half of its layers quantized.

With --jobs 1 one run takes all cores: its seconds are part of the result.
"""

from experiments.runner import Table

TABLES = [
    Table(
        name="gtsrb",
        title="GTSRB, ResNet18, epsilon = 8",
        common="--data image-folder:GTSRB --model resnet18 --records 39209 --epsilon 8 --delta 1e-5 --epochs 6 "
        "--batch-size 1024 --max-grad-norm 1 --optimizer adam --lr 1e-3",
        rows={"dpquant 50 %": "--policy dpquant --fraction 0.5"},
        seeds=(0,),
    )
]
