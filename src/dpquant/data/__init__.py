# SPDX-License-Identifier: Apache-2.0
"""Records and networks by name. Knows no privacy and no quantization. Names are looked up when they are first used."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dpquant.data.dataset import Dataset, load
    from dpquant.data.sizes import public_size
    from dpquant.data.split import Split

__all__ = ["Dataset", "Split", "load", "public_size"]

_HOMES = {"Dataset": "dataset", "Split": "split", "load": "dataset", "public_size": "sizes"}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'dpquant.data' has no attribute {name!r}")
    return getattr(importlib.import_module(f"dpquant.data.{_HOMES[name]}"), name)
