# SPDX-License-Identifier: Apache-2.0
"""The lines of a ledger file: what may stand in them, how they are chained, and what they say together.

`ledger.py` says what the kinds of lines are. Reading recomputes every hash and refuses every line that cannot follow
the ones before it.
"""

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dpquant.errors import LedgerError
from dpquant.privacy.events import NEIGHBOURS, PUBLIC, Budget, Event, Kind, merged
from dpquant.version import version

FORMAT = 2
NO_HASH = "0" * 64  # `previous` of the first line, and the head of an empty ledger


@dataclasses.dataclass(kw_only=True)
class Contents:
    """What the complete lines of a ledger say. Made by `verified`.

    Attributes:
      format: of the file, 1 or 2; an empty file has format 2.
      run: random, public name of the run; empty in format 1.
      version: of the dpquant that began the run; empty in format 1.
      budget: what the run may release; None without a plan, and in format 1.
      attempts: number of processes that have charged; 1 in format 1.
      research: whether any of them drew sampling or noise from a seed, so that epsilon is no guarantee.
      events: what was charged and not given back, equal releases counted together.
      head: hash of the last line.
      num_lines, num_bytes: complete lines, and their length in the file.
      torn: length of a torn last line, which counts for nothing.
    """

    format: int = FORMAT
    run: str = ""
    version: str = ""
    budget: Budget | None = None
    attempts: int = 0
    research: bool = False
    events: list[Event] = dataclasses.field(default_factory=list)
    head: str = NO_HASH
    num_lines: int = 0
    num_bytes: int = 0
    torn: int = 0

    def charged(self, kind: Kind) -> int:
        """Return how many releases of a kind are charged."""
        return sum(event.count for event in self.events if event.kind == kind)


def verified(path: Path, data: bytes) -> Contents:
    """Return what the bytes of a ledger say; `path` names it in errors.

    Raises:
      LedgerError: a line is not as it was written, or the format is newer. The message names the line.
    """
    *lines, tail = data.split(b"\n")
    _, found, rest = tail.rpartition(b'"hash": ')
    if found and b"}" in rest:  # only its end of line is missing or was changed: it is verified
        lines.append(tail)
        tail = b""
    contents, lease = Contents(torn=len(tail)), {}
    for seq, line in enumerate(lines):
        try:
            entry = json.loads(line)
            if seq == 0 and entry.get("format", 1) > FORMAT:
                raise LedgerError(
                    f"Expected line 1 of {path} to name a format up to {FORMAT}; got format={entry['format']}, "
                    f"written by dpquant {entry.get('dpquant')}. It could be misread. Read it with that version, or a "
                    "newer one."
                )
            written, digest = line_of({name: value for name, value in entry.items() if name != "hash"})
            if line != written or entry["seq"] != seq or entry["previous"] != contents.head:
                raise ValueError("a line that was changed")
            lease = _take(contents, entry, lease)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise LedgerError(
                f"Expected line {seq + 1} of {path} as it was written; got another. The ledger does not agree with "
                "itself, so no epsilon can be stated from it. Restore it from a copy."
            ) from error
        contents.head = digest
        contents.num_lines += 1
        contents.num_bytes += len(line) + 1
    return contents


def _take(contents: Contents, entry: dict[str, Any], lease: dict[str, Any]) -> dict[str, Any]:
    """Add one line to the contents, and return the train line of which a next line may give back.

    Raises:
      ValueError, KeyError, TypeError: the line cannot follow the others.
    """
    kind, first = entry["kind"], entry["seq"] == 0
    if first and kind != "header":
        contents.format, contents.attempts = 1, 1
    match kind:
        case "header" if first:
            _take_header(contents, entry)
        case "attempt" if contents.format == FORMAT and entry["number"] == contents.attempts + 1:
            contents.attempts += 1
            contents.research |= entry["research"]
            return {}
        case "train" | "analysis" if contents.attempts:
            event = Event(**{field.name: entry[field.name] for field in dataclasses.fields(Event)})
            contents.research |= event.research
            contents.events = merged([*contents.events, event])
            return entry if kind == "train" else lease
        case "returned" if lease and entry["lease"] == lease["seq"] and 0 < entry["count"] < lease["count"]:
            unused = Event(**{field.name: lease[field.name] for field in dataclasses.fields(Event)})
            contents.events = _without(contents.events, dataclasses.replace(unused, count=entry["count"]))
            return {}
        case _:
            raise ValueError("a kind that is unknown, or cannot stand here")
    return lease


def _take_header(contents: Contents, entry: dict[str, Any]) -> None:
    if entry["format"] != FORMAT:
        raise ValueError("a header of a format that had none")
    contents.run, contents.version = entry["run"], entry["dpquant"]
    if (plan := entry["plan"]) is not None:
        contents.budget = Budget(
            epsilon=math.inf if plan["epsilon"] is None else plan["epsilon"],
            delta=plan["delta"],
            events=tuple(Event(**event) for event in plan["events"]),
        )


def header(budget: Budget | None) -> dict[str, Any]:
    """Return the facts of a new ledger's first line."""
    names = ("kind", "sample_rate", "noise_multiplier", "count")
    plan = None
    if budget is not None:
        plan = {
            "epsilon": budget.epsilon if math.isfinite(budget.epsilon) else None,  # JSON has no infinity
            "delta": budget.delta,
            "events": [{name: getattr(event, name) for name in names} for event in budget.events],
        }
    return {
        "kind": "header",
        "format": FORMAT,
        "run": os.urandom(8).hex(),
        "plan": plan,
        "neighbours": NEIGHBOURS,
        "public": PUBLIC,
        "dpquant": version(),
    }


def _without(events: Iterable[Event], returned: Event) -> list[Event]:
    """Return the events less those that were given back."""
    same = dataclasses.replace(returned, count=1)
    return [
        dataclasses.replace(event, count=event.count - returned.count)
        if dataclasses.replace(event, count=1) == same
        else event
        for event in events
    ]


def line_of(entry: dict[str, Any]) -> tuple[bytes, str]:
    """Return a line without its newline, and its hash. Every float reads back as the same number."""
    digest = hashlib.sha256(json.dumps(entry).encode()).hexdigest()
    return json.dumps({**entry, "hash": digest}).encode(), digest
