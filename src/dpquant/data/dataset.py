# SPDX-License-Identifier: Apache-2.0
"""Loads data sets of images by name, in one form: pixels as integers in memory, and record ids that do not change.

A record's id is its index. The source fixes the order: an IDX file, torchvision's class, or, in an image folder, the
class names and then the paths. Keyed sampling and keyed rounding depend on it.

Pixels are normalised by public constants, (pixel / full scale - mean) / std: published ones for MNIST and
Fashion-MNIST, 0.5 and 0.5 for every other data set, so that no record decides them. The shape of an image, the classes
and `public_size` are public too. The number of records of a user's own data set is private, so an image folder has no
`public_size`. Other files under a known name keep the size that belongs to the name.

A file in an image folder that cannot be decoded is still a record: all its pixels are NaN, so that its gradient is not
finite and its contribution exactly zero. No message names or counts these files, because an error that depends on one
record reveals something about it. `Split.readable` marks these records.

No privacy mechanism is used here. Messages contain no record, no file name inside an image folder and no count of
records. Symbols: N records, B batch, C channels, H height, W width.
"""

import contextlib
import dataclasses
import functools
import http.client
import socket
import string
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torch.utils.data
from PIL import Image
from torch import Tensor

from dpquant.data.class_folders import classes_of, folder_of
from dpquant.data.folders import Store, image_folder, in_memory, square
from dpquant.data.form import Form
from dpquant.data.held import Held
from dpquant.data.idx import read_idx
from dpquant.data.normalisation import PLAIN, PUBLISHED, Normalisation, check_channels
from dpquant.data.sizes import (
    FOLDER_IMAGE_SIZE,
    FOLDER_PREFIX,
    PACKED_PREFIX,
    TABLE_PREFIX,
    TEXT_PREFIX,
    check_data_dir,
    public_size,
)
from dpquant.data.split import FULL_SCALE, FULL_SCALE_16, Loaded, Split
from dpquant.errors import DataError, SettingError

DEBIAN_DATASETS = Path("/usr/share/datasets")

