# SPDX-License-Identifier: Apache-2.0
"""Describes a run's model for model.json, from settings, data set and network: public facts alone."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from dpquant.data import normalisation as constants
from dpquant.data.dataset import Dataset
from dpquant.data.pretrained import config_of
from dpquant.data.spec import Spec
from dpquant.data.split import FULL_SCALE_16
from dpquant.data.task import Task
from dpquant.errors import DataError
from dpquant.runs.description import Kind, ModelDescription, Normalisation, TableForm, TaskForm, TextForm
from dpquant.runs.settings import TrainSettings


def description_of(settings: TrainSettings, dataset: Dataset, model: nn.Module) -> ModelDescription:
    """Return the description of a run's model. Privacy: public facts."""
    kind = _kind(dataset)
    return ModelDescription(
        model=settings.model,
        width=settings.width,
        fix=settings.fix,
        parameters=sum(one.numel() for one in model.parameters() if one.requires_grad),
        num_classes=dataset.num_classes,
        class_names=list(dataset.class_names),
        input_shape=list(dataset.input_shape),
        image_size=_side(settings, dataset),
        normalisation=_normalisation(dataset),
        kind=kind,
        task=TaskForm(**dataclasses.asdict(dataset.task)),
        categories=list(dataset.categories),
        lora=settings.lora,
        network=config_of(model),
        table=_table_form(dataset) if kind == "rows" else None,
        texts=_text_form(dataset) if kind == "texts" else None,
    )


def task_of(description: ModelDescription) -> Task:
    """Return the task of a described model."""
    return Task(**dataclasses.asdict(description.task))


def _kind(dataset: Dataset) -> Kind:
    if dataset.vocabulary is not None:
        return "texts"
    return "images" if len(dataset.input_shape) == 3 else "rows"


def _normalisation(dataset: Dataset) -> Normalisation | None:
    found = getattr(dataset.train, "normalisation", None)  # images alone have it
    return None if found is None else Normalisation(**found.fields)


def normalisation_of(description: ModelDescription) -> constants.Normalisation | None:
    """Return the constants by which a described model's images are normalised."""
    found = description.normalisation
    return None if found is None else constants.Normalisation.of(found.mean, found.std)


def _side(settings: TrainSettings, dataset: Dataset) -> int | None:
    """Return the side that images were resized to, which those of files always are; None: they were not."""
    resized = settings.image_size is not None or getattr(dataset.train, "full_scale", None) == FULL_SCALE_16
    return dataset.input_shape[-1] if resized else None


def _table_form(dataset: Dataset) -> TableForm | None:
    """Return how rows are encoded; None where it is not known, as of packed rows that are no table's."""
    facts: Mapping[str, Any] = dataset.facts
    try:
        spec = Spec.of_text(facts.get("spec", ""), Path("spec"))
    except DataError:
        return None
    return TableForm(spec=spec.text, label_column=facts.get("label_column"), columns=spec.inputs)


def _text_form(dataset: Dataset) -> TextForm:
    facts: Mapping[str, Any] = dataset.facts
    inputs = {} if not dataset.synthetic else dataset.synthetic[0][0]
    assert dataset.vocabulary is not None
    return TextForm(
        tokenizer_sha256=facts.get("tokenizer_sha256", ""),
        max_length=dataset.input_shape[0],
        buckets=list(facts.get("buckets", dataset.input_shape)),
        padding=dataset.padding or 0,
        vocabulary=dataset.vocabulary,
        pairs="token_type_ids" in inputs,
        text_columns=facts.get("text_columns"),
        label_column=facts.get("label_column"),
        left_out=facts.get("left_out_by_label"),
    )
