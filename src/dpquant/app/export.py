# SPDX-License-Identifier: Apache-2.0
"""`dpquant export`: copies what a run releases, and nothing else, into a folder. This module loads no torch.

Copied is what is on a list; whatever else lies in a run directory is left, and said to be. The ledger's lines are
public events, but they also show when processes ended, which may follow memory and time, and so the sizes of batches;
what they charge and the hash of the last one are copied in their place. Record and settings lose the folders of this
machine and what `--unsafe-metrics` added.

The folder is written under a temporary name, flushed to disk and renamed: it is there completely or not at all.

Privacy: post-processing of what the run has released.
"""

import dataclasses
import html
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open

from dpquant.app.spent import Account, account
from dpquant.data.sizes import HF_PREFIX, OWN_PREFIXES
from dpquant.errors import DataError, LedgerError, SettingError
from dpquant.privacy.disk import DISK, Disk
from dpquant.privacy.events import NEIGHBOURS, PUBLIC
from dpquant.privacy.plan import rounded_up
from dpquant.runs.description import ModelDescription
from dpquant.runs.evaluated import UNPROTECTED
from dpquant.runs.names import (
    CHECKPOINTS,
    CHOICES,
    CONFIG,
    DESCRIPTION,
    EVALUATION,
    LEDGER,
    METRICS,
    MODEL,
    PROGRESS,
    RECORD,
    RECORDS,
    RELEASES,
    REPORT,
    SPENT,
    TIMINGS,
    TOKENIZER,
)
from dpquant.runs.place import Place
from dpquant.runs.record import RunRecord, sha256
from dpquant.runs.settings import TrainSettings
from dpquant.runs.timings import NOT_FOR_RELEASE

STATEMENT, SUMS = "statement.txt", "SHA256SUMS"
_ROUND_OFF = 1e-6  # of epsilon, which versions of the accountant compute slightly differently

