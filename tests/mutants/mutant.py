# SPDX-License-Identifier: Apache-2.0
"""One planted bug: a text of a source file, what it becomes, and the tests that have to notice it."""

import dataclasses
import hashlib
from pathlib import Path

ROOT = Path(__file__).parents[2]

SAMPLING, NOISE, SENSITIVITY, COUPLING = "sampling", "noise", "sensitivity", "coupling"
ACCOUNTING, LEDGER, CHECKPOINT, RESUME = "accounting", "ledger", "checkpoint", "resume"
ANALYSIS, LEAK, WIRING, CLAIM, SECRET = "analysis", "leak", "wiring", "claim", "secret"


@dataclasses.dataclass(frozen=True)
class Mutant:
    """A planted bug.

    Attributes:
      name: what is wrong.
      kind: of the bug, one of the words above.
      file: in which it is planted, relative to the repository.
      old: text that stands in the file exactly once.
      new: what it becomes.
      tests: files or names of tests, as pytest takes them, of which at least one must fail.
    """

    name: str
    kind: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    @property
    def key(self) -> str:
        """File and name, by which results are kept."""
        return f"{self.file}: {self.name}"

    @property
    def native(self) -> bool:
        """Whether the native module has to be built again."""
        return self.file.startswith("native/")

    @property
    def digest(self) -> str:
        """Changes with every part of the mutant."""
        return hashlib.sha256(repr(dataclasses.astuple(self)).encode()).hexdigest()[:12]

    def planted_in(self, text: str) -> str:
        """Return the text of the file with the bug in it.

        Raises:
          ValueError: the old text does not stand there exactly once, or nothing would change.
        """
        if text.count(self.old) != 1 or self.old == self.new:
            raise ValueError(
                f"Expected {self.file} to hold the text of mutant '{self.name}' exactly once; got it "
                f"{text.count(self.old)} times. The file has changed. Change the mutant with it."
            )
        return text.replace(self.old, self.new)


def mutants_of(file: str, tests: str | tuple[str, ...], *rows: tuple) -> list[Mutant]:
    """Return the mutants of a file, from rows (name, kind, old, new) or (name, kind, old, new, other tests)."""
    made = []
    for name, kind, old, new, *others in rows:
        killers = others[0] if others else tests
        made.append(Mutant(name, kind, file, old, new, (killers,) if isinstance(killers, str) else tuple(killers)))
    return made