_DOWNLOAD_TIMEOUT_S = 10.0
_DOWNLOAD_FAILURES = (OSError, RuntimeError, EOFError, http.client.HTTPException, tarfile.TarError, zipfile.BadZipFile)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Dataset(Form):
    """A data set and the public facts about it: its form, and those below.

    Args:
      name: As given to `load`.
      train: The private records.
      test: Held out; what is measured on them is not covered by the guarantee.
      public_size: The published number of training records, or None where that number is private.
      facts: Public facts on how the records were read, for a run's record.
    """

    name: str
    train: Held
    test: Held
    public_size: int | None
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def load(
    name: str,
    data_dir: Path | None = None,
    *,
    image_size: int | None = None,
    normalisation: Normalisation | None = None,
    download: bool = True,
    cache: Path | None = None,
    debian: Path = DEBIAN_DATASETS,
    store: Store = in_memory,
) -> Dataset:
    """Load a data set into memory.

    `digits` comes with scikit-learn; in each class every fifth record is for test. `mnist`, `fashion-mnist`, `emnist`
    (balanced) and `emnist-letters` are IDX files, plain or .gz; `cifar10` and `gtsrb` are torchvision's. They are
    looked for in data_dir, or, without it, in debian and cache, then downloaded by torchvision. `image-folder:PATH`
    reads PATH/train/CLASS/* and PATH/test/CLASS/*; a class folder may be empty.

    The files of an image folder become RGB with 16 bits a channel. Grey of 16 bits keeps its values and is not
    stretched: an image that uses 12 of 16 bits stays dark. Everything else is read with 8 bits. Transparent images are
    composed on white. Floating-point numbers and integers of 32 bits do not define which number is white: a file of
    them counts as one that cannot be decoded, and a folder with no others is refused.

    Args:
      name: One of `sizes.PUBLIC_SIZES`, or `image-folder:PATH`.
      data_dir: Folder of the files, and of downloads.
      image_size: Side in pixels of the square that images are resized to (bilinear, antialiased). None: as they are, or
        32 for image folders and gtsrb, whose images differ in size.
      normalisation: Of pixels; None: the published one, or 0.5 and 0.5.
      download: Whether missing files may be downloaded.
      cache: Folder of files and downloads without data_dir; None: ~/.cache/dpquant.
      debian: Folder of data sets that Debian's packages install.
      store: Gives the place of an image folder's pixels.
    Returns: Inputs float32 [C, H, W], targets int64, in an order that never changes.
    Raises: DataError: unknown, missing, empty or malformed; SettingError: image_size is not positive, or the
      normalisation is for other channels.
    Privacy: per example; which error is raised does not depend on what a single image of an image folder holds.
    """
    size = public_size(name)
    _check_images(name)
    _check_image_size(image_size)
    if data_dir is not None:
        check_data_dir(name, data_dir)
    home = data_dir or cache or Path.home() / ".cache" / "dpquant"
    match name:
        case "digits":
            train, test, class_names = _digits()
        case "cifar10":
            train, test, class_names = _cifar10(home, download)
        case "gtsrb":
            train, test, class_names = _gtsrb(home, image_size or FOLDER_IMAGE_SIZE, download)
        case _ if name in _IDX:
            train, test, class_names = _idx(name, home, None if data_dir else debian, download)
        case _:
            folder = folder_of(name)
            train, test, class_names = image_folder(folder, image_size or FOLDER_IMAGE_SIZE, store=store)
    if image_size is not None:
        train, test = _resized(train, image_size), _resized(test, image_size)
    channels, height, width = train.pixels.shape[1:]
    given, normalisation = normalisation, normalisation or PUBLISHED.get(name, PLAIN)
    check_channels(normalisation, channels, name)
    for split in (train, test):
        split.normalisation = normalisation
    return Dataset(
        facts={} if given is None else {"normalisation": given.fields},
        name=name,
        train=train,
        test=test,
        num_classes=len(class_names),
        input_shape=(channels, height, width),
        class_names=class_names,
        public_size=size,
    )


def _check_images(name: str) -> None:
    if name.startswith((TABLE_PREFIX, TEXT_PREFIX, PACKED_PREFIX)):
        raise DataError(
            f"Expected a data set of images; got data={name}. What a row or a text becomes is not in its name. "
            "Describe it by its shape: check-model has --input-shape for rows, and --tokens for texts."
        )


def _check_image_size(image_size: int | None) -> None:
    if image_size is not None and image_size < 1:
        raise SettingError(
            f"Expected image_size >= 1; got image_size={image_size}. It is the side of the resized images in pixels. "
            "Leave it out to keep the data set's own size."
        )


def form_of(name: str, *, image_size: int | None = None, normalisation: Normalisation | None = None) -> Form:
    """Return the form of a data set of images. Opens no record.

    Args:
      name: as for `load`.
      image_size: as for `load`.
      normalisation: as for `load`.
    Raises: DataError: the data set is unknown, or an image folder has no classes; SettingError: as for `load`.
    """
    public_size(name)  # refuses an unknown name
    _check_images(name)
    _check_image_size(image_size)
    match name:
        case "digits":
            channels, side, classes = 1, 8, _DIGITS
        case "cifar10":
            channels, side, classes = 3, 32, _CIFAR10
        case "gtsrb":
            channels, side, classes = 3, FOLDER_IMAGE_SIZE, _SIGNS
        case _ if name in _IDX:
            channels, side, classes = 1, 28, _IDX[name].class_names
        case _:
            channels, side, classes = 3, FOLDER_IMAGE_SIZE, classes_of(folder_of(name))
    check_channels(normalisation or PLAIN, channels, name)
    side = image_size or side
    return Form(input_shape=(channels, side, side), num_classes=len(classes), class_names=classes)


