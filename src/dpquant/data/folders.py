# SPDX-License-Identifier: Apache-2.0
"""Reads image folders: files in folders named after their class, decoded to one shape.

A file that cannot be decoded is still a record: all its pixels are NaN, so that its gradient is not finite and its
contribution exactly zero. No message names or counts these files, because an error that depends on one record reveals
something about it. Test images are not protected: the first one that cannot be decoded is an error that names it.
"""

import functools
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, TiffImageFile
from torch import Tensor

from dpquant.data.class_folders import IMAGE_SUFFIXES, classes_of, is_image
from dpquant.data.split import FULL_SCALE_16, Loaded, Split
from dpquant.errors import DataError

_BYTE_IN_16_BITS = 257  # exactly: 65,535 is 257 times 255
_WHITE_IS_65535 = frozenset({"PNG", "PPM"})  # formats whose mode I, of 32 bits, holds samples of 16
_MODES_WITH_ALPHA = frozenset({"LA", "La", "PA", "RGBA", "RGBa"})
_DECODE_RUN = 256  # files that a thread decodes in a row

ToPixels = Callable[[Image.Image, int], Tensor]  # an image and the side in pixels -> uint16 [3, side, side]
Store = Callable[[str, tuple[int, ...]], Tensor]  # train or test, and a shape -> uint16 zeros of that shape


def square(image: Image.Image, size: int) -> Tensor:
    """Convert an image to RGB, uint16 [3, size, size]: bilinear, by Pillow's filter, antialiased when it shrinks.

    Raises: ValueError: the image does not define which number is white.
    """
    square = (size, size)
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in _WHITE_IS_65535):
        grey = Image.fromarray(_grey(image)).resize(square, Image.Resampling.BILINEAR)
        return torch.from_numpy(np.rint(np.array(grey)).astype(np.uint16)).expand(3, *square)
    if image.mode in ("I", "F"):
        raise ValueError("no full scale")
    resized = _on_white(image).resize(square, Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(resized).astype(np.uint16) * _BYTE_IN_16_BITS).permute(2, 0, 1)


def _zeros(shape: tuple[int, ...]) -> Tensor:
    return torch.zeros(shape, dtype=torch.uint16)


def in_memory(_: str, shape: tuple[int, ...]) -> Tensor:
    """Return zeros for the pixels of a split: the `Store` of data sets that are held in memory."""
    return _zeros(shape)


def image_folder(folder: Path, size: int, *, to_pixels: ToPixels = square, store: Store = in_memory) -> Loaded:
    """Read the user's own images: one record for each image file below train/CLASS and test/CLASS.

    Args:
      folder: of train and test.
      size: side of the images in pixels.
      to_pixels: converts a decoded image; a file on which it raises counts as one that cannot be decoded.
      store: gives the place of each split's pixels.
    Returns: training and test records, and class names.
    Raises: DataError: folders are missing, one of train and test has no readable image, or a test image cannot be
      read: test records are not protected.
    """
    names = classes_of(folder)
    (train, _), (test, files) = (
        _folder_split(folder / split, names, size, to_pixels, store) for split in ("train", "test")
    )
    check_readable(files, test)
    return train, test, names


def check_readable(files: Sequence[Path], test: Split) -> None:
    """Refuse test images of which one cannot be read.

    Raises: DataError: names the first one's file.
    """
    if not bool(test.readable.all()):
        first = files[int(test.readable.long().argmin())]
        raise DataError(
            f"Expected every test image to be readable; {first} is not: it is damaged, or does not say which number is "
            "white. It would count as an error of the model. Mend it, or take it out."
        )


def _folder_split(
    folder: Path, class_names: Sequence[str], size: int, to_pixels: ToPixels, store: Store
) -> tuple[Split, list[Path]]:
    """Decode the image files of every class, and mark those that cannot be decoded without reporting them."""
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(class_names):
        images = sorted(path for path in (folder / name).rglob("*") if is_image(path))
        files += images
        labels += [label] * len(images)
    pixels, readable = decode(files, size, to_pixels, functools.partial(store, folder.name))
    if not bool(readable.any()):
        raise DataError(
            f"Expected {folder} to hold at least one readable image; it holds none. There is nothing to train or test "
            f"on. Add images: files count as such by their suffix, {', '.join(sorted(IMAGE_SUFFIXES))}."
        )
    split = Split(pixels, torch.tensor(labels, dtype=torch.int64), readable=readable, full_scale=FULL_SCALE_16)
    return split, files


def decode(
    files: Sequence[Path],
    size: int,
    to_pixels: ToPixels = square,
    store: Callable[[tuple[int, ...]], Tensor] = _zeros,
) -> tuple[Tensor, Tensor]:
    """Decode files to uint16 [N, 3, size, size], black where that fails, and bool [N]: whether it succeeded.

    Two threads decode runs of files. On two cores that is 1.7 times as fast as one thread for photographs of 500x400
    (1,400 a second), and 0.6 times for thumbnails of 32x32 (6,500 a second), which hold the interpreter's lock longer.
    """
    pixels = store((len(files), 3, size, size))
    readable = torch.zeros(len(files), dtype=torch.bool)

    def decode_run(start: int) -> None:
        for index in range(start, min(start + _DECODE_RUN, len(files))):
            try:
                with Image.open(files[index]) as image:
                    pixels[index] = to_pixels(image, size)
            except (
                Exception
            ):  # decoders raise any type, and a record may neither stop the run nor be recognised by an error
                continue
            readable[index] = True

    with warnings.catch_warnings(), ThreadPoolExecutor(max_workers=2) as pool:
        warnings.simplefilter("ignore")  # Pillow's warnings describe the record
        list(pool.map(decode_run, range(0, len(files), _DECODE_RUN)))
    return pixels, readable


def _grey(image: Image.Image) -> np.ndarray:
    """Convert an image with one channel of up to 16 bits to float32, 65,535 for white."""
    values = np.array(image).astype(np.float32)
    if isinstance(image, TiffImageFile):  # Pillow does not scale its samples
        values *= FULL_SCALE_16 / (2 ** image.tag_v2[BITSPERSAMPLE][0] - 1)
        return values if image.tag_v2[PHOTOMETRIC_INTERPRETATION] else FULL_SCALE_16 - values
    if (see_through := image.info.get("transparency")) is not None:
        values[values == see_through] = FULL_SCALE_16
    return values


def _on_white(image: Image.Image) -> Image.Image:
    """Convert an image of 8 bits to RGB, composed on white where it is transparent."""
    if image.mode not in _MODES_WITH_ALPHA and "transparency" not in image.info:
        return image.convert("RGB")
    layer, canvas = image.convert("RGBA"), Image.new("RGB", image.size, "white")
    canvas.paste(layer, mask=layer)
    return canvas
