# SPDX-License-Identifier: Apache-2.0
"""Whether a private step has become slower than in an older checkout: scripts/smoke-bench.

Both versions run in this process and take steps in turns, as in `benchmarks.before_after`, with networks so small that
it takes half a minute. What seems slower is measured again, twice as long, before it counts: one interruption is no
regression. Results may differ; that is for the tests.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.before_after import compared, load, loaded, native_in
from dpquant.data.models import build

SLOWER = 1.2  # times as long as before: a regression
_STEPS = 16

Records = list[tuple[Tensor, int]]


def networks() -> Iterator[tuple[str, nn.Module, Records]]:
    """Yield (name, network, records)."""
    torch.manual_seed(0)
    network = build("cnn", num_classes=10, input_shape=(3, 16, 16), width=0.5)
    yield "cnn", network, [(image, number % 10) for number, image in enumerate(torch.randn(512, 3, 16, 16))]
    mlp = nn.Sequential(nn.Linear(30, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    yield "mlp", mlp, [(row, number % 10) for number, row in enumerate(torch.randn(512, 30))]


def regressions(quotient: Callable[[str, int], float], names: list[str], steps: int = _STEPS) -> list[str]:
    """Return what is slower than `SLOWER` allows, in words.

    Args:
      quotient: measures (name, number of steps): older time over newer time.
      names: of what is measured.
      steps: of the first measurement.
    """
    found = []
    for name in names:
        first = quotient(name, steps)
        told = f"{name}: the older version takes {first:.2f} times as long"
        if first < 1 / SLOWER:
            second = quotient(name, 2 * steps)
            told += f", measured again {second:.2f}"
            if second < 1 / SLOWER:
                found.append(f"{name} takes {1 / second:.2f} times as long as before")
        print(told, flush=True)
    return found


def main() -> int:
    """Compare, print, and return the exit code: 1 for a regression."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", type=Path, required=True, help="a checkout of the older version")
    parser.add_argument("--native", type=Path, help="folder where its kernels are installed [those of this version]")
    args = parser.parse_args()
    old = load(args.old, None if args.native is None else native_in(args.native))
    new = loaded()
    cases = {
        f"{name}, {policy}": (network, data, policy)
        for name, network, data in networks()
        for policy in ("NonePolicy", "AllPolicy")
    }

    def quotient(name: str, steps: int) -> float:
        network, data, policy = cases[name]
        return compared(old, new, network, data, policy, steps, "any")["old_over_new"]["median"]

    found = regressions(quotient, list(cases))
    for one in found:
        print(f"error: {one}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
