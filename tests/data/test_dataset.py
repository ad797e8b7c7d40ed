# SPDX-License-Identifier: Apache-2.0
"""Data sets: what is read is what was written, record ids stay, bad files end in one error, broken images in NaN."""

import gzip
import io
import struct
import urllib.error
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from dpquant.data import dataset as data
from dpquant.data.dataset import Dataset, Split, leaving_no_folders, load, public_size
from dpquant.data.folders import image_folder
from dpquant.data.idx import read_idx
from dpquant.errors import DataError, SettingError

SPLITS = ("train", "t10k")


def idx_bytes(values: np.ndarray, magic: bytes | None = None) -> bytes:
    """An IDX file of these bytes, written independently of the reader."""
    sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
    return (magic or bytes((0, 0, 8, values.ndim))) + sizes + values.astype(np.uint8).tobytes()


def write_idx(folder: Path, images: np.ndarray, labels: np.ndarray, stems: tuple[str, ...] = SPLITS) -> None:
    """The same images and labels as training and as test files, plain."""
    folder.mkdir(exist_ok=True)
    for stem in stems:
        (folder / f"{stem}-images-idx3-ubyte").write_bytes(idx_bytes(images))
        (folder / f"{stem}-labels-idx1-ubyte").write_bytes(idx_bytes(labels))


def images_and_labels(count: int = 6, side: int = 5) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (count, side, side + 1)), rng.integers(0, 10, count)


def write_folder(folder: Path, classes: tuple[str, ...] = ("cat", "dog"), count: int = 3) -> Path:
    """PATH/train/CLASS/*.png and PATH/test/CLASS/*.png, where image i of class c is filled with one colour."""
    for split in ("train", "test"):
        for label, name in enumerate(classes):
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                Image.new("RGB", (7, 9), (40 * label, 10 * index, 255)).save(folder / split / name / f"{index}.png")
    return folder


def load_folder(folder: Path) -> Dataset:
    return load(f"image-folder:{folder}", image_size=4)


def first_pixels(split: Split) -> list[list[float]]:
    """The colour of each record's first pixel, 255 for full."""
    return (split.pixels[:, :, 0, 0].double() * 255 / split.full_scale).tolist()


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """No network; returns the addresses that were asked for."""
    asked: list[str] = []

    def refuse(request: Any, *args: Any, **kwargs: Any) -> None:
        asked.append(request.full_url)
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    return asked


# What a split promises.


