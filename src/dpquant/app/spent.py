# SPDX-License-Identifier: Apache-2.0
"""`dpquant ledger` and `dpquant total`: verify the ledgers of runs and compose what they charged.

This module loads no torch.

Runs on the same data are composed: their events are one list, of which epsilon is computed. Tuning of hyper-parameters
is such a number of runs. Nothing but the ledgers enters, so that a run that crashed is accounted for as any other.
"""

import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

from dpquant.errors import SettingError
from dpquant.privacy import accounting
from dpquant.privacy.entries import Contents
from dpquant.privacy.events import Event, merged
from dpquant.privacy.ledger import Ledger
from dpquant.privacy.meaning import Meaning, meaning_of
from dpquant.privacy.plan import rounded_up
from dpquant.runs.names import LEDGER


def charged_by(ledgers: Iterable[Path]) -> list[Event]:
    """Return everything that runs on the same data have charged together, equal releases counted together.

    Args:
      ledgers: paths of their ledger files.
    Raises:
      LedgerError: a ledger is missing, unreadable or inconsistent.
    Privacy: post-processing.
    """
    return merged(event for ledger in ledgers for event in Ledger.read(ledger))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spent:
    """Budget that runs have spent, one run or several together.

    Attributes:
      events: what was charged, equal releases counted together.
      delta: at which epsilon is stated.
      epsilon: of all events.
      attempts: number of processes that charged.
      research: a part of the randomness came from a seed, so that epsilon is no guarantee.
    """

    events: Sequence[Event]
    delta: float
    epsilon: float
    attempts: int
    research: bool

    @classmethod
    def of(cls, contents: Sequence[Contents], delta: float) -> Self:
        """Return what ledgers say together."""
        events = merged(event for one in contents for event in one.events)
        return cls(
            events=events,
            delta=delta,
            epsilon=accounting.epsilon(events, delta),
            attempts=sum(one.attempts for one in contents),
            research=any(one.research for one in contents),
        )

    def count(self, kind: str) -> int:
        """Return the number of releases of a kind."""
        return sum(event.count for event in self.events if event.kind == kind)

    def facts(self) -> dict[str, Any]:
        """Return the facts for JSON. An epsilon that is not finite is null."""
        return {
            "epsilon": self.epsilon if math.isfinite(self.epsilon) else None,
            "delta": self.delta,
            "steps": self.count("train"),
            "analyses": self.count("analysis"),
            "attempts": self.attempts,
            "research": self.research,
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Account:
    """Result of `dpquant ledger`.

    Attributes:
      ledgers: {path of a ledger: what it says}, all of them verified.
      runs: {path of a ledger: what its run has spent}.
      together: what all runs have spent, if they used the same data.
    """

    ledgers: dict[Path, Contents]
    runs: dict[Path, Spent]
    together: Spent

    def to_json(self) -> str:
        """Return the account as JSON. Its head is that of a single ledger, null for several."""
        heads = [contents.head for contents in self.ledgers.values()]
        runs = [
            {
                "ledger": str(path),
                **self.runs[path].facts(),
                "planned_epsilon": _planned(contents),
                "head": contents.head,
                "format": contents.format,
                "run": contents.run,
                "dpquant": contents.version,
                "torn_bytes": contents.torn,
                "events": [dataclasses.asdict(event) for event in contents.events],
            }
            for path, contents in self.ledgers.items()
        ]
        facts = {**self.together.facts(), "head": heads[0] if len(heads) == 1 else None, "runs": runs}
        return json.dumps(facts, indent=2) + "\n"


def account(runs: Sequence[Path], delta: float | None = None) -> Account:
    """Verify the ledgers of runs and return what they have spent, each and together.

    Args:
      runs: run directories or ledger files, at least one.
      delta: at which epsilon is stated; None takes that of the plans.
    Raises:
      LedgerError: a ledger is not as it was written.
      SettingError: a path is missing or given twice, or no one delta is known.
    Privacy: post-processing.
    """
    ledgers: dict[Path, Contents] = {}
    for run in runs:
        path = _ledger_of(run)
        if any(path.samefile(other) for other in ledgers):
            raise SettingError(f"Expected every run once; got {run} twice. It would be counted twice. Leave one out.")
        ledgers[path] = Ledger.verify(path)
    return _composed(ledgers, delta)


def _composed(ledgers: dict[Path, Contents], delta: float | None) -> Account:
    """Return what verified ledgers say together; errors as for `account`."""
    deltas = {None if contents.budget is None else contents.budget.delta for contents in ledgers.values()}
    if delta is None and (len(deltas) != 1 or None in deltas):
        found = ", ".join("none" if one is None else f"{one:g}" for one in deltas)
        raise SettingError(
            f"Expected plans of one delta in the ledgers; got {found}. Epsilon is stated at a delta. Give --delta."
        )
    delta = next(iter(deltas)) if delta is None else delta
    assert delta is not None
    return Account(
        ledgers=ledgers,
        runs={path: Spent.of([contents], delta) for path, contents in ledgers.items()},
        together=Spent.of(list(ledgers.values()), delta),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Total:
    """Result of `dpquant total`.

    Attributes:
      account: of the runs, each counted once.
      meaning: of all together in risk; None if epsilon is infinite or nothing was released.
      notes: what was counted once or more often than it looks.
    """

    account: Account
    meaning: Meaning | None
    notes: list[str]

    @property
    def told(self) -> str:
        """The total in words."""
        together = self.account.together
        lines = [
            f"Whoever sees all of these runs: epsilon = {rounded_up(together.epsilon)} at delta = {together.delta:g}, "
            "for people who have one record in each run's data."
        ]
        lines += [] if self.meaning is None else [self.meaning.told]
        lines += ["NOT PRIVATE: sampling or noise of a run came from a given seed."] if together.research else []
        return " ".join([*lines, *(f"Note: {note}." for note in self.notes)])

    def to_json(self) -> str:
        """Return the total as JSON."""
        account = self.account
        runs = [
            {"ledger": str(path), "run": contents.run, "epsilon": account.runs[path].facts()["epsilon"]}
            for path, contents in account.ledgers.items()
        ]
        meaning = None if self.meaning is None else dataclasses.asdict(self.meaning)
        facts = {**account.together.facts(), "runs": runs, "meaning": meaning, "notes": self.notes}
        return json.dumps(facts, indent=2) + "\n"


def total(runs: Sequence[Path], delta: float | None = None) -> Total:
    """Return what runs on the same people cost together, each run counted once however often it is given.

    Args:
      runs: run directories or ledger files, at least one.
      delta: at which epsilon is stated; None takes that of the plans.
    Raises:
      LedgerError: a ledger is not as it was written.
      SettingError: a path is missing, or no one delta is known.
    Privacy: post-processing. Two states of one run, as a copy that was continued, both count: epsilon is too large
      then, and never too small.
    """
    heads: dict[str, Path] = {}
    names: dict[str, Path] = {}
    once: dict[Path, Contents] = {}
    notes = []
    for run in runs:
        path = _ledger_of(run)
        contents = Ledger.verify(path)
        if contents.head in heads and contents.num_lines:
            notes.append(f"{run} is the run in {heads[contents.head]}: it is counted once")
            continue
        if contents.run and contents.run in names:
            notes.append(f"{run} and {names[contents.run]} are two states of one run: both are counted")
        heads.setdefault(contents.head, run)
        names.setdefault(contents.run, run)
        once[path] = contents
    found = _composed(once, delta)
    return Total(account=found, meaning=meaning_of(found.together.events, found.together.delta), notes=notes)


def _ledger_of(run: Path) -> Path:
    """Return the path of a run's ledger; raise a SettingError if there is none."""
    path = run / LEDGER if run.is_dir() else run
    if not path.is_file():
        raise SettingError(f"Expected a run directory or a ledger file; got {run}. Check the path.")
    return path


def _planned(contents: Contents) -> float | None:
    budget = contents.budget
    return budget.epsilon if budget is not None and math.isfinite(budget.epsilon) else None
