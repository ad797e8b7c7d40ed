# SPDX-License-Identifier: Apache-2.0
"""Constants by which pixels are normalised, (pixel - mean) / std, one for all channels or one for each. No torch.

They are public: none is computed from records.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Self

from dpquant.data.values import number_of
from dpquant.errors import SettingError

Constant = float | tuple[float, ...]  # for all channels, or one for each


@dataclasses.dataclass(frozen=True, kw_only=True)
class Normalisation:
    """How pixels become inputs: (pixel / full scale - mean) / std, with constants that depend on no record."""

    mean: Constant
    std: Constant

    @classmethod
    def of(cls, mean: float | Sequence[float], std: float | Sequence[float]) -> Self:
        """Return the constants that a JSON file holds."""
        return cls(mean=_constant(mean), std=_constant(std))

    @property
    def fields(self) -> dict[str, float | list[float]]:
        """Return the constants as a JSON file holds them."""
        both = {"mean": self.mean, "std": self.std}
        return {name: list(one) if isinstance(one, tuple) else one for name, one in both.items()}


PLAIN = Normalisation(mean=0.5, std=0.5)
PUBLISHED = {
    "mnist": Normalisation(mean=0.1307, std=0.3081),
    "fashion-mnist": Normalisation(mean=0.2860, std=0.3530),
}
NAMED = {"imagenet": Normalisation(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))}
"""ImageNet's: of the weights that torchvision publishes, and of most others that were trained on ImageNet."""
_RULE = "imagenet, or MEAN:STD, each a number or one for each channel with commas, as 0.48,0.46,0.41:0.23,0.22,0.23"


def normalisation_of(text: str) -> Normalisation:
    """Return the constants that the setting `normalize` names.

    Raises:
      SettingError: it names none.
    """
    if text in NAMED:
        return NAMED[text]
    parts = [tuple(map(number_of, part.split(","))) for part in re.split(r"\s*:\s*", text.strip())]
    if len(parts) != 2 or len({*map(len, parts)} - {1}) > 1 or any(None in part for part in parts):
        raise SettingError(
            f"Expected normalize to be {_RULE}; got normalize={text!r}. The network expects the pixels with which it "
            "was trained. Write the constants that were published with it."
        )
    mean, std = (tuple(one for one in part if one is not None) for part in parts)
    if min(std) <= 0:
        raise SettingError(
            f"Expected standard deviations > 0 in normalize; got normalize={text!r}. Pixels are divided by them. Write "
            "MEAN:STD, for pixels in 0..1."
        )
    return Normalisation.of(mean, std)


def check_channels(found: Normalisation, channels: int, name: str) -> None:
    """Check that constants fit the channels of a data set's images.

    Raises:
      SettingError: they are for another number of channels.
    """
    given = next((len(one) for one in (found.mean, found.std) if isinstance(one, tuple)), channels)
    if given != channels:
        raise SettingError(
            f"Expected normalize with one constant, or one for each of {channels} channels, for data={name}; got "
            f"{given}. Each channel has its own. Write MEAN:STD for all of them."
        )


def _constant(values: float | Sequence[float]) -> Constant:
    if isinstance(values, int | float):
        return values
    return values[0] if len(values) == 1 else tuple(values)