def assert_batch_is_its_items(split: Split, batch: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
    ids = torch.tensor([4, 0, 4, 2])
    inputs, targets = batch(ids)
    items = [split[i] for i in ids.tolist()]
    assert torch.equal(inputs, torch.stack([image for image, _ in items]))
    assert torch.equal(targets, torch.stack([target for _, target in items]))
    assert (inputs.dtype, targets.dtype) == (torch.float32, torch.int64)


def test_a_batch_is_bitwise_what_stacking_its_items_gives() -> None:
    split = load("digits").train
    assert_batch_is_its_items(split, split.batch)
    assert_batch_is_its_items(split, split.dpquant_batch)


def test_a_batch_in_another_order_would_be_noticed() -> None:
    split = load("digits").train
    with pytest.raises(AssertionError):
        assert_batch_is_its_items(split, lambda ids: split.batch(ids.sort().values))


def test_a_data_loader_fetches_the_same_batch() -> None:
    split = load("digits").train
    inputs, targets = next(iter(DataLoader(split, batch_size=8)))
    expected_inputs, expected_targets = split.batch(torch.arange(8))
    assert torch.equal(inputs, expected_inputs) and torch.equal(targets, expected_targets)


def test_an_empty_batch_keeps_its_shape() -> None:
    inputs, targets = load("digits").train.batch(torch.empty(0, dtype=torch.int64))
    assert inputs.shape == (0, 1, 8, 8) and targets.shape == (0,)


def test_a_record_beyond_the_end_is_an_index_error() -> None:
    split = load("digits").test
    with pytest.raises(IndexError):
        split[len(split)]


@pytest.mark.parametrize(("dtype", "full_scale"), [(torch.uint8, 16), (torch.uint8, 255), (torch.uint16, 65_535)])
def test_black_and_white_are_normalised_by_the_public_constants(dtype: torch.dtype, full_scale: int) -> None:
    pixels = torch.tensor([0, full_scale]).to(dtype).reshape(2, 1, 1, 1)
    inputs, _ = Split(pixels, torch.zeros(2).long(), full_scale=full_scale).batch(torch.arange(2))
    assert inputs.flatten().tolist() == [-1.0, 1.0]


# Digits.


def test_digits_are_split_the_same_way_within_every_class() -> None:
    digits = load("digits")
    train, test = digits.train.targets.bincount(minlength=10), digits.test.targets.bincount(minlength=10)
    assert torch.equal(test, (train + test) // 5)
    assert len(digits.train) == digits.public_size == public_size("digits")
    assert (digits.num_classes, digits.input_shape) == (10, (1, 8, 8))


def test_digits_keep_their_record_ids() -> None:
    from sklearn.datasets import load_digits

    images, _ = load_digits(return_X_y=True)  # the first twelve are 0 to 9, 0 and 1: none is the fifth of its class
    assert np.array_equal(load("digits").train.pixels[:12].flatten(1), images[:12])


def test_images_can_be_resized_to_a_square() -> None:
    digits = load("digits", image_size=12)
    assert digits.input_shape == (1, 12, 12) and digits.test[0][0].shape == (1, 12, 12)
    assert digits.train.pixels.max() <= 16


def test_an_image_size_of_zero_is_refused() -> None:
    with pytest.raises(SettingError, match="image_size >= 1; got image_size=0"):
        load("digits", image_size=0)


# IDX files.


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_idx_files_are_read_as_written(name: str, tmp_path: Path) -> None:
    images, labels = images_and_labels()
    write_idx(tmp_path, images, labels)
    found = load(name, tmp_path)
    assert np.array_equal(found.train.pixels[:, 0], images) and np.array_equal(found.test.targets, labels)
    assert found.input_shape == (1, 5, 6) and found.num_classes == len(found.class_names) == 10


def test_compressed_idx_files_are_read_as_written(tmp_path: Path) -> None:
    images, labels = images_and_labels()
    write_idx(tmp_path, images, labels)
    for path in list(tmp_path.iterdir()):
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    assert np.array_equal(load("mnist", tmp_path).train.pixels[:, 0], images)


def test_files_that_torchvision_unpacked_are_found(tmp_path: Path, offline: list[str]) -> None:
    images, labels = images_and_labels()
    (tmp_path / "MNIST").mkdir()
    write_idx(tmp_path / "MNIST" / "raw", images, labels)
    assert len(load("mnist", tmp_path).train) == 6 and offline == []


def test_debians_files_are_found_by_themselves(tmp_path: Path, offline: list[str]) -> None:
    images, labels = images_and_labels()
    (tmp_path / "debian").mkdir()
    write_idx(tmp_path / "debian" / "fashion-mnist", images, labels)
    found = load("fashion-mnist", cache=tmp_path / "cache", debian=tmp_path / "debian")
    assert len(found.train) == 6 and offline == []


def test_emnist_images_are_turned_upright(tmp_path: Path) -> None:
    images, labels = images_and_labels()
    write_idx(tmp_path, images, labels, ("emnist-balanced-train", "emnist-balanced-test"))
    found = load("emnist", tmp_path)
    assert np.array_equal(found.train.pixels[:, 0], images.transpose(0, 2, 1))
    assert found.num_classes == 47 and found.class_names[10] == "A" and found.class_names[36] == "a"


def test_emnist_letters_are_counted_from_zero(tmp_path: Path) -> None:
    images, _ = images_and_labels(count=2)
    write_idx(tmp_path, images, np.array([1, 26]), ("emnist-letters-train", "emnist-letters-test"))
    found = load("emnist-letters", tmp_path)
    assert found.train.targets.tolist() == [0, 25] and found.class_names[25] == "z"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00\x00\x08",
        idx_bytes(np.zeros((2, 3, 3)))[:-1],
        idx_bytes(np.zeros((2, 3, 3))) + b"\x00",
        idx_bytes(np.zeros((2, 3, 3)), magic=b"\x00\x00\x0d\x03"),
        idx_bytes(np.zeros((2, 3))),
        idx_bytes(np.zeros((0, 3, 3))),
        b"\x00\x00\x08\x03" + b"\xff" * 12,
    ],
    ids=["empty", "header cut", "data cut", "data too long", "floats", "two sizes", "no records", "absurd sizes"],
)
def test_a_damaged_idx_file_is_one_error(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(DataError, match="to be a whole IDX file of unsigned bytes with 3 dimension"):
        read_idx(tmp_path / "file", dimensions=3)


@pytest.mark.parametrize(
    "content", [b"not gzip", gzip.compress(idx_bytes(np.zeros((9, 3, 3))))[:20]], ids=["not gzip", "cut short"]
)
def test_a_damaged_archive_is_one_error(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "file.gz").write_bytes(content)
    with pytest.raises(DataError, match="to be a readable file"):
        read_idx(tmp_path / "file.gz", dimensions=3)


def test_a_missing_label_file_is_one_error(tmp_path: Path) -> None:
    write_idx(tmp_path, *images_and_labels())
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match="t10k-labels-idx1-ubyte to be a readable file; got FileNotFoundError"):
        load("mnist", tmp_path)