_COPIED = {
    MODEL: "parameters and buffers after the last epoch",
    RECORD: "all numbers of the run, without folders of this machine and training accuracy",
    CONFIG: "all settings, without folders of this machine",
    DESCRIPTION: "what is needed to use the model: classes, shape of an input, normalisation",
    TOKENIZER: "the tokenizer of the texts",
    STATEMENT: "the privacy statement",
    SPENT: "what the ledger has charged, epsilon, and the hash of its last line",
    REPORT: "the report, as it was made",
}
_LEFT = {
    LEDGER: f"its lines show when processes ended; what they charge is in {SPENT}",
    METRICS: f"its numbers are in {RECORD}",
    TIMINGS: "the operator's own: times follow the sizes of batches, which are private",
    PROGRESS: "the operator's own: it shows when steps were taken",
    CHOICES: "the operator's own: decisions by timing on this machine",
    EVALUATION: "measured on test records, whose people the statement does not cover",
    RELEASES: "what was released from test records",
    CHECKPOINTS: "the operator's own: states from which the run could continue",
    RECORDS: "the operator's own: with it guesses of the training records can be tested",
}
_UNKNOWN = "not a file that a run releases"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Copied:
    """A file of an export.

    Attributes:
      name: of the file.
      what: in words.
      bytes: its size.
      sha256: of its content.
    """

    name: str
    what: str
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
    """Result of `dpquant export`.

    Attributes:
      folder: that was made.
      epsilon, delta: what the ledger has charged.
      head: hash of the ledger's last line.
      statement: the run's privacy statement.
      copied: the files of the folder.
      left: {name in the run directory: why it was left}.
    """

    folder: str
    epsilon: float
    delta: float
    head: str
    statement: str
    copied: Sequence[Copied]
    left: Mapping[str, str]

    @property
    def told(self) -> str:
        """What was done, in one line."""
        return (
            f"{self.folder}: {len(self.copied)} files, {sum(one.bytes for one in self.copied):,} bytes. The ledger is "
            f"sound: epsilon = {rounded_up(self.epsilon)} at delta = {self.delta:g}, head {self.head}."
        )

    def to_json(self) -> str:
        """Return the result as JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"


def export(run: Path, folder: Path, *, disk: Disk = DISK) -> Export:
    """Copy what a run releases into a new folder.

    Args:
      run: directory of a run that has ended.
      folder: to make; it must be missing or empty.
      disk: flushes folders.
    Returns: what was copied, and what was left.
    Raises:
      LedgerError: the ledger is missing, not as it was written, or has charged more than the record says.
      SettingError: there is no run, it has not ended, or the folder cannot be made.
      DataError: a file of the run cannot be read.
    Privacy: post-processing.
    """
    record, settings = _ended(run)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SettingError(
            f"Expected a folder that is missing or empty; got {folder}. What lies there would be taken for released. "
            "Name another one."
        )
    spent = spent_of(run, record)
    public, withheld = _without_folders(record, settings)
    texts = {
        RECORD: public.to_json(),
        CONFIG: _public(settings).to_toml(),
        STATEMENT: record.statement.rstrip("\n") + "\n",
        SPENT: _summary(spent),
    }
    if (run / DESCRIPTION).exists():  # runs of schema 3 and earlier have none
        description = ModelDescription.read(run / DESCRIPTION)
        texts[DESCRIPTION] = dataclasses.replace(description, model=unplaced_model(description.model)).to_json()
    if (run / TOKENIZER).exists():
        texts[TOKENIZER] = _read(run / TOKENIZER)
    left = {path.name: _LEFT.get(path.name, _UNKNOWN) for path in sorted(run.iterdir())}
    for name in (MODEL, *texts):
        left.pop(name, None)
    if REPORT in left:
        if why := _why_not_reported(run / REPORT, record, withheld):
            left[REPORT] = why
        else:
            del left[REPORT]
            texts[REPORT] = _read(run / REPORT)
    copied = _write(run / MODEL, texts, folder, disk)
    (contents,) = spent.ledgers.values()
    return Export(
        folder=str(folder),
        epsilon=spent.together.epsilon,
        delta=spent.together.delta,
        head=contents.head,
        statement=record.statement,
        copied=copied,
        left=left,
    )


def _ended(run: Path) -> tuple[RunRecord, TrainSettings]:
    """Return record and settings of a run, and check that its model can be read."""
    settings = Place(run).settings()
    if not (run / RECORD).is_file():
        raise SettingError(
            f"Expected a run that has ended; got {run}, which holds no {RECORD}. Whether its epsilon holds is known at "
            f"its end. Finish it first: dpquant resume {run}"
        )
    try:
        with safe_open(run / MODEL, framework="numpy"):
            pass
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"Expected {run / MODEL} to hold the model; got {type(error).__name__}: {error}. There is nothing to "
            "release without it. Restore it from a copy."
        ) from error
    return RunRecord.read(run / RECORD), settings


def spent_of(run: Path, record: RunRecord) -> Account:
    """Verify the ledger and return what it has charged.

    Raises:
      LedgerError: it is missing, not as it was written, or has charged more than the record says.
    """
    if not (run / LEDGER).is_file():
        raise LedgerError(
            f"Expected the ledger of the run; got {run}, which holds no {LEDGER}. Without it no epsilon can be stated. "
            "Restore it from a copy."
        )
    spent = account([run], record.delta)
    if not spent.together.epsilon <= record.epsilon * (1 + _ROUND_OFF):
        raise LedgerError(
            f"Expected a ledger that has charged epsilon = {record.epsilon:g}, as {RECORD} says; got "
            f"{spent.together.epsilon:g}. One of the two belongs to another run. Restore both from a copy."
        )
    return spent


_PATHS = ("test", "spec", "tokenizer")  # settings that name a file or folder


def _public(settings: TrainSettings) -> TrainSettings:
    """Return the settings without folders of this machine."""
    named = {name: unplaced(getattr(settings, name)) for name in _PATHS}
    places = {"data": unplaced(settings.data), "model": unplaced_model(settings.model)}
    return dataclasses.replace(settings, **named, **places, data_dir=None, choices=None)


def unplaced(path: str | None) -> str | None:
    """Return a path, or the name of a data set with one, without the folder in which it lies."""
    if path is None:
        return None
    prefix = next((one for one in OWN_PREFIXES if path.startswith(one)), "")
    return f"{prefix}{Path(path.removeprefix(prefix)).name}" if prefix or "/" in path else path


def unplaced_model(model: str) -> str:
    """Return a model's name without the folder of a pretrained one."""
    path = model.removeprefix(HF_PREFIX)
    return model if path == model else f"{HF_PREFIX}{Path(path).name}"