def _resized(split: Split, size: int) -> Split:
    """Return the records resized to squares of this side; image folders and gtsrb have them already."""
    if split.pixels.shape[-2:] == (size, size):
        return split
    pixels = F.interpolate(split.pixels, (size, size), mode="bilinear", antialias=True)
    return Split(pixels, split.targets, readable=split.readable, full_scale=split.full_scale)


def _checked(
    pixels: Tensor, targets: Tensor, class_names: Sequence[str], where: str, full_scale: int = FULL_SCALE
) -> Split:
    """Return a split of published records.

    Raises: DataError: it is empty, numbers of images and labels differ, or a label is out of range.
    """
    if len(pixels) == 0 or len(pixels) != len(targets):
        raise DataError(
            f"Expected {where} to hold at least one image and one label for each; it does not. "
            "Images and labels would not belong together. Fetch the files again."
        )
    if not bool(((targets >= 0) & (targets < len(class_names))).all()):
        raise DataError(
            f"Expected every label of {where} in [0, {len(class_names)}) once counted from 0; at least one is not. "
            "The loss has no output for it. Check that the files belong to this data set's name."
        )
    return Split(pixels, targets, full_scale=full_scale)


_DIGITS = tuple(string.digits)
_SIGNS = tuple(f"{label:05d}" for label in range(43))
_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def _digits() -> Loaded:
    """Load 1,797 digits of 8x8 pixels in 0..16; in each class, in scikit-learn's order, every fifth is for test."""
    from sklearn.datasets import load_digits  # slow to import, and only this data set needs it

    pixels, labels = load_digits(return_X_y=True)
    pixels = torch.from_numpy(pixels.astype(np.uint8)).reshape(-1, 1, 8, 8)
    targets = torch.from_numpy(labels.astype(np.int64))
    rank_in_class = F.one_hot(targets).cumsum(0).gather(1, targets[:, None]).squeeze(1)
    for_test = rank_in_class % 5 == 0
    train, test = (_checked(pixels[rows], targets[rows], _DIGITS, "digits", 16) for rows in (~for_test, for_test))
    return train, test, _DIGITS


@dataclasses.dataclass(frozen=True, kw_only=True)
class _IdxSource:
    """File names of one data set of IDX files, and the meaning of their bytes."""

    train: str  # stem of the names: before "-images-idx3-ubyte" and "-labels-idx1-ubyte"
    test: str
    torchvision_class: str
    class_names: tuple[str, ...]
    first_label: int = 0
    transposed: bool = False


_FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
_MERGED_LETTERS = "abdefghnqrt"  # the lower-case letters that EMNIST's balanced split tells from their capitals
_IDX = MappingProxyType(
    {
        "mnist": _IdxSource(train="train", test="t10k", torchvision_class="MNIST", class_names=_DIGITS),
        "fashion-mnist": _IdxSource(train="train", test="t10k", torchvision_class="FashionMNIST", class_names=_FASHION),
        "emnist": _IdxSource(
            train="emnist-balanced-train",
            test="emnist-balanced-test",
            torchvision_class="EMNIST",
            class_names=tuple(string.digits + string.ascii_uppercase + _MERGED_LETTERS),
            transposed=True,
        ),
        "emnist-letters": _IdxSource(
            train="emnist-letters-train",
            test="emnist-letters-test",
            torchvision_class="EMNIST",
            class_names=tuple(string.ascii_lowercase),
            first_label=1,
            transposed=True,
        ),
    }
)


def _idx(name: str, home: Path, debian: Path | None, download: bool) -> Loaded:
    """Load a data set of four IDX files from the first folder that has them."""
    source = _IDX[name]
    raw = Path(source.torchvision_class) / "raw"  # torchvision's folder below its root
    places = [*([debian / name] if debian else []), home, home / raw]
    found = next((place for place in places if _idx_file(place, f"{source.train}-images-idx3-ubyte").is_file()), None)
    if found is None:
        split = {"split": source.train.split("-")[1]} if source.torchvision_class == "EMNIST" else {}
        _torchvision(name, source.torchvision_class, download, root=str(home), **split)
        found = home / raw
    train, test = (_idx_split(found, stem, source) for stem in (source.train, source.test))
    return train, test, source.class_names


