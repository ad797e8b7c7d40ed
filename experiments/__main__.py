# SPDX-License-Identifier: Apache-2.0
"""Runs experiments, up to a time limit.

    python -m experiments all --hours 8 --gtsrb DIR --cifar10 DIR
    python -m experiments baselines formats

DIR holds train/CLASS/* and test/CLASS/* (GTSRB: 39,209 and 12,630 images of 43 classes, 32 x 32; CIFAR-10: 50,000 and
10,000 of 10). Fashion-MNIST's IDX files are found where Debian's dataset-fashion-mnist puts them, else downloaded.
`tables`, `text` and `transfer` use packages that are downloaded
before (experiments/README.md): --data-dir and --weights are the folders that hold them.
Finished runs are not repeated; results go to experiments/results. A table runs all rows at the first seed before other
seeds. With --hours, a table that is not finished lists its missing runs.
"""

import argparse
import importlib
import time
from pathlib import Path

from experiments.places import Places
from experiments.runner import FOLDERS, Site, chosen, committed, do_table, needed

TABLES = (
    "fashion_mnist",
    "baselines",
    "schedules",
    "scales",
    "networks",
    "formats",
    "ablation",
    "privacy",
    "optimizers",
    "tables",
    "text",
    "transfer",
)
SCRIPTS = (
    "variance",
    "ranking",
    "fidelity",
    "damage",
    "pareto",
    "logistic",
    "pictures",
    "paper",
)  # the last two draw and write what the others found; neither runs anything


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=("all", *TABLES, *SCRIPTS), metavar="NAME", help="or all")
    parser.add_argument("--hours", type=float, default=float("inf"), help="no run begins later than this")
    parser.add_argument("--jobs", type=int, default=2, help="parallel runs")
    parser.add_argument("--threads", type=int, help="of each run [its share of the cores]")
    parser.add_argument("--seeds", type=int, help="of each table, from its first [all]")
    parser.add_argument("--rows", default="*", help="pattern of TABLE/ROW, of the rows that are run [all]")
    parser.add_argument("--data-dir", type=Path, help="folder of downloaded packages with data")
    parser.add_argument("--weights", type=Path, help="folder of downloaded packages with weights")
    parser.add_argument("--continue", dest="keep", action="store_true", help="count runs in the results as done")
    parser.add_argument("--work", type=Path, default=Path("runs/experiments"))
    for name in FOLDERS:
        parser.add_argument(f"--{name.lower()}", type=Path, help=f"folder of {name}")
    arguments = parser.parse_args()
    folders = {name: path for name in FOLDERS if (path := getattr(arguments, name.lower())) is not None}
    deadline = time.monotonic() + 3600 * arguments.hours
    kept = committed() if arguments.keep else {}
    modules = {
        name: importlib.import_module(f"experiments.{name}")
        for name in ((*TABLES, *SCRIPTS) if "all" in arguments.names else arguments.names)
    }
    places = Places(arguments.work / "prepared", {False: arguments.data_dir, True: arguments.weights}, folders)
    for module in modules.values():
        wanted = (
            run for table in getattr(module, "TABLES", ()) for run in chosen(table, arguments.rows, arguments.seeds)
        )
        for name in dict.fromkeys((*getattr(module, "NEEDS", ()), *needed(wanted, kept, arguments.work))):
            places.make(name)
    site = Site(
        work=arguments.work,
        folders=places.folders,
        jobs=arguments.jobs,
        threads=arguments.threads,
        seeds=arguments.seeds,
        rows=arguments.rows,
        deadline=deadline,
        kept=kept,
    )
    for name, module in modules.items():
        if name in SCRIPTS:
            module.run(site)
        for table in getattr(module, "TABLES", ()):
            do_table(table, site)
    if site.failed:
        raise SystemExit(f"error: Failed runs: {len(site.failed)}. Each is named above, with its command.")


if __name__ == "__main__":
    main()