def _without_folders(record: RunRecord, settings: TrainSettings) -> tuple[RunRecord, list[str]]:
    """Return what of a record is released, and the texts that it lost."""
    public = dataclasses.replace(
        record,
        command=f"dpquant train --config {CONFIG}",
        dataset=unplaced(record.dataset) or "",
        model=unplaced_model(record.model),
        per_epoch=[dataclasses.replace(epoch, nonprivate_accuracy_train=None) for epoch in record.per_epoch],
    )
    places = [record.command, settings.data_dir, settings.choices]
    for name in (record.dataset, settings.data):
        places += [name.removeprefix(prefix) for prefix in OWN_PREFIXES if name.startswith(prefix)]
    places += [path for path in (getattr(settings, name) for name in _PATHS) if path and "/" in path]
    places += [model.removeprefix(HF_PREFIX) for model in (record.model,) if model.startswith(HF_PREFIX)]
    return public, [text for text in places if text]


def _why_not_reported(report: Path, record: RunRecord, withheld: Sequence[str]) -> str:
    """Return why a report is not released; empty if it may be."""
    again = "made of the operator's record. Make it again of the export"
    text = _read(report)
    if record.unsafe_metrics:
        return f"may show training accuracy, {again}"
    if any(part in text for part in (NOT_FOR_RELEASE, html.escape(NOT_FOR_RELEASE))):
        return f"shows times, {again}"
    if UNPROTECTED in text:
        return f"shows what was measured on test records, whose people the statement does not cover, {again}"
    if any(part in text for one in withheld for part in (one, html.escape(one))):
        return f"names folders of this machine, {again}"
    return ""


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"Expected a readable {path}; got {type(error).__name__}. Remove or restore it.") from error


def _summary(spent: Account) -> str:
    """Return what the ledger says, as JSON, without what follows from when processes ended."""
    (contents,) = spent.ledgers.values()
    together = spent.together.facts()
    facts = {name: together[name] for name in ("epsilon", "delta", "steps", "analyses", "research")}
    facts |= {"head": contents.head, "run": contents.run, "format": contents.format, "dpquant": contents.version}
    facts |= {"neighbours": NEIGHBOURS, "public": PUBLIC}
    facts["events"] = [dataclasses.asdict(event) for event in contents.events]
    return json.dumps(facts, indent=2) + "\n"


def _write(model: Path, texts: Mapping[str, str], folder: Path, disk: Disk) -> list[Copied]:
    """Write the folder completely or not at all."""
    draft = folder.absolute().with_name(f"{folder.name}.tmp-{os.getpid()}")
    try:
        draft.mkdir(parents=True)
        shutil.copyfile(model, draft / MODEL)
        for name, text in texts.items():
            (draft / name).write_text(text, encoding="utf-8")
        copied = [_copied(draft / name) for name in (MODEL, *texts)]
        (draft / SUMS).write_text("".join(f"{one.sha256}  {one.name}\n" for one in copied), encoding="utf-8")
        for path in draft.iterdir():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        disk.sync_folder(draft)
        draft.replace(folder)  # over an empty folder, too
        disk.sync_folder(folder.absolute().parent)
    except OSError as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise SettingError(
            f"Expected a place where a folder can be made; got {folder}: {error.strerror or error}. Nothing was "
            "exported. Make room, or name another one."
        ) from error
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return copied


def _copied(path: Path) -> Copied:
    return Copied(name=path.name, what=_COPIED[path.name], bytes=path.stat().st_size, sha256=sha256(path))
