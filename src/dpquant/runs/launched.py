# SPDX-License-Identifier: Apache-2.0
"""How this process was started: by torchrun as one of several processes of a run, or alone. Loads no torch."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from dpquant.errors import SettingError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Launch:
    """What torchrun tells a process that it starts.

    Attributes:
      rank: number of this process, from 0, among all of the run.
      size: their number.
      local_rank: number of this process among those of its machine.
      local_size: their number.
      attempt: number of the present start, from 0; torchrun starts all processes again when one has ended badly.
      run_id: name of the run, the same for all processes and attempts; empty where torchrun was given none.
      one_thread: OMP_NUM_THREADS is 1, which torchrun sets where it is not set.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    attempt: int = 0
    run_id: str = ""
    one_thread: bool = False

    @classmethod
    def here(cls, environment: Mapping[str, str] = os.environ) -> Self:
        """Return what the environment says."""

        def number(name: str, otherwise: int) -> int:
            text = environment.get(name, "")
            return int(text) if text.isdecimal() else otherwise

        size, run_id = number("WORLD_SIZE", 1), environment.get("TORCHELASTIC_RUN_ID", "none")
        if size <= 1:
            return cls()
        return cls(
            rank=number("RANK", 0),
            size=size,
            local_rank=number("LOCAL_RANK", 0),
            local_size=number("LOCAL_WORLD_SIZE", 1),
            attempt=number("TORCHELASTIC_RESTART_COUNT", 0),
            run_id="" if run_id == "none" else run_id,
            one_thread=environment.get("OMP_NUM_THREADS") == "1",
        )

    @property
    def speaks(self) -> bool:
        """Whether errors that all processes have are this one's to print: those of the first one on each machine."""
        return self.local_rank == 0

    def threads(self, cores: int) -> int | None:
        """Return the number of threads that is this process' part of the machine's; None leaves the number as it is.

        torchrun sets OMP_NUM_THREADS to 1 where it starts several processes, whatever the machine has. Another number
        is the user's own.
        """
        own = max(cores // self.local_size, 1)
        return own if self.size > 1 and self.one_thread and own > 1 else None

    def folder(self, name: str) -> Path:
        """Return the run directory of a run on this data, for which the user gave none.

        All processes, and all attempts, have to find the same one.

        Raises:
          SettingError: torchrun was given no name that they share.
        """
        if not self.run_id:
            raise SettingError(
                "Expected out or a name of the run under torchrun; got neither. A process that is started again could "
                "not find its run. Give --out RUN, or --rdzv-id NAME to torchrun."
            )
        return Path("runs") / f"{name}-{self.run_id[:8]}"
