# SPDX-License-Identifier: Apache-2.0
"""Texts: records of a CSV, TSV, JSON-lines or Parquet file, as the tokens of a tokenizer.

A record's tokens are cut at `max_length` and padded to the smallest bucket that holds them: 16, 32, 48, 64, 96, 128,
192 ... up to `max_length`. So its padded length depends on that record alone. If texts were padded to the longest of
their batch, a long record would change the length of all others, their scales of quantization, and so their gradients.
`Texts.dpquant_groups` names each record's bucket; microbatches are made within buckets.

A record without its columns, of no token, or whose label is not one of the classes, stays a record: its target is
UNREADABLE, so that its loss and its gradient are zero and it contributes nothing. No message names or counts these
records. A test file of its own is not protected, so there the first such record is named by its place.

Importing this file loads no torch, which reading does.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpquant.data.columns import BROKEN, REPLACED, Columns, read_columns, records_of
from dpquant.data.held import is_for_test
from dpquant.data.tables import text_of
from dpquant.data.task import UNREADABLE
from dpquant.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

    from dpquant.data.form import Form
    from dpquant.data.tokens import Texts

SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
_SHORTEST = 16  # tokens of the first bucket
_AT_ONCE = 4096  # texts that the tokenizer gets in one call
_PADDING = ("[PAD]", "<pad>", "<|pad|>", "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
"""Tokens that pad, and, of tokenizers without one, those that end a text, with which causal networks are padded."""
_SNLI = re.compile(r"snli_1\.0_\w+\.jsonl")
_SNLI_COLUMNS = ("sentence1", "sentence2")
_SNLI_LABEL = "gold_label"
_SNLI_CLASSES = ("entailment", "neutral", "contradiction")
_SNLI_UNLABELLED = "-"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextSource:
    """Where texts lie, and what is publicly known of them.

    Attributes:
      path: of the file with the training records.
      texts: names of one column, or of two whose texts are a pair.
      label: name of the label's column.
      classes: in the order of the targets.
      tokenizer: file of a tokenizer, or the folder that has it.
      max_length: number of tokens at which a text is cut.
      test: file of the test records; None: `test_share` of the records.
      test_share: of the records that are held out for test, by a hash of each one's content.
      dropped: label by which a public rule leaves records out; None: there is no such rule.
    """

    path: Path
    texts: tuple[str, ...]
    label: str
    classes: tuple[str, ...]
    tokenizer: Path
    max_length: int
    test: Path | None
    test_share: float | None
    dropped: str | None = None

    @classmethod
    def chosen(
        cls, path: Path, *, texts: str | None, label: str | None, classes: str | None, **others: Any
    ) -> "TextSource":
        """Return the source that options name; a file of SNLI under its published name has its own columns and classes.

        SNLI's records on whose label its annotators did not agree are left out, as everybody does who reports on it.

        Args:
          path: of the training records.
          texts: one name, or two with a comma between them.
          label: name of the label's column.
          classes: names with commas between them.
          others: further attributes.
        Raises:
          DataError: a part is missing, or there are not two classes or more.
        """
        dropped = None
        if _SNLI.fullmatch(path.name):
            texts, label = texts or ",".join(_SNLI_COLUMNS), label or _SNLI_LABEL
            classes, dropped = classes or ",".join(_SNLI_CLASSES), _SNLI_UNLABELLED
        for name, value in {"text_column": texts, "label_column": label, "classes": classes}.items():
            if not value or not value.strip():
                raise DataError(
                    f"Expected {name} for data=text:{path}; got none. It says what a record holds, and is public. Give "
                    f"--{name.replace('_', '-')}."
                )
        columns, names = _listed(texts or ""), _listed(classes or "")
        if not 1 <= len(columns) <= 2:
            raise DataError(
                f"Expected text_column to name one column, or two of a pair; got text_column={texts}. Join others "
                "into one."
            )
        if len(names) < 2 or len(set(names)) < len(names):
            raise DataError(
                f"Expected classes to be two names or more that differ; got classes={classes}. A label is one of them. "
                "Write them with commas, as --classes ham,spam."
            )
        return cls(path=path, texts=columns, label=(label or "").strip(), classes=names, dropped=dropped, **others)


def _listed(text: str) -> tuple[str, ...]:
    return tuple(one.strip() for one in text.split(",") if one.strip())


def load_texts(source: TextSource) -> "tuple[Texts, Texts, Tokens]":
    """Read training and test records and the tokenizer.

    Raises:
      DataError: a file or the tokenizer cannot be read, columns are missing, no record can be used, or a record of the
        test file cannot.
    Privacy: per example; which error is raised does not depend on a single training record.
    """
    tokens = Tokens.read(source.tokenizer, source.max_length)
    wanted = (*source.texts, source.label)
    records = _records(source, read_columns(source.path, wanted, SUFFIXES))
    if source.test is not None:
        test = read_columns(source.test, wanted, SUFFIXES)
        _check_strictly(source, test)
        return _usable(source, records, tokens), _usable(source, _records(source, test), tokens, source.test), tokens
    share = source.test_share or 0.0
    held_out = [is_for_test(record, share) for record in records]
    parts = ([r for r, out in zip(records, held_out, strict=True) if out is chosen] for chosen in (False, True))
    train, test = (_usable(source, part, tokens) for part in parts)
    return train, test, tokens


def buckets_to(max_length: int) -> tuple[int, ...]:
    """Return the lengths to which texts are padded, ascending: in steps of 16, and of a third to a half from 64 on.

    Finer steps pad less, and leave each bucket fewer texts of a batch, of which its last microbatch is filled up.
    """
    found, length = [], _SHORTEST
    while length < max_length:
        found.append(length)
        length += max(_SHORTEST, 1 << (length.bit_length() - 2))
    return *found, max_length


def form_of_texts(source: TextSource, tokens: "Tokens") -> "Form":
    """Return the form of a source's records, without reading one."""
    from dpquant.data.tokens import text_form

    form = text_form(
        vocabulary=tokens.vocabulary,
        lengths=tokens.buckets,
        padding=tokens.padding if tokens.pads else None,
        class_names=source.classes,
        pairs=len(source.texts) == 2,
    )
    return dataclasses.replace(form, tokenizer=tokens.content)


