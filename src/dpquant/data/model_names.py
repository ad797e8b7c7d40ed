# SPDX-License-Identifier: Apache-2.0
"""Names of networks: dpquant's own, a user's function, or a pretrained one.

Loads no torch, so that a budget for no network is refused at once.
"""

import importlib.machinery
import importlib.util
import sys
from pathlib import Path

from dpquant.data.sizes import HF_PREFIX
from dpquant.errors import ModelError, did_you_mean

NAMES = (
    *("cnn", "lenet", "resnet18", "resnet18-cifar", "resnet50", "densenet121"),
    *("mlp", "tabular-resnet", "embedding-mean"),
)


def check_name(name: str) -> None:
    """Check that a name is that of a network, of a pretrained one's folder, or of a user's own function.

    Raises:
      ModelError: it is not.
    """
    if name not in NAMES and not name.startswith(HF_PREFIX) and ":" not in name:
        raise unknown(name)


def unknown(name: str) -> ModelError:
    """Return the error for a name of no network."""
    return ModelError(
        f"Expected model to be one of {', '.join(NAMES)}, or module:function; got model={name}. "
        f"{did_you_mean(name, NAMES)}For a model of your own, name the function that builds it, as in my_models:build."
    )


def pretrained_folder(name: str) -> Path:
    """Return the folder that `hf:PATH` names.

    Raises: ModelError: it holds no network.
    """
    folder = Path(name.removeprefix(HF_PREFIX)).expanduser()
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"Expected model=hf:PATH to name a folder with config.json and weights; got model={name}. Networks are "
            "read from this machine alone. Save one there by save_pretrained(FOLDER) of transformers."
        )
    return folder


def check_module(name: str, folder: Path | None = None) -> None:
    """Check that `module:function` names a module and not its file.

    Args:
      name: of the function.
      folder: of the user's modules: the module, or the package that it is in, is looked for there and on Python's
        path, and not imported. None: it is not looked for.
    Raises:
      ModelError: it names a file, or there is no such module.
    """
    module_name, _, function_name = name.partition(":")
    if "/" in module_name or module_name.endswith(".py"):
        stem = module_name.removesuffix(".py").strip("./").replace("/", ".")
        raise ModelError(
            f"Expected model=module:function; got model={name}, with a file instead of a module. Did you mean "
            f"{stem}:{function_name}? Modules are imported from the working directory."
        )
    top = module_name.partition(".")[0]
    if folder is not None and not _is_there(top, folder):
        raise ModelError(
            f"Expected model={name} to name a function that can be imported; got no module {top}. Known names are "
            f"{', '.join(NAMES)}. Check the spelling, and that {top}.py is in the working directory or on PYTHONPATH."
        )


def _is_there(module: str, folder: Path) -> bool:
    """Return whether a module that is not inside of a package can be found. Imports nothing."""
    try:
        return (
            module in sys.modules
            or importlib.machinery.PathFinder.find_spec(module, [str(folder)]) is not None
            or importlib.util.find_spec(module) is not None
        )
    except ValueError:  # an empty name
        return False
