# SPDX-License-Identifier: Apache-2.0
"""`model.json`: what is needed to use a run's model beside its parameters. This module loads no torch.

Everything in it is public: settings, the names of the classes, the shape of an input, and constants of normalisation.
"""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Self

from dpquant.errors import DataError
from dpquant.runs.record import write_whole

if TYPE_CHECKING:
    from dpquant.data.dataset import Dataset
    from dpquant.runs.settings import TrainSettings

DESCRIPTION_SCHEMA = 1
"""Version of the format of model.json. Raise it with every change of a field, and keep reading the earlier ones."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Normalisation:
    """How pixels become inputs: (pixel / full scale - mean) / std, with constants that depend on no record."""

    mean: float
    std: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelDescription:
    """What is needed to build a run's model and to give it inputs.

    Attributes:
      schema: version of the format, the first field in the file.
      model, width, fix: as in the settings.
      parameters: number of trainable numbers.
      num_classes: outputs of the model, one logit a class.
      class_names: in the order of the outputs.
      input_shape: of one input, without the axis of examples.
      image_size: side in pixels that images are resized to; None: as they are.
      normalisation: of pixels in 0..1; None where inputs are no images.
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

    @classmethod
    def of(cls, settings: "TrainSettings", dataset: "Dataset", parameters: int) -> Self:
        """Return the description of a run's model. Privacy: public facts."""
        mean, std = (getattr(dataset.train, name, None) for name in ("mean", "std"))  # images alone have them
        return cls(
            model=settings.model,
            width=settings.width,
            fix=settings.fix,
            parameters=parameters,
            num_classes=dataset.num_classes,
            class_names=list(dataset.class_names),
            input_shape=list(dataset.input_shape),
            image_size=settings.image_size,
            normalisation=None if mean is None or std is None else Normalisation(mean=mean, std=std),
        )

    def to_json(self) -> str:
        """Return the description as JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    def write(self, path: Path) -> None:
        """Write the description to a file, completely or not at all."""
        write_whole(path, self.to_json())

    @classmethod
    def read(cls, path: Path) -> Self:
        """Return the description in a file.

        Raises:
          DataError: the file cannot be read, holds no description, or one of a newer schema.
        """
        try:
            fields = json.loads(path.read_text())
            if (schema := fields.pop("schema")) != DESCRIPTION_SCHEMA:
                raise ValueError(f"schema {schema}")
            if fields["normalisation"] is not None:
                fields["normalisation"] = Normalisation(**fields["normalisation"])
            return cls(**fields)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(
                f"Expected {path} to describe a run's model; got {type(error).__name__}: {error}. It was changed, or "
                "written by another version. Restore it from a copy, or read it with the version that wrote it."
            ) from error
