#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Write a SYNTHETIC table of card payments, of which one in fifty is a fraud: train.csv and test.csv.

python examples/fraud/make.py FOLDER [--records 60000] [--seed 0]

No record is real, nor drawn from real ones: amounts, hours and countries follow the made-up rules in `payment`.
"""

import argparse
import csv
import random
from pathlib import Path

COLUMNS = ("id", "amount", "hour", "age_days", "country", "channel", "merchant", "fraud")
COUNTRIES, CHANNELS = ("AT", "CH", "DE", "FR", "IT"), ("chip", "contactless", "web")
MERCHANTS = tuple(f"m{number:02}" for number in range(40))
FRAUDS = 0.02


def payment(number: int, draw: random.Random) -> tuple[object, ...]:
    """Return one payment. A fraud tends to a new account, the web, the night, a few merchants and a high amount."""
    fraud = draw.random() < FRAUDS
    marked = fraud and draw.random() < 0.8  # the others look like all payments
    return (
        number,
        round(draw.lognormvariate(4.6 if marked else 3.4, 1.0), 2),
        draw.choice((0, 1, 2, 3, 4, 23)) if marked and draw.random() < 0.6 else draw.randrange(24),
        "" if draw.random() < 0.05 else round(draw.expovariate(1 / 40 if marked else 1 / 700)),
        draw.choices((*COUNTRIES, "US"), (6, 1, 6, 2, 2, 3 if marked else 0.3))[0],
        "web" if marked and draw.random() < 0.8 else draw.choice(CHANNELS),
        draw.choice(MERCHANTS[:5]) if marked and draw.random() < 0.5 else draw.choice(MERCHANTS),
        "yes" if fraud else "no",
    )


def write(path: Path, first: int, count: int, draw: random.Random) -> None:
    """Write payments to a file."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows(payment(first + number, draw) for number in range(count))


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--records", type=int, default=60_000, help="of train.csv; test.csv has a fifth of it")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(given.seed)
    write(given.folder / "train.csv", 0, given.records, draw)
    write(given.folder / "test.csv", given.records, given.records // 5, draw)


if __name__ == "__main__":
    main()