def texts_of(path: Path, source: TextSource, tokens: "Tokens", *, strict: bool) -> "Texts":
    """Read a file of test records.

    Args:
      path: of the file.
      source: names its columns and the classes.
      tokens: the tokenizer.
      strict: name the first record that cannot be used, as is right where test records are not protected. Without it
        such a record has the target UNREADABLE, and no error depends on a single record.
    Raises:
      DataError: the file cannot be read, its columns are missing, or a record cannot be used.
    """
    columns = read_columns(path, (*source.texts, source.label), SUFFIXES)
    if strict:
        _check_strictly(source, columns)
    return _encoded(source, _records(source, columns), tokens)


def _records(source: TextSource, columns: Columns) -> list[tuple[str, ...]]:
    """Return the texts and the label of each record, without those that the public rule leaves out.

    A value that cannot be read is an empty text.
    """
    found = (tuple(map(text_of, values)) for values in records_of(columns))
    return [record for record in found if source.dropped is None or record[-1] != source.dropped]


def _check_strictly(source: TextSource, columns: Columns) -> None:
    """Raise DataError for the first record of a test file that cannot be used."""
    for number, values in enumerate(records_of(columns), 1):
        *texts, label = map(text_of, values)
        if source.dropped is not None and label == source.dropped:
            continue
        problem = remedy = ""
        if BROKEN in values:
            problem, remedy = "one that cannot be read, or lacks a column", columns.mending
        elif any(REPLACED in text for text in texts):
            problem, remedy = "a text that is not UTF-8", "Convert the file, as by iconv -f LATIN1 -t UTF-8"
        elif not all(texts):
            problem, remedy = "an empty text", "Write its text, or take the record out"
        elif label not in source.classes:
            problem = f"a label in column {source.label} that is none of them"
            remedy = "Mend the label, or name all classes by --classes"
        if problem:
            raise DataError(
                f"Expected every record of {columns.path} to have a text and one of the classes "
                f"{', '.join(source.classes)}; got {problem} in record {number}. A test record that cannot be used "
                f"would count as an error of the model. {remedy}."
            )


