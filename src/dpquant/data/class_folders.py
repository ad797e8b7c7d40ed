# SPDX-License-Identifier: Apache-2.0
"""The folders of an image folder: train/CLASS and test/CLASS. Opens no file of them, and loads no torch."""

from collections.abc import Sequence
from pathlib import Path

from dpquant.data.sizes import FOLDER_PREFIX
from dpquant.errors import DataError

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})


def folder_of(name: str) -> Path:
    """Return the folder that `image-folder:PATH` names.

    Raises: DataError: it names none, or the home folder of a user who does not exist.
    """
    path = name.removeprefix(FOLDER_PREFIX)
    if not path.strip():
        raise DataError(
            f"Expected a path in data={FOLDER_PREFIX}PATH; got data={name}, without one. Give the folder that holds "
            "train/ and test/."
        )
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise DataError(
            f"Expected the folder of data={name} to be found; got {error}. Write the path without ~."
        ) from error


def classes_of(folder: Path) -> tuple[str, ...]:
    """Return the classes of an image folder: the names of the folders in train and test. Opens no file.

    Raises: DataError: there are none, or those of train and test differ.
    """
    train_names, test_names = _class_names(folder / "train"), _class_names(folder / "test")
    if problem := _problem(folder, train_names, test_names):
        raise DataError(
            f"Expected {folder} to hold train/ and test/, each with the same folders, one for each class; {problem}. "
            "A class is numbered by its folder's place."
        )
    return train_names


def _problem(folder: Path, train_names: Sequence[str], test_names: Sequence[str]) -> str:
    """Return what is wrong with an image folder, and what to do; "" if nothing is. Classes are public."""
    if not folder.exists():
        return "it is not there. Check the path"
    if not folder.is_dir():
        return "it is a file. Name the folder that holds train/ and test/"
    if missing := [name for name in ("train", "test") if not (folder / name).is_dir()]:
        flat = " Its images lie in it directly." if any(map(is_image, folder.iterdir())) else ""
        return f"{' and '.join(f'{name}/' for name in missing)} is missing.{flat} Make train/CLASS and test/CLASS"
    for names, others, here, there in (
        (train_names, test_names, "train", "test"),
        (test_names, train_names, "test", "train"),
    ):
        if not names:
            return f"{here}/ has no folder in it. Put images into {here}/CLASS"
        if lacking := [name for name in names if name not in others]:
            return f"{there}/ lacks {lacking[0]}, which {here}/ has. Add the folder: it may be empty"
    if len(train_names) == 1:
        return f"{train_names[0]} is the only one. There is nothing to tell it from. Add the folder of another class"
    return ""


def _class_names(folder: Path) -> tuple[str, ...]:
    """Return the sorted names of the visible folders inside; () if the folder does not exist."""
    if not folder.is_dir():
        return ()
    return tuple(sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")))


def is_image(path: Path) -> bool:
    """Whether a file has the suffix of an image and is not hidden (macOS leaves hidden files beside images)."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()
