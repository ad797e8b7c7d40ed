# SPDX-License-Identifier: Apache-2.0
"""Names of the networks that dpquant builds. Loads no torch, so that a budget for no network is refused at once."""

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
