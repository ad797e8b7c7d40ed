# SPDX-License-Identifier: Apache-2.0
"""`dpquant predict`: what a run's model says of files.

Privacy: post-processing of what the run has released; the inputs are the caller's own.
"""

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import nn

from dpquant.errors import SettingError, quoted
from dpquant.runs.describing import task_of
from dpquant.runs.description import ModelDescription
from dpquant.runs.inputs import Part, Reader
from dpquant.runs.loading import described, load
from dpquant.runs.predictions import Prediction, predictions

Told = Callable[[Mapping[str, Any], Prediction], str]


def predict(
    run: Path, files: Sequence[str], *, top: int | None, as_csv: bool, standard_input: TextIO
) -> Iterator[tuple[str, bool]]:
    """Yield one line for each input, and one for each that cannot be read.

    Args:
      run: directory of a run that has ended.
      files: paths, or `-` for texts on standard input.
      top: number of classes to name beside the likeliest one; None: only that.
      as_csv: lines of CSV, with a header, and not JSON objects.
      standard_input: is read for `-`.
    Yields: (line, whether it is a result); the others are errors.
    Raises:
      SettingError: there is no run that has ended, or it has not so many classes.
      DataError, ModelError: its model cannot be loaded.
    """
    model, description = load(run), described(run)
    if top is not None and not 1 <= top <= len(description.class_names):
        raise SettingError(
            f"Expected top in 1 .. {len(description.class_names)}, the classes of the model; got top={top}. "
            f"{'Numbers have none. Leave it out.' if description.task.kind == 'regression' else 'Give a smaller one.'}"
        )
    reader, told = Reader(run, description), _json_line(listed=top is not None)
    if as_csv:
        columns = _columns(description, top)
        told = _csv_line(columns)
        yield _joined(columns), True
    for file in files:
        for part in reader.parts(file, standard_input):
            if part.problem is not None:
                yield part.problem, False
                continue
            yield from _answers(model, description, part, top, told)


def _answers(
    model: nn.Module, description: ModelDescription, part: Part, top: int | None, told: Told
) -> Iterator[tuple[str, bool]]:
    try:
        with torch.no_grad():
            outputs = model(part.inputs)
    except Exception as error:  # a user's model may raise anything
        yield (
            f"Expected a model that takes the input of {_told(part.places[0])}; got {quoted(error)}. Mend the model.",
            False,
        )
        return
    found = predictions(outputs, task_of(description), description.class_names, top or 1)
    for place, one in zip(part.places, found, strict=True):
        if one is None:
            yield f"Expected a finite output of the model for {_told(place)}; got another. There is no answer.", False
        else:
            yield told(place, one), True


def _told(place: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in place.items())


def _json_line(*, listed: bool) -> Told:
    def told(place: Mapping[str, Any], found: Prediction) -> str:
        if found.value is not None:
            return json.dumps({**place, "value": found.value})
        fields = {**place, "label": found.labels[0], "probability": found.probabilities[0]}
        if found.positive is not None:
            fields["positive"] = found.positive
        if listed:
            pairs = zip(found.labels, found.probabilities, strict=True)
            fields["top"] = [{"label": label, "probability": share} for label, share in pairs]
        return json.dumps(fields)

    return told


def _columns(description: ModelDescription, top: int | None) -> list[str]:
    places = {"images": ["file"], "rows": ["file", "row"], "texts": ["file", "line"]}[description.kind]
    if description.task.kind == "regression":
        return [*places, "value"]
    more = [name for number in range(2, (top or 1) + 1) for name in (f"label_{number}", f"probability_{number}")]
    positive = ["positive"] if description.task.prior is not None else []
    return [*places, "label", "probability", *positive, *more]


def _csv_line(columns: Sequence[str]) -> Told:
    def told(place: Mapping[str, Any], found: Prediction) -> str:
        fields = {**place, "value": found.value, "positive": found.positive}
        for number, (label, share) in enumerate(zip(found.labels, found.probabilities, strict=True), 1):
            end = f"_{number}" if number > 1 else ""
            fields |= {f"label{end}": label, f"probability{end}": share}
        return _joined([fields[name] for name in columns])

    return told


def _joined(values: Sequence[Any]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(values)
    return (
        line.getvalue().removesuffix("\n").encode("utf-8", "backslashreplace").decode()
    )  # a file's name may be no text
