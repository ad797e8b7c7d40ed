# SPDX-License-Identifier: Apache-2.0
"""German traffic signs from image folders: torchvision's ResNet18 at epsilon 8, half of its layers quantized.

    python -m experiments.gtsrb --folder DIR [--work DIR]

DIR holds train/CLASS/*.png and test/CLASS/*.png (39,209 and 12,630 images of 43 classes, 32 x 32). Writes
results/gtsrb.json.
One run on all cores: its seconds are part of the result.
"""

import argparse
import shlex
from pathlib import Path

from experiments.runner import run_all, table, write

SEEDS = (0,)
COMMON = shlex.split(
    "--model resnet18 --records 39209 --epsilon 8 --delta 1e-5 --epochs 6 --batch-size 1024 --max-grad-norm 1 "
    "--optimizer adam --lr 1e-3 "
)
ROWS = {"dpquant 50 %": ["--policy", "dpquant", "--fraction", "0.5"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/gtsrb"))
    arguments = parser.parse_args()
    common = ["--data", f"image-folder:{arguments.folder}", *COMMON]
    write("gtsrb", run_all(table(ROWS, common, SEEDS), arguments.work, jobs=1))


if __name__ == "__main__":
    main()
