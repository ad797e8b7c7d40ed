# SPDX-License-Identifier: Apache-2.0
"""All planted bugs, room by room."""

from mutants import app, backends, data, engine, native, privacy, runs, training
from mutants.mutant import Mutant

MUTANTS: list[Mutant] = [
    one for room in (privacy, engine, backends, native, data, training, runs, app) for one in room.MUTANTS
]
