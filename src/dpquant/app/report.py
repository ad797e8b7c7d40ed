# SPDX-License-Identifier: Apache-2.0
"""`dpquant report`: gathers the facts of runs and writes their page. This module loads no torch.

Privacy: post-processing of what the runs have released. Times are the operator's and are not read.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path

from dpquant.app.export import unplaced, unplaced_model
from dpquant.app.verify import verify
from dpquant.errors import DPQuantError, SettingError
from dpquant.privacy.events import Event
from dpquant.privacy.ledger import Ledger
from dpquant.privacy.meaning import details_of, meaning_of
from dpquant.runs.description import ModelDescription
from dpquant.runs.evaluated import Evaluation
from dpquant.runs.names import CONFIG, DESCRIPTION, EVALUATION, LEDGER, RECORD, REPORT
from dpquant.runs.pages.answers import answers
from dpquant.runs.pages.facts import Check, Facts
from dpquant.runs.pages.report import REDACTED, report
from dpquant.runs.record import RunRecord, write_whole


def facts_of(run: Path, *, redact: bool = False) -> Facts:
    """Return the facts of a run that has ended. What cannot be verified is among its checks.

    Args:
      run: directory of the run.
      redact: leave out command, folders, settings and declared words.
    Raises:
      SettingError: there is no run, or it has not ended.
      DataError: its record cannot be read.
    """
    record = _record(run)
    checks = _checks(run)
    events = _events(run, record)
    description = None
    if (run / DESCRIPTION).is_file():
        description = ModelDescription.read(run / DESCRIPTION)
    known = [] if events is None or any(one.research for one in events) else events
    per_person = None if record.plan is None else record.plan.records_per_person
    shown = record
    if redact:
        shown = dataclasses.replace(
            record,
            command="",
            dataset=unplaced(record.dataset) or "",
            model=unplaced_model(record.model),
            declared=None,
        )
        checks = [dataclasses.replace(one, detail="") for one in checks]
    return Facts(
        name=run.absolute().name,
        record=shown,
        record_sha256=hashlib.sha256((run / RECORD).read_bytes()).hexdigest(),
        events=events,
        checks=checks,
        meaning=meaning_of(known, record.delta),
        details=details_of(known, record.delta, per_person),
        description=description,
        settings=None
        if redact or not (run / CONFIG).is_file()
        else (run / CONFIG).read_text(errors="replace", encoding="utf-8"),
        redacted=redact,
        evaluation=Evaluation.read(run / EVALUATION) if (run / EVALUATION).is_file() else None,
    )


def _record(run: Path) -> RunRecord:
    if not run.is_dir():
        raise SettingError(f"Expected the directory of a run; got {run}, which is none. Check the path.")
    if (run / RECORD).is_file():
        return RunRecord.read(run / RECORD)
    if not (run / CONFIG).is_file():
        raise SettingError(
            f"Expected the directory of a run; got {run}, which holds no {RECORD}. Name the directory that dpquant "
            "train has made."
        )
    raise SettingError(
        f"Expected a run that has ended; got {run}, which holds no {RECORD}. What it has charged is told by dpquant "
        f"ledger {run}. It is continued by: dpquant resume {run}"
    )


def _checks(run: Path) -> list[Check]:
    """Return what `verify` finds, its own failure included."""
    try:
        found = verify(run, report=False).findings
    except DPQuantError as error:
        return [Check(what="settings", holds=False, detail=str(error))]
    return [Check(what=one.what, holds=one.holds, detail=one.detail) for one in found]


def _events(run: Path, record: RunRecord) -> list[Event] | None:
    """Return what was charged: what the ledger says, or else the record."""
    try:
        return Ledger.read(run / LEDGER)
    except DPQuantError:  # it is missing or was changed, which the checks say
        return None if record.ledger is None else list(record.ledger.events)


def write_report(run: Path) -> None:
    """Write the report of a run into its directory.

    Raises:
      SettingError: it cannot be written. The run itself is complete by then.
    """
    write(run / REPORT, report(facts_of(run)))


def renew_report(run: Path) -> None:
    """Write the report of a run again, if there is one; what was left out of it is left out again.

    Raises:
      SettingError: it cannot be written.
    """
    path = run / REPORT
    if path.is_file():
        redacted = f'"{REDACTED}":true' in path.read_text(errors="replace", encoding="utf-8")
        write(path, report(facts_of(run, redact=redacted)))


def to_json(facts: Sequence[Facts]) -> str:
    """Return the facts of runs as JSON, for programs. A number that is not finite is null."""
    return json.dumps([_facts_as_json(one) for one in facts], indent=2) + "\n"


def _facts_as_json(facts: Facts) -> dict[str, object]:
    record, details = facts.record, facts.details
    return {
        "name": facts.name,
        "model": record.model,
        "dataset": record.dataset,
        "epsilon": record.epsilon if math.isfinite(record.epsilon) else None,
        "delta": record.delta,
        "accuracy_test": record.accuracy_test,
        "record_sha256": facts.record_sha256,
        "holds": not facts.wrong,
        "alarms": facts.alarms(),
        "meaning": None if facts.meaning is None else dataclasses.asdict(facts.meaning),
        "persons": [] if details is None else [dataclasses.asdict(one) for one in details.persons],
        "epsilons": {} if details is None else {f"{delta:g}": value for delta, value in details.epsilons.items()},
        "answers": [dataclasses.asdict(one) for one in answers(facts)],
    }


def write(path: Path, text: str) -> None:
    """Write a page completely or not at all.

    Raises:
      SettingError: it cannot be written.
    """
    try:
        write_whole(path, text)
    except OSError as error:
        raise SettingError(
            f"Expected a place where a file can be written; got {path}: {error.strerror or error}. Name another one."
        ) from error