def test_more_images_than_labels_are_one_error(tmp_path: Path) -> None:
    images, labels = images_and_labels()
    write_idx(tmp_path, images, labels[:-1])
    with pytest.raises(DataError, match="one label for each"):
        load("mnist", tmp_path)


@pytest.mark.parametrize(("name", "stems", "label"), [("mnist", SPLITS, 10), ("emnist-letters", None, 0)])
def test_a_label_out_of_range_names_the_rule_and_no_record(
    name: str, stems: tuple[str, str] | None, label: int, tmp_path: Path
) -> None:
    images, _ = images_and_labels(count=2)
    write_idx(tmp_path, images, np.array([1, label]), stems or (f"{name}-train", f"{name}-test"))
    with pytest.raises(
        DataError, match=r"Expected every label of .* in \[0, (10|26)\) once counted from 0; at least one"
    ):
        load(name, tmp_path)


# What is missing.


def test_an_unknown_name_gets_the_nearest_known_one() -> None:
    with pytest.raises(DataError, match=r"got data=fashion_mnist\. Did you mean fashion-mnist\?"):
        load("fashion_mnist")


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "emnist", "emnist-letters", "cifar10", "gtsrb"])
def test_a_data_set_that_cannot_be_had_is_one_error_with_three_ways_on(
    name: str, tmp_path: Path, offline: list[str]
) -> None:
    with pytest.raises(DataError, match=rf"Expected the files of data={name} ") as raised:
        load(name, cache=tmp_path / "cache", debian=tmp_path / "debian")
    message = str(raised.value)
    assert all(way in message for way in ("--data-dir", "let torchvision download", "digits, or image-folder:PATH"))
    assert ("dataset-fashion-mnist" in message) == (name == "fashion-mnist")
    assert offline, "the network must have been asked"
    assert not list(tmp_path.iterdir()), "folders for files that did not come"


def test_the_network_is_left_alone_when_told_so(tmp_path: Path, offline: list[str]) -> None:
    for name in ("mnist", "emnist", "cifar10", "gtsrb"):
        with pytest.raises(DataError, match="Three ways on"):
            load(name, tmp_path, download=False)
    assert offline == []


def test_the_published_size_is_known_without_data_and_an_image_folder_has_none(offline: list[str]) -> None:
    assert (public_size("mnist"), public_size("gtsrb"), public_size("image-folder:x")) == (60_000, 26_640, None)
    assert offline == []


def test_cifar10_as_torchvision_gives_it_becomes_channels_first(tmp_path: Path) -> None:
    class Published:
        classes = ("plane", "car")
        data = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
        targets = (1, 0)

        def __init__(self, name: str, class_name: str, download: bool, root: str, train: bool) -> None:
            assert (name, class_name, root) == ("cifar10", "CIFAR10", str(tmp_path))

    train, _, class_names = data._cifar10(tmp_path, True, published=Published)
    assert np.array_equal(train.pixels.permute(0, 2, 3, 1), Published.data)
    assert train.targets.tolist() == [1, 0] and class_names == ("plane", "car")


