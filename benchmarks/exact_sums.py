# SPDX-License-Identifier: Apache-2.0
"""What exact sums cost: steps with and without them, in turns, in one process: `scripts/bench exact_sums`.

    scripts/bench exact_sums
    scripts/bench exact_sums --model text --batch-size 64 --microbatch-size 8 --rounds 20

Both runs have the same parameters, seed, microbatches and choices, so that they draw the same records and noise. Which
of them takes its step first changes from round to round. The ratio is that of each round, with its quartiles.

In the first step the exact sum must be the float32 sum of the same microbatches at the same clipping norm,
C (1 - 2^-17), within half a step of the grid a value and microbatch and the rounding of float32. The same float32 sum
on a grid of C 2^-12 must not be, or the comparison would say nothing.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.distributed import MODELS, run_of
from benchmarks.results import keep_rows
from dpquant.app.bench import Spread
from dpquant.engine.batches import Microbatch
from dpquant.engine.clip import ClippedSum, clipped_sum_of
from dpquant.engine.exact_sum import exact_grid, on_grid
from dpquant.machine import now
from dpquant.training.private import PrivateTraining

SIDES = ("plain", "exact")
_MARGIN = 2.0**-17  # of the clipping norm, to which records are clipped less in exact sums
_FLOAT = 2.0**-21  # of a sum's norm: what float32 may lose where microbatches are added up


def flat(sums: Mapping[str, Tensor]) -> Tensor:
    """Return sums end to end, float64 `(P,)`."""
    return torch.cat([one.double().flatten() for one in sums.values()])


def agreement(run: PrivateTraining, pieces: list[Microbatch], key: int, exact: ClippedSum) -> dict[str, float]:
    """Return how far an exact sum lies from the float32 sum of the same microbatches, and how far it may.

    Raises SystemExit if it lies further, or if a coarse grid would be taken for an exact one.
    """
    norm = run.plan.max_grad_norm
    plain = flat(clipped_sum_of(run._objective, pieces, max_grad_norm=norm * (1 - _MARGIN), key=key).grads)
    assert exact.grid is not None and exact.grid == exact_grid(norm), "the sum is not an exact one"
    found = float((plain - flat(exact.grads) * exact.grid).norm())
    allowed = len(pieces) * math.sqrt(len(plain)) * exact.grid / 2 + _FLOAT * float(plain.norm())
    coarse = norm * 2.0**-12
    control = float((plain - on_grid(plain, coarse).double() * coarse).norm())
    if not 0 < found <= allowed < control:
        raise SystemExit(
            f"Expected sums that differ by {allowed:.3g} at most, and by more on a coarse grid; got {found:.3g} and "
            f"{control:.3g}."
        )
    return {"distance": found, "allowed": allowed, "coarse_grid": control, "norm": float(plain.norm())}


def first_step(run: PrivateTraining, batch: Any) -> dict[str, float]:
    """Take a step with exact sums, and return how well its sum agrees with that of floats."""
    honest, noted = run._clipped_sum, []

    def noting(pieces: Iterable[Microbatch], key: int) -> ClippedSum:
        pieces = list(pieces)
        found = honest(pieces, key)
        noted.append(agreement(run, pieces, key, found))
        return found

    run._clipped_sum = noting
    run.step(batch)
    del run._clipped_sum
    return noted[0]


def _batches(run: PrivateTraining) -> Iterator[Any]:
    for epoch in run.epochs():
        yield from epoch


def measured(model: str, given: argparse.Namespace) -> dict[str, Any]:
    """Return the times of both sides with one model."""
    settings = {"microbatch_size": given.microbatch_size}
    plain = run_of(model, given.batch_size, given.format, **settings)
    exact = run_of(model, given.batch_size, given.format, **settings, exact_sums=True, choices=plain.choices)
    exact.replace_weights(plain.model.state_dict())
    runs = dict(zip(SIDES, (plain, exact), strict=True))
    batches = {name: _batches(run) for name, run in runs.items()}
    found: dict[str, dict[str, list[float]]] = {name: {"seconds": [], "processor_seconds": []} for name in SIDES}
    microbatches, agrees = -(-given.batch_size // given.microbatch_size), {}
    for number in range(given.rounds + 1):
        for name in sorted(SIDES, reverse=number % 2 == 1):
            batch, began, used = next(batches[name]), now(), time.process_time()
            if number == 0 and name == "exact":
                agrees = first_step(exact, batch)
                continue
            runs[name].step(batch)
            if number:  # the first fills caches
                found[name]["seconds"].append(now() - began)
                found[name]["processor_seconds"].append(time.process_time() - used)
    ratios = {
        clock: [e / p for e, p in zip(found["exact"][clock], found["plain"][clock], strict=True)]
        for clock in ("seconds", "processor_seconds")
    }
    return {
        "model": model,
        "values": sum(p.numel() for p in plain.model.parameters() if p.requires_grad),
        "batch_size": given.batch_size,
        "microbatches": microbatches,
        "format": given.format,
        "agreement": agrees,
        "sides": found,
        "ratio": {clock: vars(Spread.of(values)) for clock, values in ratios.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, help="one of them alone")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--microbatch-size", type=int, default=32)
    parser.add_argument("--format", default="int8", help="or full")
    parser.add_argument("--rounds", type=int, default=11)
    given = parser.parse_args()
    rows = []
    for model in [given.model] if given.model else MODELS:
        row = measured(model, given)
        rows.append(row)
        spread = Spread(**row["ratio"]["seconds"])
        print(f"{model}: exact over plain {spread}, {row['microbatches']} microbatches", file=sys.stderr, flush=True)
        keep_rows("exact_sums", rows, given.rounds)
    print(json.dumps([{k: v for k, v in row.items() if k != "sides"} for row in rows], indent=1))


if __name__ == "__main__":
    main()
