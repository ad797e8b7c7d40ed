# SPDX-License-Identifier: Apache-2.0
"""Loads the data set that a run's settings describe: images by name, tables and texts from files."""

from pathlib import Path

from dpquant.data import dataset as data
from dpquant.data.folders import Store, in_memory
from dpquant.data.form import Form
from dpquant.data.manifest import folder_of
from dpquant.data.normalisation import Normalisation, normalisation_of
from dpquant.data.sizes import PACKED_PREFIX, TABLE_PREFIX, TEXT_PREFIX
from dpquant.data.spec import Spec
from dpquant.data.tables import TableSource, load_table
from dpquant.data.texts import Tokens, form_of_texts, load_texts
from dpquant.runs.named import file_of, label_of, spec_of, test_of, text_source
from dpquant.runs.settings import TrainSettings


def dataset_of(settings: TrainSettings, store: Store = in_memory) -> data.Dataset:
    """Load a run's data set into memory, or open it if it is packed.

    Args:
      settings: of the run.
      store: gives the place of an image folder's pixels.
    Raises:
      DataError: it is unknown, missing or malformed, or what has to be said of it is not.
      SettingError: a setting that it needs is missing.
    Privacy: per example; which error is raised does not depend on a single training record.
    """
    if settings.data.startswith(TABLE_PREFIX):
        return _table(settings)
    if settings.data.startswith(TEXT_PREFIX):
        return _texts(settings)
    if settings.data.startswith(PACKED_PREFIX):
        from dpquant.data.packed import load_packed

        return load_packed(settings.data, folder_of(settings.data))
    data_dir = Path(settings.data_dir) if settings.data_dir is not None else None
    normalisation = _normalisation(settings)
    return data.load(settings.data, data_dir, image_size=settings.image_size, normalisation=normalisation, store=store)


def form_of(settings: TrainSettings) -> Form:
    """Return the form of a run's records, from what is public: names, folders of classes, spec, tokenizer, manifest.

    Opens no record. Of a published data set the form is the one that it is known for.

    Raises: as `dataset_of`, for all that is not in the records.
    """
    if settings.data.startswith(TABLE_PREFIX):
        return _table_form(spec_of(settings))
    if settings.data.startswith(TEXT_PREFIX):
        source = text_source(settings)
        return form_of_texts(source, Tokens.read(source.tokenizer, source.max_length))
    if settings.data.startswith(PACKED_PREFIX):
        from dpquant.data.packed import packed_form

        return packed_form(folder_of(settings.data))
    return data.form_of(settings.data, image_size=settings.image_size, normalisation=_normalisation(settings))


def _normalisation(settings: TrainSettings) -> Normalisation | None:
    return None if settings.normalize is None else normalisation_of(settings.normalize)


def _table_form(spec: Spec) -> Form:
    from dpquant.data.rows import synthetic_rows

    return Form(
        num_classes=len(spec.classes) or 1,
        input_shape=(spec.width,),
        class_names=spec.classes,
        task=spec.task,
        categories=tuple(category.size for category in spec.categories.values()),
        synthetic=synthetic_rows(spec),
    )


def _table(settings: TrainSettings) -> data.Dataset:
    path = file_of(settings, TABLE_PREFIX)
    label = label_of(settings)
    spec, test = spec_of(settings), test_of(settings)
    source = TableSource(path=path, label=label, spec=spec, test=test, test_share=settings.test_share)
    train, test = load_table(source)
    return data.Dataset(
        **vars(_table_form(spec)),
        name=settings.data,
        train=train,
        test=test,
        public_size=None,
        facts={"task": spec.task.kind, "spec": spec.text, "label_column": label},
    )


def _texts(settings: TrainSettings) -> data.Dataset:
    source = text_source(settings)
    test_of(settings)
    train, test, tokens = load_texts(source)
    return data.Dataset(
        **vars(form_of_texts(source, tokens)),
        name=settings.data,
        train=train,
        test=test,
        public_size=None,
        facts={
            "task": "classification",
            "classes": list(source.classes),
            "left_out_by_label": source.dropped,
            "tokenizer_sha256": tokens.sha256,
            "buckets": list(tokens.buckets),
            "text_columns": list(source.texts),
            "label_column": source.label,
        },
    )