def test_gtsrb_in_torchvisions_layout_is_read_and_resized(tmp_path: Path, offline: list[str]) -> None:
    folder = tmp_path / "gtsrb" / "GTSRB"
    for split, name in (("Training", "00000"), ("Training", "00007"), ("Final_Test", "Images")):
        (folder / split / name).mkdir(parents=True)
        Image.new("RGB", (30, 40), (200, 100, 50)).save(folder / split / name / "sign.ppm")
    (tmp_path / "gtsrb" / "GT-final_test.csv").write_text("Filename;ClassId\nsign.ppm;42\n")
    found = load("gtsrb", tmp_path)
    assert found.input_shape == (3, 32, 32) and found.num_classes == 43 and offline == []
    assert found.test.targets.tolist() == [42] and first_pixels(found.test) == [[200, 100, 50]]


# Image folders.


def test_an_image_folder_is_numbered_by_class_name_and_path(tmp_path: Path) -> None:
    found = load_folder(write_folder(tmp_path, ("dog", "cat")))
    assert found.class_names == ("cat", "dog") and found.train.targets.tolist() == [0, 0, 0, 1, 1, 1]
    assert first_pixels(found.train) == [[c, 10 * i, 255] for c in (40, 0) for i in range(3)]
    assert found.input_shape == (3, 4, 4) and found.public_size is None


def test_an_image_folder_gives_the_same_records_each_time(tmp_path: Path) -> None:
    write_folder(tmp_path, count=300)  # more than one run of files, so that both threads work
    first, second = load_folder(tmp_path), load_folder(tmp_path)
    assert torch.equal(first.train.pixels, second.train.pixels) and bool(first.train.readable.all())


def test_images_are_made_rgb_and_resized_without_aliasing(tmp_path: Path) -> None:
    write_folder(tmp_path, ("x", "y"), count=1)
    stripes = np.zeros((64, 64), dtype=np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(tmp_path / "test" / "x" / "0.png")
    inputs, _ = load_folder(tmp_path).test.batch(torch.tensor([0]))
    assert inputs.shape == (1, 3, 4, 4) and inputs.abs().max() < 0.1  # every pixel is the grey of black and white


# What the files of an image folder hold, of which nothing may be lost. All are of 4x4 pixels and stay so.

SIXTEEN = np.linspace(0, 65_535, 16).round().reshape(4, 4)
EIGHT = np.linspace(0, 255, 16).round().reshape(4, 4)
TWELVE = np.linspace(0, 4_095, 16).round().reshape(4, 4)
HALF = 128  # of 255: an alpha


def grey(values: np.ndarray) -> np.ndarray:
    """Numbers of which 1 is white, as three equal channels."""
    return np.broadcast_to(values, (3, 4, 4))


def on_white(values: np.ndarray, alpha: float) -> np.ndarray:
    return grey(alpha / 255 * values + 1 - alpha / 255)


def tiff(values: np.ndarray, *, bits: int, white_is_zero: bool = False) -> bytes:
    """A grey TIFF of whole numbers, written independently of Pillow: 16 bits are little-endian, fewer are packed."""
    packed = "".join(format(int(value), f"0{bits}b") for value in values.flat)
    strip = values.astype("<u2").tobytes() if bits == 16 else int(packed, 2).to_bytes(len(packed) // 8, "big")
    height, width = values.shape
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: int(not white_is_zero), 273: 8, 277: 1, 278: height}
    tags[279] = len(strip)
    entries = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in sorted(tags.items()))
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + len(strip)) + strip + directory


def saved(image: Image.Image, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def from_bands(mode: str, bands: np.ndarray) -> Image.Image:
    return Image.merge(mode, [Image.fromarray(band.astype(np.uint8)) for band in bands])


def with_alpha(mode: str, alpha: int) -> Image.Image:
    bands = [EIGHT] if mode == "LA" else [EIGHT, EIGHT[::-1], EIGHT.T]
    return from_bands(mode, np.stack([*bands, np.full((4, 4), alpha)]))


def in_palette(**options: Any) -> bytes:
    """The ramp in colours of a palette of which some let others through."""
    image = Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4))
    image.putpalette([int(value) for value in EIGHT.flat for _ in range(3)])
    return saved(image, "PNG", **options)


COLOURS = np.stack([EIGHT, EIGHT[::-1], EIGHT.T]) / 255
SIXTEENS = SIXTEEN.astype("<u2")
PALETTE_ALPHA = bytes([0, HALF, *[255] * 14])
SEE_THROUGH = np.array([0, HALF, *[255] * 14]).reshape(4, 4) / 255

