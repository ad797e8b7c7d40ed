# SPDX-License-Identifier: Apache-2.0
"""What a report is made of, and the warnings that follow from it. All of it is released."""

import dataclasses
import math
from collections.abc import Sequence

from dpquant.privacy.events import Event
from dpquant.privacy.meaning import Attack, Details, Meaning, too_large
from dpquant.privacy.plan import rounded_up
from dpquant.runs.alerts import UNSAFE
from dpquant.runs.description import ModelDescription
from dpquant.runs.evaluated import Evaluation
from dpquant.runs.record import RunRecord


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """Something that was recomputed, and whether it is as the run says."""

    what: str
    holds: bool
    detail: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Named:
    """How many people the best attacker names as members of the data.

    Attributes:
      wrongly: of 1,000 who are none.
      rightly: of 1,000 who are, at most.
      right: of 100 people whom he names, if as many are members as not, at most.
    """

    wrongly: int
    rightly: int
    right: int

    @classmethod
    def of(cls, attack: Attack) -> "Named":
        """Return the numbers of an attack, the last two rounded up."""
        wrong, found = attack.false_positive_rate, min(1.0, attack.true_positive_rate)
        return cls(
            wrongly=round(1000 * wrong),
            rightly=min(1000, math.ceil(1000 * found)),
            right=math.ceil(100 * found / (found + wrong)),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known about one run.

    Attributes:
      name: of the run, as its reader knows it.
      record: of the run.
      record_sha256: of the file of the record.
      events: what the ledger charged, from the record or the ledger; None: neither says.
      checks: what `dpquant verify` recomputed.
      meaning: of the run's epsilon; None: it is infinite or not known.
      details: for persons and other deltas; None: as for meaning.
      description: of the model; None: not recorded.
      settings: text of config.toml; None: left out, or not there.
      redacted: command, folders and declared words were left out.
      evaluation: what was measured on test records; None: it was not.
    """

    name: str
    record: RunRecord
    record_sha256: str
    events: Sequence[Event] | None
    checks: Sequence[Check]
    meaning: Meaning | None
    details: Details | None
    description: ModelDescription | None
    settings: str | None
    redacted: bool
    evaluation: Evaluation | None = None

    @property
    def wrong(self) -> list[Check]:
        """The checks that do not hold."""
        return [one for one in self.checks if not one.holds]

    @property
    def records_per_person(self) -> int | None:
        """Declared number of records of a person; None: not known."""
        return None if self.record.plan is None else self.record.plan.records_per_person

    @property
    def research(self) -> bool:
        """Whether a part of the randomness came from a known seed."""
        return "NOT PRIVATE" in self.record.statement

    @property
    def void(self) -> bool:
        """Whether nothing is promised, whatever number epsilon is."""
        return self.research or "DOES NOT HOLD" in self.record.statement or not math.isfinite(self.record.epsilon)

    @property
    def promise(self) -> str:
        """What the run promises, in one sentence; that it promises nothing, if it does not."""
        if self.void:
            return "Nothing is promised about the records of this run: see above."
        epsilon, delta = rounded_up(self.record.epsilon), f"{self.record.delta:g}"
        claimed = "is said to limit" if self.wrong else "limits"
        return (
            f"The training {claimed} what anybody can learn about whether one record was in the data, and so about "
            "its contents; even one who has the model and this report and knows every other record. It does not rule "
            "it out: the table has the limit. In technical terms: differential privacy with "
            f"epsilon = {epsilon} and delta = {delta}."
        )

    def attacks(self) -> list[Named]:
        """Return how many people an attacker names, each number rounded up."""
        return [Named.of(one) for one in self.meaning.attacks] if self.meaning else []

    def alarms(self) -> list[str]:
        """Return what makes the guarantee void or weaker than it looks, the gravest first."""
        record, found = self.record, []
        if "DOES NOT HOLD" in record.statement:
            found.append("The guarantee does not hold: the run found that its model mixes records. See the statement.")
        if self.research:
            found.append("Not private: sampling or noise came from a known seed. Whoever knows it can undo the noise.")
        if self.wrong:
            found.append(
                f"{len(self.wrong)} of {len(self.checks)} checks do not hold: the files of this run do not agree with "
                "one another. Do not sign this page."
            )
        if record.unsafe_metrics:
            found.append(UNSAFE)
        if not math.isfinite(record.epsilon):
            found.append("Epsilon is infinite: nothing is promised.")
        if warning := too_large(record.delta, record.records):
            found.append(warning)
        return found

    def mistaken(self, place: int) -> str:
        """Return for what a class was taken most often when it was not told correctly, and how often."""
        assert self.evaluation is not None and self.evaluation.classes is not None and self.evaluation.confusion
        row = self.evaluation.confusion[place]
        wrong = [(count, other) for other, count in enumerate(row) if count and other != place]
        if not wrong:
            return "none"
        count, other = max(wrong)
        return f"{self.evaluation.classes[other].name} ({count:,})"

    def persons(self) -> list[tuple[int, str]]:
        """Return (number of records, epsilon) of persons with several records."""
        if self.details is None:
            return []
        return [(one.records, rounded_up(one.epsilon, 2)) for one in self.details.persons]