def _usable(
    source: TextSource, records: Sequence[tuple[str, ...]], tokens: "Tokens", path: Path | None = None
) -> "Texts":
    texts = _encoded(source, records, tokens)
    if not bool(texts.readable.any()):
        raise DataError(
            f"Expected {path or source.path} to hold at least one record, for training and for test each, with a text "
            f"and a label among {', '.join(source.classes)}; it holds none. There is nothing to learn from. Give "
            "--text-column, --label-column and --classes as in the file, whose texts have to be UTF-8."
        )
    return texts


def _encoded(source: TextSource, records: Sequence[tuple[str, ...]], tokens: "Tokens") -> "Texts":
    from dpquant.data.tokens import Texts

    codes = {name: code for code, name in enumerate(source.classes)}
    targets = [codes.get(label, UNREADABLE) if all(texts) else UNREADABLE for *texts, label in records]
    return Texts.of(tokens, [record[:-1] for record in records], targets)


def tokenizer_file(path: Path) -> Path:
    """Return the file of a tokenizer, which is named itself or by its folder.

    Raises:
      DataError: there is none.
    """
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise DataError(
            f"Expected tokenizer to be a folder with a tokenizer.json, or such a file; got tokenizer={path}. Text "
            "would not become numbers. Save one by tokenizer.save_pretrained(FOLDER) of transformers, or, without a "
            "network, by Tokenizer.train of tokenizers on public text."
        )
    return file


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Tokens:
    """A tokenizer, and the lengths to which its texts are padded. All of it is public.

    Attributes:
      tokenizer: that cuts texts at the largest bucket.
      buckets: lengths, ascending; the last is `max_length`.
      vocabulary: number of different tokens.
      padding: token that fills a text up to its bucket.
      pads: whether the tokenizer has a token for that; otherwise `padding` is its first one.
      content: of the tokenizer's file.
    """

    tokenizer: "Tokenizer"
    buckets: tuple[int, ...]
    vocabulary: int
    padding: int
    pads: bool
    content: bytes

    @property
    def sha256(self) -> str:
        """Return the SHA-256 of the tokenizer's file."""
        return hashlib.sha256(self.content).hexdigest()

    @classmethod
    def read(cls, path: Path, max_length: int) -> "Tokens":
        """Read a tokenizer.

        Args:
          path: of a tokenizer.json, or of the folder that has it.
          max_length: at which texts are cut.
        Raises:
          DataError: there is none, it cannot be read, or the package tokenizers is not installed.
        """
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise DataError(
                "Expected the package tokenizers, to read texts; it is not installed. Install it by pip install "
                "'dpquant[text]'."
            ) from error
        file = tokenizer_file(path)
        try:
            content = file.read_bytes()
            tokenizer = Tokenizer.from_buffer(content)
            settings = json.loads(content)
        except Exception as error:  # tokenizers raises plain exceptions
            raise DataError(
                f"Expected {file} to be a tokenizer; got {type(error).__name__}. It is damaged or something else. Save "
                "it again."
            ) from error
        padding = (settings.get("padding") or {}).get("pad_id")
        if padding is None:
            named = (tokenizer.token_to_id(name) for name in _PADDING)
            padding = next((number for number in named if number is not None), None)
        tokenizer.no_padding()
        added = tokenizer.num_special_tokens_to_add(True)
        if max_length <= added:
            raise DataError(
                f"Expected max_length > {added}, the tokens that {file} adds to each text; got "
                f"max_length={max_length}. No word would be left. Give a larger one."
            )
        tokenizer.enable_truncation(max_length)
        return cls(
            tokenizer=tokenizer,
            buckets=buckets_to(max_length),
            vocabulary=max(tokenizer.get_vocab(True).values(), default=0) + 1,
            padding=padding or 0,
            pads=padding is not None,
            content=content,
        )

    def encoded(self, records: Sequence[tuple[str, ...]]) -> "list[Encoding]":
        """Return the tokens of records, each of a text or of a pair of texts."""
        found: list[Encoding] = []
        for start in range(0, len(records), _AT_ONCE):
            piece: list[Any] = [one[0] if len(one) == 1 else one for one in records[start : start + _AT_ONCE]]
            found += self.tokenizer.encode_batch(piece)
        return found