# {what the file holds: (its suffix, the file, its channels from 0 to 1, half a step of the file's numbers)}
CONTENTS: dict[str, tuple[str, bytes, np.ndarray, float]] = {
    "8 bits": ("png", saved(Image.fromarray(EIGHT.astype(np.uint8)), "PNG"), grey(EIGHT / 255), 0),
    "8 bits of colour": ("png", saved(from_bands("RGB", COLOURS * 255), "PNG"), COLOURS, 0),
    "1 bit": ("png", saved(Image.fromarray(EIGHT > 99), "PNG"), grey(EIGHT > 99), 0),
    "16 bits in a PNG": ("png", saved(Image.fromarray(SIXTEENS), "PNG"), grey(SIXTEEN / 65_535), 0),
    "16 bits in a TIFF": ("tif", saved(Image.fromarray(SIXTEENS), "TIFF"), grey(SIXTEEN / 65_535), 0),
    "16 bits, other end first": (
        "tiff", saved(Image.fromarray(SIXTEEN.astype(">u2")), "TIFF"), grey(SIXTEEN / 65_535), 0,
    ),
    "16 bits in a PGM": ("pgm", saved(Image.fromarray(SIXTEENS), "PPM"), grey(SIXTEEN / 65_535), 0),
    "12 bits in 16, PNG": ("png", saved(Image.fromarray(TWELVE.astype("<u2")), "PNG"), grey(TWELVE / 65_535), 0),
    "12 bits in 16, TIFF": ("tif", saved(Image.fromarray(TWELVE.astype("<u2")), "TIFF"), grey(TWELVE / 65_535), 0),
    "12 bits, said so": ("tif", tiff(TWELVE, bits=12), grey(TWELVE / 4_095), 0.5 / 65_535),
    "16 bits, white is zero": ("tif", tiff(SIXTEEN, bits=16, white_is_zero=True), grey(1 - SIXTEEN / 65_535), 0),
    "opaque": ("png", saved(with_alpha("RGBA", 255), "PNG"), COLOURS, 0),
    "half transparent": (
        "png", saved(with_alpha("RGBA", HALF), "PNG"), HALF / 255 * COLOURS + 1 - HALF / 255, 0.5 / 255,
    ),
    "wholly transparent": ("webp", saved(with_alpha("RGBA", 0), "WEBP", lossless=True), grey(np.ones((4, 4))), 0),
    "half transparent grey": ("png", saved(with_alpha("LA", HALF), "PNG"), on_white(EIGHT / 255, HALF), 0.5 / 255),
    "palette": ("png", in_palette(), grey(EIGHT / 255), 0),
    "palette with one transparent colour": (
        "png", in_palette(transparency=3), grey(np.where(np.arange(16).reshape(4, 4) == 3, 1, EIGHT / 255)), 0,
    ),
    "palette with half transparent colours": (
        "png", in_palette(transparency=PALETTE_ALPHA), grey(SEE_THROUGH * EIGHT / 255 + 1 - SEE_THROUGH), 0.5 / 255,
    ),
    "a transparent grey": (
        "png", saved(Image.fromarray(EIGHT.astype(np.uint8)), "PNG", transparency=17),
        grey(np.where(EIGHT == 17, 1, EIGHT / 255)), 0,
    ),
    "a transparent grey of 16 bits": (
        "png", saved(Image.fromarray(SIXTEENS), "PNG", transparency=4_369),
        grey(np.where(SIXTEEN == 4_369, 1, SIXTEEN / 65_535)), 0,
    ),
    "a transparent colour": (
        "png", saved(from_bands("RGB", np.stack([EIGHT] * 3)), "PNG", transparency=(17, 17, 17)),
        grey(np.where(EIGHT == 17, 1, EIGHT / 255)), 0,
    ),
}  # fmt: skip


def write_contents(folder: Path, files: dict[str, bytes]) -> None:
    """Training records of these names and contents; the test records are one plain image."""
    for split in ("train", "test"):
        (folder / split / "x").mkdir(parents=True)
    for name, content in files.items():
        (folder / "train" / "x" / name).write_bytes(content)
    Image.new("L", (4, 4)).save(folder / "test" / "x" / "0.png")
    for split in ("train", "test"):
        (folder / split / "y").mkdir()


