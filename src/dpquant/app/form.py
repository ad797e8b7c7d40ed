# SPDX-License-Identifier: Apache-2.0
"""The form of the records for which a model is checked: of a data set, or of a shape that options give. All public."""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import default_collate

from dpquant.checks.synthetic import Specimens, candidates, from_examples
from dpquant.data.form import Form
from dpquant.data.pretrained import made_up_form
from dpquant.data.sizes import HF_PREFIX
from dpquant.errors import SettingError
from dpquant.runs.objects import blank_of
from dpquant.runs.settings import TrainSettings
from dpquant.runs.sources import form_of

_CPU = torch.device("cpu")
_OF_MODELS = frozenset({"width", "lora", "train_only"})
_TWO = ("0", "1")  # classes of a pretrained network, where nothing says how many


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """What options say of an input, where there is no data set.

    Attributes:
      input_shape: sizes with x between them, as 3x32x32.
      tokens: length of a text, instead of input_shape.
      vocabulary: number of different tokens.
    """

    input_shape: str | None = None
    tokens: int | None = None
    vocabulary: int | None = None


def chosen(model: str, given: Mapping[str, Any], shape: Shape) -> tuple[TrainSettings, Form]:
    """Return the settings that a model is built from, and the form of the records that it is given.

    Args:
      model: its name, as for train.
      given: settings of data and network, by name.
      shape: what stands for a data set.
    Raises:
      SettingError: options are missing, contradict each other or cannot be read.
      DataError: the data set is unknown, or its spec, tokenizer or manifest cannot be read.
    """
    if "data" in given:
        if shape != Shape():
            raise SettingError(
                "Expected one of data, input_shape and tokens; got several. It says what the model is given. Give one."
            )
        settings = TrainSettings.chosen({**given, "model": model})
        return settings, form_of(settings)
    others = {name: value for name, value in given.items() if name != "classes"}
    if foreign := sorted(others.keys() - _OF_MODELS):
        raise SettingError(
            f"Expected {foreign[0]} with data; got {foreign[0]}={given[foreign[0]]} without. It says how the records "
            "of a data set are read. Give --data, too, or leave it out."
        )
    return TrainSettings.chosen({**others, "model": model}), _of_shape(model, given.get("classes"), shape)


def _of_shape(model: str, classes: str | None, shape: Shape) -> Form:
    if classes is not None and not re.fullmatch(r"\d{1,9}", classes):
        raise SettingError(
            f"Expected a number of classes without data; got classes={classes}. Names are those of texts, with --data "
            "text:FILE. Give their number."
        )
    pretrained = model.startswith(HF_PREFIX)
    if pretrained and shape.input_shape is None:
        names = _TWO if classes is None else tuple(map(str, range(int(classes))))
        return made_up_form(model, vocabulary=shape.vocabulary, tokens=shape.tokens, class_names=names)
    if (shape.input_shape is None) == (shape.tokens is None):
        raise SettingError(
            "Expected one of data, input_shape and tokens; got none or several. It says what the model is given. "
            "Give --data NAME, --input-shape 3x32x32 --classes 10, or --tokens 128 --vocabulary 30522 --classes 2."
        )
    if classes is None or (shape.tokens is None) != (shape.vocabulary is None):
        raise SettingError(
            f"Expected classes with input_shape, and classes and vocabulary with tokens; got classes={classes}, "
            f"vocabulary={shape.vocabulary}. They say what the model is given. Give them all."
        )
    if shape.input_shape is None:
        assert shape.tokens is not None
        return Form(input_shape=(shape.tokens,), num_classes=int(classes), vocabulary=shape.vocabulary)
    if not re.fullmatch(r"\d{1,9}(x\d{1,9})*", shape.input_shape):
        raise SettingError(
            f"Expected input_shape to be sizes with x between them, as 3x32x32 or 30; got {shape.input_shape!r}."
        )
    return Form(input_shape=tuple(map(int, shape.input_shape.split("x"))), num_classes=int(classes))


def specimens_of(form: Form) -> Iterator[Specimens]:
    """Yield synthetic records of a form: those that it has, as a run takes them, or of several kinds.

    Texts without any come first with tokens of the whole vocabulary.
    """
    if form.synthetic is not None:
        yield from_examples(list(form.synthetic), default_collate, _CPU)
        return
    if form.vocabulary is not None:
        generator = torch.Generator().manual_seed(0)
        texts = torch.randint(form.vocabulary, (3, *form.input_shape), generator=generator)
        texts[:, 0] = torch.arange(3) % form.vocabulary
        labels = torch.arange(3) % form.num_classes
        yield from_examples(list(zip(texts, labels, strict=True)), default_collate, _CPU)
    yield from candidates([(blank_of(form, 1)[0], torch.tensor(0))], default_collate, _CPU)
