# SPDX-License-Identifier: Apache-2.0
"""Loads the test records on which a run's model is evaluated: its own, or others of the same form.

Where test records are not protected, the first one that cannot be used is named, as in a training run. Where they are,
no error depends on a single record.
"""

from pathlib import Path

from dpquant.data import dataset as data
from dpquant.data.class_folders import folder_of as image_folder_of
from dpquant.data.held import Held
from dpquant.data.image_file import read_folder
from dpquant.data.manifest import folder_of as packed_folder_of
from dpquant.data.sizes import FOLDER_PREFIX, OWN_PREFIXES, PACKED_PREFIX, TABLE_PREFIX, TEXT_PREFIX
from dpquant.data.spec import Spec
from dpquant.data.tables import rows_of
from dpquant.data.texts import TextSource, texts_of
from dpquant.errors import DataError
from dpquant.runs.describing import normalisation_of, task_of
from dpquant.runs.description import ModelDescription
from dpquant.runs.inputs import tokens_of
from dpquant.runs.names import DESCRIPTION, TOKENIZER
from dpquant.runs.settings import TrainSettings
from dpquant.runs.sources import dataset_of


def source_of(settings: TrainSettings, name: str | None) -> str:
    """Return what holds the test records: what is named, or of the run's own the file of test records, or the data."""
    kind = next((prefix for prefix in (TABLE_PREFIX, TEXT_PREFIX) if settings.data.startswith(prefix)), "")
    return name or (settings.data if settings.test is None else f"{kind}{settings.test}")


def held_out(
    run: Path, settings: TrainSettings, description: ModelDescription, name: str | None, *, strict: bool
) -> Held:
    """Load test records.

    Args:
      run: directory of the run.
      settings: of the run.
      description: of its model.
      name: `table:FILE` or `text:FILE` with test records, `image-folder:PATH` with folders named after classes, in
        PATH or PATH/test, `packed:PATH` or a known data set, of which the test records are taken. None: the run's own.
      strict: name the first record that cannot be used, and refuse records of which none can.
    Raises:
      DataError: they cannot be read, or are not of the model's form.
    Privacy: per example.
    """
    data_name = source_of(settings, name)
    kind = next((prefix for prefix in OWN_PREFIXES if data_name.startswith(prefix)), None)
    if name is None and kind in (TABLE_PREFIX, TEXT_PREFIX) and settings.test is None:
        return dataset_of(settings).test
    expected = {FOLDER_PREFIX: "images", TABLE_PREFIX: "rows", TEXT_PREFIX: "texts"}.get(kind or "", description.kind)
    if expected != description.kind:
        raise DataError(
            f"Expected {description.kind} for this model; got data={data_name}. It was trained on them. Name others."
        )
    path = Path(data_name.removeprefix(kind or ""))
    match kind:
        case "image-folder:":
            found = _images(image_folder_of(data_name), description, strict=strict)
        case "table:":
            found = _rows(path, description, strict=strict)
        case "text:":
            found = _texts(path, run, description, strict=strict)
        case _:
            found = _published(data_name, settings, description, own=name is None)
    if strict and not bool(found.readable.any()):
        raise DataError(
            f"Expected at least one test record in data={data_name} that can be used; got none. There is nothing to "
            "measure on. Compare them with the model's inputs."
        )
    return found


def _images(folder: Path, description: ModelDescription, *, strict: bool) -> Held:
    below = folder / "test" if (folder / "test").is_dir() else folder
    if not below.is_dir():
        raise DataError(f"Expected a folder of test images in {folder}; it is not there. Check the path.")
    channels, height, width = description.input_shape
    found = read_folder(
        below,
        description.class_names,
        (channels, height, width),
        resized=description.image_size is not None,
        strict=strict,
    )
    found.normalisation = normalisation_of(description) or found.normalisation
    return found


def _rows(path: Path, description: ModelDescription, *, strict: bool) -> Held:
    table = description.table
    if table is None or table.label_column is None:
        raise _unknown("the spec and the label's column of a table", path)
    return rows_of(path, Spec.of_text(table.spec, Path(DESCRIPTION)), table.label_column, strict=strict)


def _texts(path: Path, run: Path, description: ModelDescription, *, strict: bool) -> Held:
    form = description.texts
    if form is None or form.text_columns is None or form.label_column is None:
        raise _unknown("the columns of texts and label", path)
    source = TextSource(
        path=path,
        texts=tuple(form.text_columns),
        label=form.label_column,
        classes=tuple(description.class_names),
        tokenizer=run / TOKENIZER,
        max_length=form.max_length,
        test=None,
        test_share=None,
        dropped=form.left_out,
    )
    return texts_of(path, source, tokens_of(run, form), strict=strict)


def _unknown(what: str, path: Path) -> DataError:
    return DataError(
        f"Expected {DESCRIPTION} to name {what}, to read {path}; it does not. An earlier version packed the records or "
        "made the run. Evaluate on the packed records."
    )


def _published(name: str, settings: TrainSettings, description: ModelDescription, *, own: bool) -> Held:
    """Load the test records of a known data set or of packed records, if they are of the model's form."""
    if name.startswith(PACKED_PREFIX):
        from dpquant.data.packed import PackedImages, load_packed

        found = load_packed(name, packed_folder_of(name))
        if isinstance(found.test, PackedImages):  # the model's constants, whatever they were packed with
            found.test.normalisation = normalisation_of(description) or found.test.normalisation
    else:
        data_dir = Path(settings.data_dir) if own and settings.data_dir is not None else None
        found = data.load(name, data_dir, image_size=settings.image_size, normalisation=normalisation_of(description))
    form = (list(found.input_shape), list(found.class_names), found.task)
    if form != (description.input_shape, description.class_names, task_of(description)):
        raise DataError(
            f"Expected records of the model's form; got data={name}, with inputs of {found.input_shape} and "
            f"{len(found.class_names)} classes, not {tuple(description.input_shape)} and "
            f"{len(description.class_names)}, or others. What is measured would mean nothing. Name other records."
        )
    return found.test