def assert_pixels_are_those_of_the_file(what: str, folder: Path, read: Callable[[Path], Split]) -> None:
    suffix, content, expected, half_step = CONTENTS[what]
    write_contents(folder, {f"0.{suffix}": content})
    train = read(folder)
    assert train.pixels.dtype == torch.uint16 and train.full_scale == 65_535 and bool(train.readable.all())
    assert np.abs(train.pixels[0].numpy() / 65_535 - expected).max() <= half_step + 1e-9


@pytest.mark.parametrize("what", CONTENTS)
def test_pixels_are_those_of_the_file(what: str, tmp_path: Path) -> None:
    assert_pixels_are_those_of_the_file(what, tmp_path, lambda folder: load_folder(folder).train)


@pytest.mark.parametrize(
    "what",
    ["16 bits in a PNG", "16 bits in a TIFF", "16 bits in a PGM", "12 bits in 16, PNG", "12 bits, said so",
     "16 bits, white is zero", "half transparent", "wholly transparent", "half transparent grey",
     "palette with one transparent colour", "palette with half transparent colours", "a transparent grey",
     "a transparent grey of 16 bits", "a transparent colour"],
)  # fmt: skip
def test_a_plain_conversion_to_rgb_would_be_noticed(what: str, tmp_path: Path) -> None:
    def converted(image: Image.Image, size: int) -> Tensor:
        resized = image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(resized).astype(np.uint16) * 257).permute(2, 0, 1)

    with pytest.raises(AssertionError):
        assert_pixels_are_those_of_the_file(
            what, tmp_path, lambda folder: image_folder(folder, 4, to_pixels=converted)[0]
        )


def test_16_bits_are_kept_when_an_image_is_resized(tmp_path: Path) -> None:
    ramp = np.linspace(300, 41_000, 64).reshape(1, 64).repeat(8, 0).round()
    images = {"0.png": Image.fromarray(ramp.astype("<u2")), "1.png": Image.fromarray((ramp / 257).astype(np.uint8))}
    write_contents(tmp_path, {name: saved(image, "PNG") for name, image in images.items()})
    fine, coarse = load_folder(tmp_path).train.pixels.double()
    expected = np.asarray(Image.fromarray(ramp.astype(np.float32)).resize((4, 4), Image.Resampling.BILINEAR))
    assert np.abs(fine.numpy() - expected).max() <= 0.5
    assert (coarse.numpy() % 257 == 0).all() and np.abs(coarse.numpy() - expected).max() < 257


@pytest.mark.parametrize(
    "image",
    [Image.fromarray((EIGHT / 255).astype(np.float32)), Image.fromarray(SIXTEEN.astype(np.int32))],
    ids=["floats", "32 bits"],
)
def test_numbers_that_do_not_say_which_is_white_are_records_of_nan(image: Image.Image, tmp_path: Path) -> None:
    write_contents(tmp_path, {"0.png": CONTENTS["8 bits"][1], "1.tif": saved(image, "TIFF")})
    assert_record_is_nan_and_no_other(load_folder(tmp_path).train, 1)
    (tmp_path / "train" / "x" / "0.png").unlink()
    with pytest.raises(DataError, match="to hold at least one readable image"):
        load_folder(tmp_path)


def test_what_is_stored_does_not_depend_on_what_the_files_hold(tmp_path: Path) -> None:
    for folder, what in (("a", "8 bits"), ("b", "16 bits in a PNG")):
        write_contents(tmp_path / folder, {"0.png": CONTENTS[what][1]})
    first, second = (load_folder(tmp_path / folder).train for folder in "ab")
    assert (first.pixels.dtype, first.full_scale) == (second.pixels.dtype, second.full_scale)


# Records that cannot be read.


def assert_record_is_nan_and_no_other(split: Split, record: int) -> None:
    inputs, _ = split.batch(torch.arange(len(split)))
    is_nan = inputs.isnan().flatten(1)
    assert is_nan[record].all() and is_nan.sum() == is_nan[record].numel()
    assert split[record][0].isnan().all() and split.readable.logical_not().nonzero().flatten().tolist() == [record]


