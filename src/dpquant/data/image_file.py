# SPDX-License-Identifier: Apache-2.0
"""Reads images for a trained model, as those were read that it was trained on: for predictions, and for tests."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from dpquant.data.class_folders import IMAGE_SUFFIXES, is_image
from dpquant.data.folders import check_readable, decode, square
from dpquant.data.split import FULL_SCALE_16, Split
from dpquant.errors import DataError, did_you_mean

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow's mode L; a grey image keeps its values


def read_image(path: Path, shape: tuple[int, int, int], *, resized: bool) -> Tensor:
    """Return the pixels of an image, 0 for black and 1 for white, float32 [C, H, W].

    Args:
      path: of the file.
      shape: (C, H, W) of the model's inputs, of one channel, which is grey, or three.
      resized: whether images of another size are resized; otherwise they are refused.
    Raises:
      DataError: the file cannot be read, or is no image of this shape. The message names the file.
    """
    channels, height, width = shape
    _check_shape(shape, path)
    if path.is_dir() or not path.exists():
        raise DataError(f"Expected an image in {path}; it is {'a folder' if path.is_dir() else 'not there'}.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            warnings.filterwarnings("ignore", category=UserWarning)
            with Image.open(path) as image:
                size = image.size
                if not resized and size != (width, height):
                    raise DataError(
                        f"Expected an image of {width}x{height} pixels in {path}; got {size[0]}x{size[1]}. The model "
                        "was trained on images as they are, and never on resized ones. Resize it yourself."
                    )
                pixels = square(image, height)
    except DataError:
        raise
    except UnidentifiedImageError as error:
        raise DataError(f"Expected an image in {path}; got a file of another kind. Check the path.") from error
    except Exception as error:  # decoders raise any type
        raise DataError(
            f"Expected a whole image in {path}; got {type(error).__name__}: {error}. It is damaged, or its kind does "
            "not say which number is white."
        ) from error
    return _as_channels(pixels, channels).float() / FULL_SCALE_16


def read_folder(
    folder: Path, class_names: Sequence[str], shape: tuple[int, int, int], *, resized: bool, strict: bool
) -> Split:
    """Read test images from folders that are named after classes; not each class needs one.

    Args:
      folder: of these folders.
      class_names: in the order of the targets.
      shape: (C, H, W) of the model's inputs, of one channel, which is grey, or three.
      resized: whether images of another size are resized; otherwise they count as unreadable.
      strict: name the first image that cannot be read, as is right where test records are not protected.
    Raises:
      DataError: a folder is named after no class, there is no image, or with `strict` one cannot be read.
    Privacy: per example; without `strict` which error is raised does not depend on what an image holds.
    """
    channels, side, _ = shape
    _check_shape(shape, folder)
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if others := [name for name in names if name not in class_names]:
        raise DataError(
            f"Expected the folders in {folder} to be named after the model's classes; got {others[0]}. "
            f"{did_you_mean(others[0], class_names)}The model knows {', '.join(class_names[:20])}. Rename it."
        )
    found = [(path, label) for label, name in enumerate(class_names) for path in _images_in(folder / name)]
    if not found:
        raise DataError(
            f"Expected images in folders of {folder} that are named after classes; got none. There is nothing to "
            f"test on. Files count by their suffix, {', '.join(sorted(IMAGE_SUFFIXES))}."
        )

    def to_pixels(image: Image.Image, size: int) -> Tensor:
        if not resized and image.size != (size, size):
            raise ValueError("another size")
        return _as_channels(square(image, size), channels)

    files = [path for path, _ in found]
    pixels, readable = decode(files, side, to_pixels)
    targets = torch.tensor([label for _, label in found])
    split = Split(pixels[:, :channels], targets, readable=readable, full_scale=FULL_SCALE_16)
    if strict:
        check_readable(files, split)
    return split


def _images_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if is_image(path)) if folder.is_dir() else []


def _check_shape(shape: tuple[int, int, int], path: Path) -> None:
    channels, height, width = shape
    if channels not in (1, 3) or height != width:
        raise DataError(
            f"Expected a model of grey or RGB squares, to read {path} for it; its inputs are {shape}. How an image "
            "becomes such an input is not known. Load the model by dpquant.load, and give it tensors."
        )


def _as_channels(pixels: Tensor, channels: int) -> Tensor:
    """Return uint16 [3, H, W] as grey or as it is. A grey image keeps its values."""
    if channels == 3:
        return pixels
    grey = (pixels.double() * torch.tensor(_LUMA, dtype=torch.float64)[:, None, None]).sum(0, keepdim=True)
    return grey.round().to(torch.uint16)
