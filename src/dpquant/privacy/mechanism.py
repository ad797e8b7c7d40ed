# SPDX-License-Identifier: Apache-2.0
"""The parts that make a run private: a sampler, a noise source, a ledger and a secret key.

    mechanism = Mechanism.secret(Path("run/ledger.jsonl"))      # fresh from the operating system
    mechanism = Mechanism.secret(Ledger.resumed(path))          # the same ledger, another key: a run that continues
    mechanism = Mechanism.repeatable(7, None)                   # for research: the ledger says that it is not private

A run is given its mechanism and creates no part of it. Code that resumes a run, runs it on several processes or tests
it passes its own parts, which implement the protocols below.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, Self

from torch import Tensor

from dpquant.errors import SettingError
from dpquant.privacy.events import Event, Kind
from dpquant.privacy.ledger import Ledger
from dpquant.privacy.noise import NoiseSource
from dpquant.privacy.sampling import PoissonSampler
from dpquant.privacy.secret import SecretKey


class Sampler(Protocol):
    """A source of Poisson batches: `PoissonSampler`, for one."""

    @property
    def secure(self) -> bool:
        """False if somebody who guesses a seed can repeat the draws."""
        ...

    def draw(self, num_records: int, sample_rate: float, *, stream: str, step: int, attempt: int) -> Tensor:
        """Return the ids of the records drawn, int64 `(B,)`. Arguments are those of `PoissonSampler.draw`."""
        ...


class Noise(Protocol):
    """A source of noise: `NoiseSource`, for one."""

    @property
    def secure(self) -> bool:
        """False if somebody who guesses a seed can repeat the noise."""
        ...

    def gaussian(
        self,
        shape: Sequence[int],
        std: float,
        *,
        stream: str,
        step: int,
        attempt: int,
        name: str,
        part: slice | None = None,
    ) -> Tensor:
        """Return independent N(0, std^2) entries, float32. Arguments are those of `NoiseSource.gaussian`."""
        ...

    def discrete(
        self,
        shape: Sequence[int],
        *,
        stream: str,
        step: int,
        attempt: int,
        name: str,
        part: slice | None = None,
    ) -> Tensor:
        """Return integers from the discrete Gaussian, int64. Arguments are those of `NoiseSource.discrete`."""
        ...


class Charges(Protocol):
    """A record of charges: `Ledger`, for one."""

    @property
    def research(self) -> bool:
        """Whether every charge is marked as not private."""
        ...

    @property
    def head(self) -> str:
        """The hash of the last charge's line."""
        ...

    def charge(self, *, kind: Kind, sample_rate: float, noise_multiplier: float, count: int = 1) -> None:
        """Record releases that are about to happen. Arguments are those of `Ledger.charge`."""
        ...

    def events(self) -> list[Event]:
        """Return every event charged so far."""
        ...

    def charged(self, kind: Kind) -> int:
        """Return how many releases of a kind were charged, in all processes of the run."""
        ...

    def settle(self) -> None:
        """Give back what was charged ahead and not used."""
        ...

    def close(self) -> None:
        """Settle, and charge nothing more."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mechanism:
    """The sampler, noise source, ledger and secret key of one run.

    Attributes:
      sampler: draws the records of each step and analysis.
      noise: gives the noise that is added to their sums.
      ledger: is charged before sampler and noise are used.
      record_key: 64 bits, secret: key of every random number that is drawn for a record (rounding, dropout,
        augmentation).
    Raises:
      SettingError: sampler or noise can be repeated, and the ledger is not marked as research.
    """

    sampler: Sampler
    noise: Noise
    ledger: Charges
    record_key: int = dataclasses.field(repr=False)

    def __post_init__(self) -> None:
        if not (self.sampler.secure and self.noise.secure) and not self.ledger.research:
            raise SettingError(
                "Expected a ledger that is marked as research; got one that is not, with sampling or noise from a "
                "seed. Its charges would look private, and they are not. Open the ledger with research=True."
            )

    @property
    def secure(self) -> bool:
        """False if sampling or noise can be repeated. Then the run is not private."""
        return self.sampler.secure and self.noise.secure and not self.ledger.research

    @property
    def repeats(self) -> bool:
        """Whether all draws come from a given seed."""
        return not (self.sampler.secure or self.noise.secure)

    @classmethod
    def secret(cls, ledger: Ledger | Path | None) -> Self:
        """Return a mechanism with randomness fresh from the operating system.

        Args:
          ledger: an open ledger, or a file for a new one without a budget, whose folder is created. None keeps the
            charges in memory.
        Raises:
          LedgerError: the file cannot be written, or already holds charges.
        Privacy: reads no data and charges nothing.
        """
        return cls.keyed(SecretKey(), ledger)

    @classmethod
    def repeatable(cls, seed: int, ledger: Ledger | Path | None) -> Self:
        """Return a mechanism whose draws can be repeated, for research. NOT PRIVATE, and the ledger says so.

        Args:
          seed: decides all draws.
          ledger: as for `secret`; an open one must be marked as research.
        Raises:
          LedgerError: the file cannot be written, or already holds charges.
        """
        return cls.keyed(SecretKey.from_seed(seed), ledger)

    @classmethod
    def keyed(cls, key: SecretKey, ledger: Charges | Path | None) -> Self:
        """Return a mechanism that derives all of its randomness from one key.

        Args:
          key: the key; a new ledger is marked as research unless it is secure.
          ledger: as for `secret`.
        Raises:
          LedgerError: the file cannot be written, or already holds charges.
        """
        return cls(
            sampler=PoissonSampler(key),
            noise=NoiseSource(key),
            ledger=Ledger(ledger, research=not key.secure) if ledger is None or isinstance(ledger, Path) else ledger,
            record_key=key.integer("records"),
        )
