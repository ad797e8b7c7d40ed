# SPDX-License-Identifier: Apache-2.0
"""Which records a process can read, and which of a batch it takes.

    even     every process can read all records, and takes an equal share of each batch
    range    each process has records of its own, and takes those of them that were drawn

    range:   process         0              1                    2
             its records     0 ... n0 - 1   0 ... n1 - 1         0 ... n2 - 1      as its data set counts them
             record ids      0 ... n0 - 1   n0 ... n0 + n1 - 1   n0 + n1 ...       as sampler and keys count them

The ids of a range are those that one process would have with all data sets laid end to end. Every process draws from
the same stream, so that a record is drawn, rounded and augmented as in that process: by the key and its own id. A
process has no way to ask for a record outside of its range. What was drawn for the others, it drops.

The numbers of records travel between the processes, once, and are written nowhere.
"""

import dataclasses
from typing import Self

from torch import Tensor

from dpquant.errors import DataError, SettingError
from dpquant.privacy.mechanism import Sampler
from dpquant.training.distributed import Group
from dpquant.training.exchange import cut, share

EVEN, RANGE = PARTITIONS = ("even", "range")


@dataclasses.dataclass(frozen=True)
class Partition:
    """The records of one process.

    Attributes:
      ids: of the records that this process can read. Not for release, as their number is private.
      by_range: whether other processes have other records; False: all can read all of them.
    """

    ids: range
    by_range: bool = False

    @classmethod
    def of(cls, count: int, how: str, group: Group) -> Self:
        """Return the partition of this process. Every process calls this.

        Args:
          count: number of records of this process' data set.
          how: `even` or `range`.
          group: the processes.
        Raises:
          SettingError: on every process, if they were given different words.
          DataError: on every process, if none has a record.
        Privacy: with `range` the numbers of records are sent to the other processes, which are trusted.
        """
        answers = group.from_all(f"{how} {count if how == RANGE else 0}".encode())
        words, counts = zip(*(answer.decode().split() for answer in answers), strict=True)
        if len(set(words)) > 1:
            raise SettingError(
                f"Expected one partition on all processes; got {' and '.join(sorted(set(words)))}. Records would be "
                "drawn twice, or by nobody. Start all with the same arguments."
            )
        if how != RANGE:
            return cls(range(count))
        ends = [sum(map(int, counts[: rank + 1])) for rank in range(group.size)]
        if ends[-1] == 0:
            raise DataError("Expected train_set to hold a record on one process at least; got empty data sets.")
        return cls(range(ends[group.rank] - count, ends[group.rank]), by_range=True)

    def drawn(self, sampler: Sampler, sample_rate: float, *, stream: str, step: int, attempt: int) -> Tensor:
        """Return the ids of one Poisson batch, as far as this process can read its records.

        Args: as for `PoissonSampler.draw`.
        Returns: int64 `(b,)`, ascending; the ids that one process with all records draws, in this process' range.
        Privacy: per example, reads no record.
        """
        drawn = sampler.draw(self.ids.stop, sample_rate, stream=stream, step=step, attempt=attempt)
        return drawn[drawn >= self.ids.start] if self.by_range else drawn

    def share(self, record_ids: Tensor, group: Group) -> Tensor:
        """Return this process' share of what it has drawn: all of it, if the others have other records."""
        return record_ids if self.by_range else share(record_ids, group)

    def cut(self, record_ids: Tensor, group: Group, *, whole: bool) -> tuple[Tensor, slice]:
        """Return the ids that are cut into microbatches, and which of these are this process', as `exchange.cut`."""
        return (record_ids, slice(None)) if self.by_range else cut(record_ids, group, whole=whole)


def check_partition(how: str, *, exact_sums: bool) -> None:
    """Refuse a partition that does not exist, or whose sums cannot be exact.

    Raises:
      SettingError: it is another word, or `range` with exact sums.
    """
    if how not in PARTITIONS:
        raise SettingError(f"Expected partition to be one of {', '.join(PARTITIONS)}; got partition={how!r}.")
    if how == RANGE and exact_sums:
        raise SettingError(
            "Expected partition=even with exact_sums; got partition=range. Exact sums deal whole microbatches of a "
            "batch out to the processes, which then need each other's records. Leave one of them out; noise=discrete "
            "gives equal bits with either."
        )
