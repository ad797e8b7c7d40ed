# SPDX-License-Identifier: Apache-2.0
"""`model.json`: what is needed to use a run's model beside its parameters. This module loads no torch.

Everything in it is public: settings, the names of the classes, the shape of an input, constants of normalisation, the
spec of a table, the tokenizer's name, and the architecture of a pretrained network. It names no folder but that of a
pretrained network, which is not needed again: its architecture is here, and its weights are in the model's file.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal, Self

from dpquant.errors import DataError
from dpquant.runs.record import write_whole

DESCRIPTION_SCHEMA = 3
"""Version of the format of model.json. Raise it with every change of a field, and keep reading the earlier ones."""

Kind = Literal["images", "rows", "texts"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Normalisation:
    """How pixels become inputs: mean and std as of `dpquant.data.normalisation.Normalisation`."""

    mean: float | list[float]
    std: float | list[float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskForm:
    """What is told from a record: kind, prior, low and high as of `dpquant.data.task.Task`."""

    kind: Literal["classification", "rare positives", "regression"] = "classification"
    prior: float | None = None
    low: float = -1.0
    high: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableForm:
    """How a row of a table becomes an input.

    Attributes:
      spec: text of the table's spec, a TOML file.
      label_column: name of the column that is predicted, which a row need not have. None: not recorded.
      columns: what the numbers of an input are, in their order.
    """

    spec: str
    label_column: str | None
    columns: list[str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextForm:
    """How a text becomes an input.

    Attributes:
      tokenizer_sha256: of the tokenizer's file, of which the run directory has a copy.
      max_length: number of tokens at which a text is cut.
      buckets: lengths to which texts are padded.
      padding, vocabulary: the token that pads, and the number of tokens.
      pairs: whether a record is a pair of texts.
      text_columns, label_column: of a file of records. None: not recorded.
      left_out: label by which a public rule leaves records out of a file; None: there is no such rule.
    """

    tokenizer_sha256: str
    max_length: int
    buckets: list[int]
    padding: int
    vocabulary: int
    pairs: bool
    text_columns: list[str] | None
    label_column: str | None
    left_out: str | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelDescription:
    """What is needed to build a run's model and to give it inputs.

    Attributes:
      schema: version of the format, the first field in the file.
      model, width, fix: as in the settings.
      parameters: number of trainable numbers.
      num_classes: outputs of the model, one logit a class; 1 for a regression.
      class_names: in the order of the outputs; [] for a regression.
      input_shape: of one input, without the axis of examples.
      image_size: side in pixels that images are resized to; None: they are taken as they are.
      normalisation: of pixels in 0..1, one constant for all channels or, from schema 3 on, one for each; None where
        inputs are no images.
      kind: of the inputs. It and all fields after it are not in a file of schema 1.
      task: what is told from a record.
      categories: of a table: numbers of codes of its last columns.
      lora: rank of the adapters of a pretrained network; None: it has none.
      network: configuration of a pretrained network, by which transformers builds it; None: it is another model.
      table, texts: how a row or a text becomes an input.
    """

    schema: int = dataclasses.field(default=DESCRIPTION_SCHEMA, init=False)
    model: str
    width: float
    fix: bool
    parameters: int
    num_classes: int
    class_names: list[str]
    input_shape: list[int]
    image_size: int | None
    normalisation: Normalisation | None
    kind: Kind = "images"
    task: TaskForm = dataclasses.field(default_factory=TaskForm)
    categories: list[int] = dataclasses.field(default_factory=list)
    lora: int | None = None
    network: dict[str, Any] | None = None
    table: TableForm | None = None
    texts: TextForm | None = None

    def to_json(self) -> str:
        """Return the description as JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    def write(self, path: Path) -> None:
        """Write the description to a file, completely or not at all."""
        write_whole(path, self.to_json())

    @classmethod
    def read(cls, path: Path) -> Self:
        """Return the description in a file, of this schema or an earlier one.

        Schema 1 does not say what is told from a record, nor how rows and texts become inputs: its images have the
        fields that they need, and `kind` of the others follows from their shape.

        Raises:
          DataError: the file cannot be read, holds no description, or one of a newer schema.
        """
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            schema = fields.pop("schema")
            if schema not in range(1, DESCRIPTION_SCHEMA + 1):
                raise ValueError(f"schema {schema}")
            if schema == 1 and fields["normalisation"] is None:
                fields["kind"] = "rows"
            parts = {"normalisation": Normalisation, "task": TaskForm, "table": TableForm, "texts": TextForm}
            for name, part in parts.items():
                if fields.get(name) is not None:
                    fields[name] = part(**fields[name])
            return cls(**fields)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(
                f"Expected {path} to describe a run's model; got {type(error).__name__}: {error}. It was changed, or "
                "written by another version. Restore it from a copy, or read it with the version that wrote it."
            ) from error
