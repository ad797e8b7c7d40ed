# SPDX-License-Identifier: Apache-2.0
"""Turns files into a model's inputs, by model.json alone: images, rows of a table, or texts.

What cannot be read is a problem of its own place, in one line; the others are read.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from dpquant.data.columns import REPLACED
from dpquant.data.image_file import read_image
from dpquant.data.normalisation import Normalisation
from dpquant.data.spec import Spec
from dpquant.data.split import of_channels
from dpquant.data.tables import inputs_of
from dpquant.data.texts import Tokens
from dpquant.data.tokens import Texts
from dpquant.errors import DataError
from dpquant.runs.describing import normalisation_of
from dpquant.runs.description import ModelDescription, TextForm
from dpquant.runs.names import DESCRIPTION, TOKENIZER

STANDARD_INPUT = "-"
_TOGETHER = 64  # inputs that pass the model at once
_OF_RECORDS = (".csv", ".jsonl", ".parquet")  # files whose lines are no texts; .tsv may hold pairs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """Some inputs, or why there are none.

    Attributes:
      places: of each input: {"file"} and, of a table or texts, {"row"} or {"line"}, counted from 1.
      inputs: of the model, for all places together; None if `problem` is given.
      problem: why something cannot be read, in one line.
    """

    places: list[Mapping[str, Any]]
    inputs: Any = None
    problem: str | None = None


class Reader:
    """Reads files as a model's inputs.

    Attributes:
      description: of the model.
    """

    def __init__(self, run: Path, description: ModelDescription):
        """Open the tokenizer, if the model is for texts.

        Raises:
          DataError: it is not there, or is not the run's.
        """
        self.description = description
        self._tokens = None if description.texts is None else tokens_of(run, description.texts)

    def parts(self, file: str, standard_input: TextIO) -> Iterator[Part]:
        """Yield the inputs in a file, some at a time.

        Args:
          file: its path, or `-` for texts on standard input.
          standard_input: is read for `-`; what is not UTF-8 in it is replaced, by U+FFFD.
        """
        try:
            if file == STANDARD_INPUT and self._tokens is None:
                raise DataError(
                    f"Expected files of {self.description.kind}; got -, standard input, on which texts alone are "
                    "read. Name the files."
                )
            match self.description.kind:
                case "images":
                    yield Part(places=[{"file": file}], inputs=self._image(Path(file))[None])
                case "rows":
                    yield from self._rows(file)
                case _:
                    yield from self._texts(file, standard_input)
        except DataError as error:
            yield Part(places=[], problem=str(error))

    def _image(self, path: Path) -> Tensor:
        found = self.description
        channels, height, width = found.input_shape
        pixels = read_image(path, (channels, height, width), resized=found.image_size is not None)
        by = normalisation_of(found) or Normalisation(mean=0.0, std=1.0)
        return (pixels - of_channels(by.mean)) / of_channels(by.std)

    def _rows(self, file: str) -> Iterator[Part]:
        table = self.description.table
        if table is None:
            raise DataError(
                f"Expected {DESCRIPTION} to hold the spec of the table's columns, to read {file}; it holds none. "
                "The model was trained on rows that were packed without one. Load it by dpquant.load."
            )
        inputs, unusable = inputs_of(Path(file), Spec.of_text(table.spec, Path(DESCRIPTION)))
        for rows in torch.arange(len(inputs)).split(_TOGETHER):
            good = [row for row in rows.tolist() if row not in unusable]
            for row in rows.tolist():
                if row in unusable:
                    problem = f"Expected row {row + 1} of {file} to be as the spec says; column {unusable[row]} is not."
                    yield Part(places=[], problem=problem)
            if good:
                yield Part(places=[{"file": file, "row": row + 1} for row in good], inputs=inputs[good])

    def _texts(self, file: str, standard_input: TextIO) -> Iterator[Part]:
        if file == STANDARD_INPUT:
            yield from self._lines(file, standard_input)
            return
        if Path(file).suffix.lower() in _OF_RECORDS:
            raise DataError(
                f"Expected a file of one text a line; got {file}, whose lines are records. Write the texts alone, or "
                "measure the model on the records: dpquant evaluate RUN --data text:FILE"
            )
        try:
            with Path(file).open(encoding="utf-8", errors="replace") as lines:
                yield from self._lines(file, lines)
        except OSError as error:
            raise DataError(
                f"Expected a file of one text a line in {file}; got {error.strerror or error}. Check the path."
            ) from error

    def _lines(self, file: str, lines: TextIO) -> Iterator[Part]:
        """Yield the texts of lines; those of a pair have a tab between them."""
        form, some = self.description.texts, []
        assert form is not None
        rule = "two texts with a tab between them" if form.pairs else "a text"
        for number, line in enumerate(lines, 1):
            texts = tuple(map(str.strip, line.split("\t"))) if form.pairs else (line.strip(),)
            if not all(texts) or len(texts) != 1 + form.pairs or REPLACED in line:
                found = "bytes that are not UTF-8" if REPLACED in line else "something else" if line.strip() else "none"
                yield Part(places=[], problem=f"Expected {rule} in line {number} of {file}; got {found}.")
                continue
            some.append(({"file": file, "line": number}, texts))
            if len(some) == _TOGETHER:
                yield self._encoded(some)
                some = []
        if some:
            yield self._encoded(some)

    def _encoded(self, some: list[tuple[Mapping[str, Any], tuple[str, ...]]]) -> Part:
        assert self._tokens is not None
        texts = Texts.of(self._tokens, [record for _, record in some], [0] * len(some))
        inputs, _ = texts.batch(torch.arange(len(some)))
        return Part(places=[place for place, _ in some], inputs=inputs)


def tokens_of(run: Path, form: TextForm) -> Tokens:
    """Return the tokenizer of a run on texts.

    Raises:
      DataError: it is not there, or is not the one with which the model was trained.
    """
    path = run / TOKENIZER
    if not path.is_file():
        raise DataError(
            f"Expected {path}, the tokenizer of the run; it is not there. Copy the one with which its texts were read."
        )
    tokens = Tokens.read(path, form.max_length)
    if tokens.sha256 != form.tokenizer_sha256:
        raise DataError(
            f"Expected {path} to have the SHA-256 {form.tokenizer_sha256}, as {DESCRIPTION} says; got {tokens.sha256}. "
            "With another tokenizer a text is another input. Restore it from a copy."
        )
    return tokens
