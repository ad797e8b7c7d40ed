# SPDX-License-Identifier: Apache-2.0
"""Folders of images in one file: an ordinary zip, or a much smaller one with the images of a class in one mosaic.

    python -m benchmarks.gpu.images pack IMAGES.zip PACKED.zip [--quality 95]

Thousands of images of 32x32 pixels compress badly one by one. A packed file holds train/CLASS.webp and test/CLASS.webp,
each a mosaic of `COLUMNS` images a line, and sizes.json. Quality 100 is lossless. What is measured on images packed
with less is said to be.
"""

import argparse
import concurrent.futures
import io
import json
import math
import zipfile
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SPLITS = ("train", "test")
COLUMNS = 32
_SIZES = "sizes.json"  # {"side": pixels, "quality": .., "count": {"train/CLASS": images}}


def pack(source: Path, target: Path, *, quality: int = 95) -> None:
    """Write the images of a zipped image folder into one packed file.

    Args:
      source: zip with .../train/CLASS/* and .../test/CLASS/*, square images of one size.
      target: the file that is written.
      quality: of WebP, 1 to 100; 100 is lossless.
    """
    counts: dict[str, int] = {}
    side = 0
    with zipfile.ZipFile(source) as images, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as packed:
        for name, members in _classes(images).items():
            pixels = np.stack([_pixels(images.read(member)) for member in members])
            side, counts[name] = pixels.shape[1], len(pixels)
            lines = math.ceil(len(pixels) / COLUMNS)
            padded = np.zeros((lines * COLUMNS, side, side, 3), np.uint8)
            padded[: len(pixels)] = pixels
            mosaic = padded.reshape(lines, COLUMNS, side, side, 3).swapaxes(1, 2).reshape(lines * side, -1, 3)
            encoded = io.BytesIO()
            Image.fromarray(mosaic).save(encoded, "WEBP", quality=quality, lossless=quality == 100, method=6)
            packed.writestr(f"{name}.webp", encoded.getvalue())
        packed.writestr(_SIZES, json.dumps({"side": side, "quality": quality, "count": counts}))


def unpack(source: Path, target: Path) -> int:
    """Write the images of a zip, ordinary or packed, into target/train/CLASS/* and target/test/CLASS/*.

    Returns: the WebP quality that they were packed with; 100 for an ordinary zip.
    """
    with zipfile.ZipFile(source) as archive:
        if _SIZES not in archive.namelist():
            for name, members in _classes(archive).items():
                folder = target / name
                folder.mkdir(parents=True)
                for member in members:
                    (folder / PurePosixPath(member).name).write_bytes(archive.read(member))
            return 100
        sizes = json.loads(archive.read(_SIZES))
    with concurrent.futures.ProcessPoolExecutor() as pool:
        jobs = [
            pool.submit(_unpack_class, source, name, count, sizes["side"], target / name)
            for name, count in sizes["count"].items()
        ]
    for job in jobs:
        job.result()
    return sizes["quality"]


def _unpack_class(source: Path, name: str, count: int, side: int, folder: Path) -> None:
    folder.mkdir(parents=True)
    with zipfile.ZipFile(source) as packed:
        mosaic = _pixels(packed.read(f"{name}.webp"))
    images = mosaic.reshape(-1, side, COLUMNS, side, 3).swapaxes(1, 2).reshape(-1, side, side, 3)
    for number, image in enumerate(images[:count]):
        Image.fromarray(image).save(folder / f"{number:05d}.png", compress_level=1)


def _classes(archive: zipfile.ZipFile) -> dict[str, list[str]]:
    """Return {"train/CLASS": members in order of their names}, and of test."""
    found: dict[str, list[str]] = {}
    for member in sorted(archive.namelist()):
        parts = PurePosixPath(member).parts
        if len(parts) >= 3 and parts[-3] in SPLITS and not member.endswith("/"):
            found.setdefault(f"{parts[-3]}/{parts[-2]}", []).append(member)
    return found


def _pixels(encoded: bytes) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))


def main() -> None:
    """Pack the file that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["pack"])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--quality", type=int, default=95)
    args = parser.parse_args()
    pack(args.source, args.target, quality=args.quality)


if __name__ == "__main__":
    main()
