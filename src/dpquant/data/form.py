# SPDX-License-Identifier: Apache-2.0
"""The form of a data set's records: shapes, classes, categories and tokens, all public. No record is needed for it."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from dpquant.data.task import CLASSIFICATION, Task
from dpquant.errors import SettingError


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Form:
    """The public form of the records that a model is given.

    Attributes:
      input_shape: (C, H, W) of every input; of a row of a table (columns,); of a text (tokens,), the largest length.
      num_classes: Targets lie in [0, num_classes). Of a regression 1: the model's outputs.
      class_names: One for each class, in the order of the targets; () for a regression, or where they are not known.
      task: What is to be told from a record.
      categories: Of a table: numbers of codes of its last columns.
      lengths: Of texts: those that they are padded to, ascending, or () if one alone is.
      vocabulary: Of texts: number of tokens; None: inputs are no texts.
      padding: Of texts: the token that pads; None: their tokenizer names none.
      tokenizer: Of texts: content of the tokenizer's file; None: not known.
      synthetic: Records in the data's domain, of which none is one of its records; None: any values are.
    Raises:
      SettingError: a number is too small.
    """

    input_shape: tuple[int, ...]
    num_classes: int
    class_names: tuple[str, ...] = ()
    task: Task = CLASSIFICATION
    categories: tuple[int, ...] = ()
    lengths: tuple[int, ...] = ()
    vocabulary: int | None = None
    padding: int | None = None
    tokenizer: bytes | None = None
    synthetic: Sequence[Any] | None = None

    def __post_init__(self) -> None:
        fewest = 1 if self.task.kind == "regression" else 2
        least = {"classes": (self.num_classes, fewest), "vocabulary": (self.vocabulary, 2)}
        least |= {"input_shape": (min(self.input_shape), 1)}
        for name, (value, smallest) in least.items():
            if value is not None and value < smallest:
                raise SettingError(f"Expected {name} >= {smallest}; got {value}. The model is tried on such inputs.")
