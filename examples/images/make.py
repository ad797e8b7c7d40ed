#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Write scikit-learn's handwritten digits, which are public, as a folder of images.

It has train/CLASS/*.png and test/CLASS/*.png.

python examples/images/make.py FOLDER [--records 1797]
"""

import argparse
import itertools
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

TEST_EVERY = 5  # one image in five is a test image


def main() -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--records", type=int, default=1797, help="of both parts together")
    given = parser.parse_args()
    digits = load_digits()
    for part, label in itertools.product(("train", "test"), digits.target_names):
        (given.folder / part / str(label)).mkdir(parents=True, exist_ok=True)
    for number, (pixels, label) in enumerate(zip(digits.images[: given.records], digits.target, strict=False)):
        part = "test" if number % TEST_EVERY == 0 else "train"
        Image.fromarray((pixels * 255 / 16).astype(np.uint8)).save(given.folder / part / str(label) / f"{number}.png")


if __name__ == "__main__":
    main()
