# SPDX-License-Identifier: Apache-2.0
"""Runs the whole study on this machine, by Flower's simulation with Ray, and writes what came of it.

    python simulate.py FOLDER [--silos 2]

FOLDER/study.json has the course of the study and, for each silo, what its ledger says: each chain of hashes is
verified again, and epsilon recomputed from it.
"""

import argparse
import importlib.metadata
import json
import os
from pathlib import Path

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"  # read when Flower is imported
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import client
import server
from flwr.simulation import run_simulation
from study import STUDY

import dpquant
from dpquant.privacy import accounting


def main() -> None:
    """Run the study and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="new or empty")
    parser.add_argument("--silos", type=int, default=2)
    given = parser.parse_args()
    folder = given.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        parser.error(f"Expected folder to be new or empty; got {folder}. What a silo has spent there stays spent.")
    os.environ[client.HOME], os.environ[server.RESULT] = str(folder), str(folder / "course.json")
    run_simulation(
        server_app=server.app,
        client_app=client.app,
        num_supernodes=given.silos,
        backend_config={"client_resources": {"num_cpus": 1}},
    )
    record = {
        "study": vars(STUDY),
        "versions": {name: importlib.metadata.version(name) for name in ("dpquant", "flwr", "ray", "torch")},
        "course": json.loads((folder / "course.json").read_text()),
        "silos": [spent(folder / f"silo-{number}") for number in range(given.silos)],
    }
    (folder / "study.json").write_text(json.dumps(record, indent=2) + "\n")


def spent(home: Path) -> dict[str, object]:
    """Return what a silo's ledger says; a ledger that is not as it was written is an error."""
    contents = dpquant.Ledger.verify(home / "ledger.jsonl")
    events = dpquant.Ledger.read(home / "ledger.jsonl")
    return {
        "steps": sum(event.count for event in events),
        "processes": contents.attempts,
        "epsilon": accounting.epsilon(events, STUDY.delta),
        "head": contents.head,
    }


if __name__ == "__main__":
    main()
