# SPDX-License-Identifier: Apache-2.0
"""Names of the networks that dpquant builds. Loads no torch, so that a budget for no network is refused at once."""

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
