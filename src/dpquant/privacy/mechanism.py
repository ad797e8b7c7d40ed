# SPDX-License-Identifier: Apache-2.0
"""What makes a run private, in one place: what draws records, what hides sums, what charges, and a secret.

    mechanism = Mechanism.secret(Path("run/ledger.jsonl"))      # fresh from the operating system
    mechanism = Mechanism.repeatable(7, None)                   # for research: the ledger says that it is not private

A run is given its mechanism and makes no part of it. Whoever resumes a run, spreads it over several processes or tests
it hands in parts of their own: the protocols below say what is asked of them.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, Self

from torch import Tensor

from dpquant.errors import LedgerError, SettingError
from dpquant.privacy.events import Event, Kind
from dpquant.privacy.ledger import Ledger
from dpquant.privacy.noise import NoiseSource
from dpquant.privacy.sampling import PoissonSampler
from dpquant.privacy.secret import SecretKey


class Sampler(Protocol):
    """Draws the records of a step, as `PoissonSampler` does."""

    @property
    def secure(self) -> bool:
        """False if the draws can be repeated by somebody who guesses a seed."""
        ...

    def draw(self, num_records: int, sample_rate: float, *, stream: str, step: int, attempt: int) -> Tensor:
        """Return the ids of the records drawn, int64 `(B,)`, as `PoissonSampler.draw`."""
        ...


class Noise(Protocol):
    """Draws Gaussian noise, as `NoiseSource` does."""

    @property
    def secure(self) -> bool:
        """False if the noise can be repeated by somebody who guesses a seed."""
        ...

    def gaussian(self, shape: Sequence[int], std: float, *, stream: str, step: int, attempt: int, name: str) -> Tensor:
        """Return independent N(0, std^2) entries, float32, as `NoiseSource.gaussian`."""
        ...


class Charges(Protocol):
    """Keeps what is charged, as `Ledger` does."""

    @property
    def research(self) -> bool:
        """Whether every charge is marked as not private."""
        ...

    @property
    def head(self) -> str:
        """The hash of the last charge's line."""
        ...

    def charge(self, *, kind: Kind, sample_rate: float, noise_multiplier: float, count: int = 1) -> None:
        """Record releases that are about to happen, as `Ledger.charge`."""
        ...

    def events(self) -> list[Event]:
        """Return everything charged so far."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mechanism:
    """What draws, what hides, and what charges, of one run.

    Attributes:
      sampler: draws the records of each step and analysis.
      noise: hides their sums.
      ledger: is charged before either is used.
      record_key: 64 bits, secret: key of everything that a record draws (rounding, dropout, augmentation).
    Raises:
      SettingError: draws can be repeated, and the ledger does not say so.
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
        """False if sampling or noise can be repeated: then nothing is private."""
        return self.sampler.secure and self.noise.secure and not self.ledger.research

    @classmethod
    def secret(cls, ledger: Path | None) -> Self:
        """Return a mechanism with randomness fresh from the operating system.

        Args:
          ledger: file for the charges, new or empty; its folder is made. None keeps them in memory.
        Raises:
          LedgerError: the file cannot be written, or already holds charges.
        Privacy: reads no data and charges nothing.
        """
        return cls.keyed(SecretKey(), ledger)

    @classmethod
    def repeatable(cls, seed: int, ledger: Path | None) -> Self:
        """Return a mechanism whose draws can be repeated, for research. NOT PRIVATE, and the ledger says so.

        Args and errors as of `secret`.
        """
        return cls.keyed(SecretKey.from_seed(seed), ledger)

    @classmethod
    def keyed(cls, key: SecretKey, ledger: Path | None) -> Self:
        """Return a mechanism all of whose randomness follows from one key; other arguments as of `secret`."""
        return cls(
            sampler=PoissonSampler(key),
            noise=NoiseSource(key),
            ledger=_opened(ledger, research=not key.secure),
            record_key=key.integer("records"),
        )


def _opened(path: Path | None, *, research: bool) -> Ledger:
    """Return a new ledger, in a folder that is made where there is none."""
    if path is not None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LedgerError(
                f"Expected a folder for the ledger; got {path.parent}: {error.strerror or error}. No data may be used "
                "without a ledger. Choose another place."
            ) from error
    return Ledger(path, research=research)