@pytest.mark.parametrize(
    "damage", [lambda whole: b"", lambda whole: b"no image", lambda whole: whole[: len(whole) // 2]]
)
def test_a_broken_image_is_a_record_of_nan_and_nothing_is_said(
    damage: Callable[[bytes], bytes], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    broken = write_folder(tmp_path) / "train" / "dog" / "1.png"
    broken.write_bytes(damage(broken.read_bytes()))
    train = load_folder(tmp_path).train
    assert_record_is_nan_and_no_other(train, 4)
    assert len(train) == 6 and train.targets.tolist() == [0, 0, 0, 1, 1, 1]
    assert capfd.readouterr() == ("", "")


def test_a_broken_image_that_reads_as_black_would_be_noticed(tmp_path: Path) -> None:
    (write_folder(tmp_path) / "train" / "dog" / "1.png").write_bytes(b"")
    train = load_folder(tmp_path).train
    with pytest.raises(AssertionError):
        assert_record_is_nan_and_no_other(Split(train.pixels, train.targets), 4)


def test_an_image_too_large_to_be_honest_is_a_record_of_nan(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_folder(tmp_path)
    Image.new("L", (40, 40)).save(tmp_path / "train" / "cat" / "2.png")
    Image.new("L", (30, 30)).save(tmp_path / "train" / "cat" / "1.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 600)  # Pillow warns above it and refuses above twice as many
    assert_record_is_nan_and_no_other(load_folder(tmp_path).train, 2)


def test_other_files_and_hidden_files_are_no_records(tmp_path: Path) -> None:
    write_folder(tmp_path)
    for name in ("notes.txt", "._0.png", ".hidden.png"):
        (tmp_path / "train" / "cat" / name).write_bytes(b"")
    (tmp_path / "train" / ".cache").mkdir()
    (tmp_path / "train" / "cat" / "folder.png").mkdir()
    assert load_folder(tmp_path).train.targets.tolist() == [0, 0, 0, 1, 1, 1]


def test_a_class_without_images_keeps_its_number(tmp_path: Path) -> None:
    write_folder(tmp_path)
    for split in ("train", "test"):
        (tmp_path / split / "bird").mkdir()
    found = load_folder(tmp_path)
    assert found.class_names == ("bird", "cat", "dog") and found.train.targets.tolist() == [1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize("present", [(), ("train",), ("train", "test")], ids=["nothing", "no test", "no classes"])
def test_a_folder_without_splits_or_classes_is_one_error(present: tuple[str, ...], tmp_path: Path) -> None:
    for split in present:
        (tmp_path / split).mkdir()
    with pytest.raises(DataError, match="to hold train/ and test/, each with the same folders"):
        load_folder(tmp_path)


def test_classes_that_differ_between_train_and_test_are_one_error(tmp_path: Path) -> None:
    (write_folder(tmp_path) / "train" / "bird").mkdir()
    with pytest.raises(DataError, match="to hold train/ and test/, each with the same folders"):
        load_folder(tmp_path)


def test_folders_that_were_there_or_hold_a_file_stay(tmp_path: Path) -> None:
    (tmp_path / "MNIST").mkdir()
    with pytest.raises(OSError), leaving_no_folders(tmp_path, "MNIST"):
        (tmp_path / "MNIST" / "raw").mkdir()
        raise OSError
    assert [path.name for path in tmp_path.rglob("*")] == ["MNIST"]
    with pytest.raises(OSError), leaving_no_folders(tmp_path, "MNIST"):
        (tmp_path / "MNIST" / "raw").mkdir()
        (tmp_path / "MNIST" / "raw" / "part").write_bytes(b"1")
        raise OSError
    assert (tmp_path / "MNIST" / "raw" / "part").exists()


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_folder_without_a_readable_image_is_one_error(split: str, tmp_path: Path) -> None:
    for path in (write_folder(tmp_path) / split).rglob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(DataError, match="to hold at least one readable image") as raised:
        load_folder(tmp_path)
    assert "cat" not in str(raised.value).removeprefix(f"Expected {tmp_path}")


@pytest.mark.parametrize("damage", [b"", b"no image", None], ids=["empty", "another kind", "cut"])
def test_a_test_image_that_cannot_be_read_is_named_and_a_training_image_is_not(damage, tmp_path: Path) -> None:
    for split in ("train", "test"):
        folder = write_folder(tmp_path / split)
        path = max((folder / split).rglob("*.png"))
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if damage is None else damage)
        if split == "train":
            assert not bool(load_folder(folder).train.readable.all())
        else:
            with pytest.raises(DataError, match="every test image") as raised:
                load_folder(folder)
            assert str(path) in str(raised.value)
