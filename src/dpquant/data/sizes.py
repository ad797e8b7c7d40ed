# SPDX-License-Identifier: Apache-2.0
"""How many training records each published data set has, and whether the folder of its files is there.

Loads no torch, so that a budget can be planned at once.
"""

from pathlib import Path
from types import MappingProxyType

from dpquant.errors import DataError, did_you_mean

# a user's own files
FOLDER_PREFIX, TABLE_PREFIX, TEXT_PREFIX, PACKED_PREFIX = OWN_PREFIXES = (
    "image-folder:",
    "table:",
    "text:",
    "packed:",
)

FOLDER_IMAGE_SIZE = 32  # side of images that differ in size, where none is given
HF_PREFIX = "hf:"  # of a model's name: a pretrained network, in a folder of this machine

# The number of training records of each known data set, as published.
PUBLIC_SIZES = MappingProxyType(
    {
        "digits": 1_442,
        "mnist": 60_000,
        "fashion-mnist": 60_000,
        "emnist": 112_800,
        "emnist-letters": 124_800,
        "cifar10": 50_000,
        "gtsrb": 26_640,
    }
)
_ALSO = MappingProxyType({"cifar": "cifar10", "fashion": "fashion-mnist", "signs": "gtsrb"})


def public_size(name: str) -> int | None:
    """Return the published number of training records, or None for a user's own files, without touching any data.

    Args:
      name: As for `dataset.load`.
    Raises: DataError: the name is unknown.
    """
    if name.startswith(OWN_PREFIXES):
        return None
    if name not in PUBLIC_SIZES:
        raise DataError(
            f"Expected data to be one of {', '.join(PUBLIC_SIZES)}, {FOLDER_PREFIX}PATH, {TABLE_PREFIX}FILE, "
            f"{TEXT_PREFIX}FILE or {PACKED_PREFIX}PATH; got data={name}. {did_you_mean(name, PUBLIC_SIZES, _ALSO)}For "
            f"images of your own, give {FOLDER_PREFIX}PATH with PATH/train/CLASS/* and PATH/test/CLASS/*."
        )
    return PUBLIC_SIZES[name]


def check_data_dir(name: str, folder: Path) -> None:
    """Check that there is a folder in which the files of a published data set are looked for.

    Args:
      name: Of the data set.
      folder: That was named.
    Raises: DataError: there is none.
    """
    if not folder.is_dir():
        found = "a file" if folder.exists() else "not there"
        raise DataError(
            f"Expected data_dir to be a folder; got data_dir={folder}, which is {found}. The files of data={name} are "
            "looked for in it, and downloaded to it. Make it, or leave it out."
        )
