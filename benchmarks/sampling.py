# SPDX-License-Identifier: Apache-2.0
"""Time and memory of drawing a Poisson batch: `scripts/bench sampling`.

Two ways take turns in one process: a random word for every record (dpquant's former sampler), and the gaps between the
records that are drawn. The same run checks the batches of both: ascending, in range, and as large as the binomial law
has them. Time is the processor's, in one thread, so that other work on the machine counts less.
"""

import argparse
import dataclasses
import json
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy import stats

from benchmarks.results import folder_here
from dpquant.app.bench import Spread
from dpquant.machine import Hardware
from dpquant.privacy.sampling import PoissonSampler
from dpquant.privacy.secret import SecretKey

CASES = [(1797, 0.1), (60_000, 1024 / 60_000), (1_000_000, 0.3), (1_000_000, 1e-3), (100_000_000, 1e-5)]
ALPHA = 1e-6  # probability of refusing a correct sampler
KEY = SecretKey.from_seed(0)

Sampler = Callable[[int, float, int], np.ndarray]


def by_words(num_records: int, rate: float, step: int) -> np.ndarray:
    """Draw a word for every record."""
    words = KEY.stream("sampling", "train", step, 0).words(num_records)
    return np.flatnonzero(words < int(rate * 2.0**64))


def by_gaps(num_records: int, rate: float, step: int) -> np.ndarray:
    """Draw from hit to hit, as runs do."""
    return PoissonSampler(KEY).draw(num_records, rate, stream="train", step=step, attempt=0).numpy()


SAMPLERS: dict[str, Sampler] = {"a word a record": by_words, "gaps": by_gaps}


def check(name: str, num_records: int, rate: float, batches: list[np.ndarray]) -> None:
    """Raise AssertionError unless the batches are what Poisson sampling gives."""
    for batch in batches:
        assert (np.diff(batch) > 0).all() and (not len(batch) or 0 <= batch[0] <= batch[-1] < num_records), name
    total = sum(map(len, batches))
    assert stats.binomtest(total, num_records * len(batches), rate).pvalue > ALPHA, f"{name}: {total} drawn"


def main() -> None:
    """Check and measure every case; print and keep the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    hardware, rows = Hardware.here(), []
    print(f"{hardware}{' (busy)' if hardware.busy else ''}")
    print(f"{'records':>11} {'q':>9}  {'way':<16}{'ms a draw, median [quartiles]':<32}{'peak MiB':>9}")
    for num_records, rate in CASES:
        seconds: dict[str, list[float]] = {name: [] for name in SAMPLERS}
        batches: dict[str, list[np.ndarray]] = {name: [] for name in SAMPLERS}
        for step in range(args.rounds + 1):  # the first round is not counted
            for name, sampler in SAMPLERS.items():
                began = time.process_time()
                batches[name].append(sampler(num_records, rate, step))
                seconds[name].append(time.process_time() - began)
        for name, sampler in SAMPLERS.items():
            check(name, num_records, rate, batches[name])
            tracemalloc.start()
            sampler(num_records, rate, 0)
            peak = tracemalloc.get_traced_memory()[1] / 2**20
            tracemalloc.stop()
            spread = Spread.of([1e3 * one for one in seconds[name][1:]])
            print(f"{num_records:>11} {rate:>9.3g}  {name:<16}{spread!s:<32}{peak:>9.2f}")
            facts = {"records": num_records, "rate": rate, "way": name, "peak_mib": peak}
            rows.append({**facts, "ms": dataclasses.asdict(spread), "rounds": args.rounds})
    record = {"hardware": dataclasses.asdict(hardware), "busy": hardware.busy, "clock": "processor", "rows": rows}
    (args.out or folder_here() / "sampling.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
