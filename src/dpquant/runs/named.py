# SPDX-License-Identifier: Apache-2.0
"""What a run's settings name: data, files and modules, and whether they are there. Opens no record, and loads no torch.

What is missing is said at once: torch takes seconds to import. The data set itself is loaded by `sources.py`.
"""

from pathlib import Path

from dpquant.data.class_folders import classes_of
from dpquant.data.class_folders import folder_of as image_folder_of
from dpquant.data.columns import check_file
from dpquant.data.manifest import Manifest
from dpquant.data.manifest import folder_of as packed_folder_of
from dpquant.data.model_names import NAMES, check_module, pretrained_folder
from dpquant.data.sizes import (
    FOLDER_PREFIX,
    HF_PREFIX,
    PACKED_PREFIX,
    TABLE_PREFIX,
    TEXT_PREFIX,
    check_data_dir,
    public_size,
)
from dpquant.data.spec import Spec
from dpquant.data.tables import SUFFIXES as OF_TABLES
from dpquant.data.texts import SUFFIXES as OF_TEXTS
from dpquant.data.texts import TextSource, tokenizer_file
from dpquant.errors import DataError, ModelError, SettingError
from dpquant.runs.settings import TrainSettings


def check_named(settings: TrainSettings, *, records: bool = True) -> None:
    """Check that what the settings name is there, and read what of it is public and small.

    Args:
      settings: of the run.
      records: whether the files of records have to be there, too.
    Raises:
      DataError: the data set is unknown, a file is missing, or the spec or the manifest cannot be read.
      ModelError: the folder of a pretrained network, or the module of the user's own, is missing.
      SettingError: a setting that the data need is missing.
    """
    public_size(settings.data)  # refuses an unknown name
    kinds = {TABLE_PREFIX: OF_TABLES, TEXT_PREFIX: OF_TEXTS}
    kind = next((prefix for prefix in kinds if settings.data.startswith(prefix)), None)
    path = None if kind is None else file_of(settings, kind)
    if settings.data.startswith(FOLDER_PREFIX):
        classes_of(image_folder_of(settings.data))
    elif settings.data.startswith(PACKED_PREFIX):
        folder = packed_folder_of(settings.data)
        Manifest.read(folder).check(folder)
    elif kind == TABLE_PREFIX:
        spec_of(settings)
        label_of(settings)
    elif kind == TEXT_PREFIX:
        tokenizer_file(text_source(settings).tokenizer)
    if kind is not None and records:
        for one in (path, test_of(settings)):
            if one is not None:
                check_file(one, kinds[kind])
    if settings.model.startswith(HF_PREFIX):
        if kind != TEXT_PREFIX and not settings.data.startswith(PACKED_PREFIX):
            raise not_for_texts(settings)
        pretrained_folder(settings.model)
    elif settings.model not in NAMES:
        check_module(settings.model, Path.cwd())
    if settings.data_dir is not None:
        check_data_dir(settings.data, Path(settings.data_dir))
    if settings.choices is not None and not Path(settings.choices).is_file():
        raise DataError(
            f"Expected choices to be a file that a run has left; got {settings.choices}, which is none. Give the "
            "choices.json of a run directory, or leave choices out to measure again."
        )


def not_for_texts(settings: TrainSettings) -> ModelError:
    """Return the error for a pretrained network of which something else is asked than it can do."""
    return ModelError(
        f"Expected texts, and no width, for model={settings.model}; got data={settings.data} and "
        f"width={settings.width:g}. A pretrained network is as it was trained. Use another model."
    )


def check_accuracy(settings: TrainSettings) -> None:
    """Check that a run has a test accuracy. Reads no record.

    Raises:
      SettingError: its task is a regression.
      DataError: the spec or the manifest of packed records cannot be read.
    """
    if settings.data.startswith(PACKED_PREFIX):
        task, where = Manifest.read(packed_folder_of(settings.data)).task, f"data={settings.data}"
    elif settings.data.startswith(TABLE_PREFIX) and settings.spec is not None:
        task, where = Spec.read(Path(settings.spec)).task, f"spec={settings.spec}"
    else:
        return
    if task.kind == "regression":
        raise SettingError(
            f"Expected a task with an accuracy; got a regression in {where}. Runs are compared by their "
            "test accuracies. Train them one by one, and compare mean_absolute_error in their records."
        )


def label_of(settings: TrainSettings) -> str:
    """Return the column of a table that is to be predicted; errors as for `check_named`."""
    return _needed(settings, "label_column", "It names the column that is to be predicted")


def spec_of(settings: TrainSettings) -> Spec:
    """Return the spec of a table; errors as for `check_named`."""
    return Spec.read(
        Path(_needed(settings, "spec", "Ranges and categories are public knowledge, and are not read from records"))
    )


def text_source(settings: TrainSettings) -> TextSource:
    """Return where texts lie and what they hold; errors as for `check_named`."""
    return TextSource.chosen(
        file_of(settings, TEXT_PREFIX),
        texts=settings.text_column,
        label=settings.label_column,
        classes=settings.classes,
        tokenizer=Path(_needed(settings, "tokenizer", "It turns text into numbers")),
        max_length=settings.max_length,
        test=None if settings.test is None else Path(settings.test),
        test_share=settings.test_share,
    )


def file_of(settings: TrainSettings, prefix: str) -> Path:
    """Return the file of training records, which stands after the prefix in `data`; errors as for `check_named`."""
    path = settings.data.removeprefix(prefix)
    if not path.strip():
        raise DataError(f"Expected a file in data={prefix}FILE; got data={settings.data}, without one. Name it.")
    return Path(path)


def _needed(settings: TrainSettings, name: str, why: str) -> str:
    value = getattr(settings, name)
    if not value or not value.strip():
        raise SettingError(
            f"Expected {name} with data={settings.data}; got none. {why}. Give --{name.replace('_', '-')}."
        )
    return value


def test_of(settings: TrainSettings) -> Path | None:
    """Return the file of test records; None if a share of the others are held out. Errors as for `check_named`."""
    if settings.test is None and settings.test_share is None:
        raise SettingError(
            f"Expected test or test_share with data={settings.data}; got neither. What is measured on test records is "
            "not protected, so which they are is for you to say. Give --test FILE, or --test-share 0.2, by which each "
            "record's content decides."
        )
    return None if settings.test is None else Path(settings.test)