def _idx_file(place: Path, stem: str) -> Path:
    """Return the path of a file: with .gz if that exists, else plain, whether or not it exists."""
    compressed = place / f"{stem}.gz"
    return compressed if compressed.is_file() else place / stem


def _idx_split(place: Path, stem: str, source: _IdxSource) -> Split:
    """Read the images and labels of the files with this stem."""
    images = read_idx(_idx_file(place, f"{stem}-images-idx3-ubyte"), dimensions=3)
    labels = read_idx(_idx_file(place, f"{stem}-labels-idx1-ubyte"), dimensions=1)
    if source.transposed:
        images = images.transpose(1, 2).contiguous()
    return _checked(images[:, None], labels.long() - source.first_label, source.class_names, str(place / stem))


def _torchvision(
    name: str, class_name: str, download: bool, **arguments: str | bool | Callable[[Image.Image], Tensor]
) -> Any:
    """Return a data set object of torchvision, downloaded if necessary; any failure is a DataError."""
    from torchvision import datasets  # slow to import, and digits and image folders do without

    try:
        with _patient_for(_DOWNLOAD_TIMEOUT_S), leaving_no_folders(Path(str(arguments["root"])), class_name):
            return getattr(datasets, class_name)(download=download, **arguments)
    except _DOWNLOAD_FAILURES as error:
        debian = " (or install Debian's package dataset-fashion-mnist)" if name == "fashion-mnist" else ""
        raise DataError(
            f"Expected the files of data={name} on this machine or the network; got {type(error).__name__}. Three ways "
            f"on: give --data-dir with the files{debian}; let torchvision download them on a machine with a network "
            f"and copy them; or use data that needs no download: digits, or {FOLDER_PREFIX}PATH."
        ) from error


@contextlib.contextmanager
def leaving_no_folders(root: Path, class_name: str) -> Iterator[None]:
    """Context: if it ends with an exception, the empty folders that torchvision has made for files are removed."""
    places = [root / class_name / "raw", root / class_name, root / class_name.lower(), root, *root.parents]
    missing = [place for place in places if not place.exists()]
    try:
        yield
    except BaseException:
        for place in missing:
            with contextlib.suppress(OSError):  # it is not empty, or was not made
                place.rmdir()
        raise


@contextlib.contextmanager
def _patient_for(seconds: float) -> Iterator[None]:
    """Set the default timeout of network connections until the block ends; torchvision sets none."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _cifar10(root: Path, download: bool, *, published: Callable[..., Any] = _torchvision) -> Loaded:
    """Load CIFAR-10 as torchvision reads it, or whatever stands for torchvision."""
    sets = [published("cifar10", "CIFAR10", download, root=str(root), train=train) for train in (True, False)]
    names = tuple(sets[0].classes)
    train, test = (
        _checked(torch.from_numpy(s.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(s.targets), names, "cifar10")
        for s in sets
    )
    return train, test, names


def _gtsrb(root: Path, size: int, download: bool) -> Loaded:
    """Load the German traffic signs as torchvision reads them, resized."""
    splits = []
    for name in ("train", "test"):
        transform = functools.partial(square, size=size)
        signs = _torchvision("gtsrb", "GTSRB", download, root=str(root), split=name, transform=transform)
        pixels = torch.empty((len(signs), 3, size, size), dtype=torch.uint16)
        targets = torch.empty(len(signs), dtype=torch.int64)
        for index in range(len(signs)):
            pixels[index], targets[index] = signs[index]
        splits.append(_checked(pixels, targets, _SIGNS, "gtsrb", FULL_SCALE_16))
    return splits[0], splits[1], _SIGNS
