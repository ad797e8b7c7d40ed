# SPDX-License-Identifier: Apache-2.0
"""The form of the records for which a model is checked: shapes and numbers of classes and of tokens, all public."""

import dataclasses
import re
from collections.abc import Iterator
from typing import Self

import torch
from torch import Tensor
from torch.utils.data import default_collate

from dpquant.checks.synthetic import Specimens, candidates, from_examples
from dpquant.data import dataset as data
from dpquant.data.manifest import Manifest, folder_of
from dpquant.data.sizes import PACKED_PREFIX
from dpquant.errors import SettingError

_CPU = torch.device("cpu")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Form:
    """The public form of the records that a model is given.

    Attributes:
      input_shape: of one input: (C, H, W), (columns,), or (tokens,).
      num_classes: number of classes, >= 2.
      vocabulary: number of different tokens, >= 2; None: inputs are float32.
    Raises:
      SettingError: a number is too small.
    """

    input_shape: tuple[int, ...]
    num_classes: int
    vocabulary: int | None = None

    def __post_init__(self) -> None:
        least = {"classes": (self.num_classes, 2), "vocabulary": (self.vocabulary, 2)}
        least |= {"input_shape": (min(self.input_shape), 1)}
        for name, (value, smallest) in least.items():
            if value is not None and value < smallest:
                raise SettingError(f"Expected {name} >= {smallest}; got {value}. The model is tried on such inputs.")

    @classmethod
    def chosen(
        cls,
        data_set: str | None,
        image_size: int | None,
        input_shape: str | None,
        classes: int | None,
        tokens: int | None,
        vocabulary: int | None,
    ) -> Self:
        """Return the form that options name.

        Args:
          data_set: its name; None: the shape is given.
          image_size: side that its images are resized to.
          input_shape: sizes with x between them, as 3x32x32.
          classes: number of classes; None with a data set.
          tokens: length of a text, instead of input_shape.
          vocabulary: number of different tokens.
        Raises:
          SettingError: options are missing, contradict each other or cannot be read.
          DataError: the data set is unknown.
        """
        if sum(one is not None for one in (data_set, input_shape, tokens)) != 1:
            raise SettingError(
                "Expected one of data, input_shape and tokens; got none or several. It says what the model is given. "
                "Give --data NAME, --input-shape 3x32x32 --classes 10, or --tokens 128 --vocabulary 30522 --classes 2."
            )
        if data_set is not None:
            if classes is not None:
                raise SettingError(
                    f"Expected no classes with data; got classes={classes}. The data set has its own. Leave it out."
                )
            if data_set.startswith(PACKED_PREFIX):
                return cls._packed(data_set, image_size)
            shape, num_classes = data.form_of(data_set, image_size=image_size)
            return cls(input_shape=shape, num_classes=num_classes)
        if image_size is not None:
            raise SettingError(
                f"Expected image_size with data; got image_size={image_size} without. Sizes are in the input shape. "
                "Leave it out."
            )
        if classes is None or (tokens is None) != (vocabulary is None):
            raise SettingError(
                f"Expected classes with input_shape, and classes and vocabulary with tokens; got classes={classes}, "
                f"vocabulary={vocabulary}. They say what the model is given. Give them all."
            )
        if input_shape is None:
            assert tokens is not None
            return cls(input_shape=(tokens,), num_classes=classes, vocabulary=vocabulary)
        if not re.fullmatch(r"\d{1,9}(x\d{1,9})*", input_shape):
            raise SettingError(
                f"Expected input_shape to be sizes with x between them, as 3x32x32 or 30; got {input_shape!r}."
            )
        return cls(input_shape=tuple(map(int, input_shape.split("x"))), num_classes=classes)

    @classmethod
    def _packed(cls, data_set: str, image_size: int | None) -> Self:
        """Return the form in the manifest of packed records."""
        if image_size is not None:
            raise SettingError(
                f"Expected no image_size with packed records; got image_size={image_size}. They have the size with "
                "which they were packed. Leave it out."
            )
        manifest = Manifest.read(folder_of(data_set))
        return cls(input_shape=manifest.input_shape, num_classes=manifest.num_classes, vocabulary=manifest.vocabulary)

    def blank(self, count: int) -> Tensor:
        """Return `count` inputs of zeros, float32 or tokens."""
        return torch.zeros(count, *self.input_shape, dtype=torch.float32 if self.vocabulary is None else torch.int64)

    def specimens(self) -> Iterator[Specimens]:
        """Yield synthetic records of several kinds; texts first with tokens of the whole vocabulary."""
        if self.vocabulary is not None:
            generator = torch.Generator().manual_seed(0)
            texts = torch.randint(self.vocabulary, (3, *self.input_shape), generator=generator)
            texts[:, 0] = torch.arange(3) % self.vocabulary
            labels = torch.arange(3) % self.num_classes
            yield from_examples(list(zip(texts, labels, strict=True)), default_collate, _CPU)
        yield from candidates([(self.blank(1)[0], torch.tensor(0))], default_collate, _CPU)
