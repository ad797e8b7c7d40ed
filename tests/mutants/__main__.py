# SPDX-License-Identifier: Apache-2.0
"""Plants every bug of the tables, one after the other, and writes which test killed it: scripts/mutants [OPTIONS]."""

import argparse
import dataclasses
import fcntl
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from mutants.mutant import ROOT, Mutant
from mutants.page import page_of
from mutants.runner import Tree, outcome_of, warm_up
from mutants.table import MUTANTS

RESULTS = Path(__file__).parent / "results.json"
PAGE = ROOT / "docs" / "mutations.md"
JOB = "DPQUANT_MUTANTS_JOB"  # "k/n": which of several processes this one is


def main() -> int:
    options = _options()
    results = _read()
    left = [
        one for one in MUTANTS if options.only in f"{one.file} {one.name}" and _is_open(one, results, options.again)
    ]
    if left and not options.page and options.jobs > 1:
        _share(options.jobs)
    elif left and not options.page:
        left = _of_this_job(left)
        warm_up()
        with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
            tree = Tree(Path(folder) / "tree")
            if not options.no_baseline and not _passes_without(tree, left):
                return 1
            for number, mutant in enumerate(left, 1):
                outcome = outcome_of(tree, mutant)
                print(f"{number}/{len(left)} {outcome.outcome} {mutant.name} [{outcome.by or outcome.why}]", flush=True)
                _keep(dataclasses.asdict(outcome))
    if JOB in os.environ:
        return 0
    results = _read()
    PAGE.write_text(page_of(MUTANTS, results))
    alive = [one.key for one in MUTANTS if results.get(one.key, {}).get("outcome") != "killed"]
    print(
        f"{len(MUTANTS) - len(alive)} of {len(MUTANTS)} planted bugs are killed."
        + "".join(f"\n  {one}" for one in alive)
    )
    return int(bool(alive))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/mutants", description=__doc__)
    parser.add_argument("--only", default="", metavar="TEXT", help="bugs whose file or name holds this text")
    parser.add_argument("--again", action="store_true", help="also those that are killed already")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="number of processes that share the work")
    parser.add_argument("--no-baseline", action="store_true", help="do not show first that the tests pass unchanged")
    parser.add_argument("--page", action="store_true", help="plant nothing; write the page from the results there are")
    return parser.parse_args()


def _share(jobs: int) -> None:
    """Let several processes do the work: the first has the bugs in C++, because each of them builds for itself."""
    command = [sys.executable, "-m", "mutants", *sys.argv[1:], "--jobs", "1"]
    running = [subprocess.Popen(command, env={**os.environ, JOB: f"{job}/{jobs}"}) for job in range(jobs)]
    for process in running:
        process.wait()


def _of_this_job(mutants: list[Mutant]) -> list[Mutant]:
    """Return the share of this process."""
    job, jobs = map(int, os.environ.get(JOB, "0/1").split("/"))
    python = [one for one in mutants if not one.native]
    return [one for one in mutants if one.native and job == 0] + python[job::jobs]


def _read() -> dict[str, Any]:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def _is_open(mutant: Mutant, results: dict[str, Any], again: bool) -> bool:
    known = results.get(mutant.key, {})
    return again or known.get("digest") != mutant.digest or known.get("outcome") != "killed"


def _passes_without(tree: Tree, mutants: list[Mutant]) -> bool:
    """Whether all tests that have to notice a bug pass where there is none."""
    tests = sorted({test for one in mutants for test in one.tests})
    found = tree.run(tests, first_failure=False)
    if found["failed"] or found["refused"]:
        print(
            f"error: Expected the tests to pass without a bug; got {found['failed'] or found['refused']}",
            file=sys.stderr,
        )
        return False
    print(f"{found['passed']} tests pass without a bug.", flush=True)
    return True


def _keep(outcome: dict[str, Any]) -> None:
    """Write an outcome to the file of results, in the order of the table; other processes write to it, too."""
    with open(Path(__file__), "rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        results = {**_read(), outcome["key"]: outcome}
        ordered = {one.key: results[one.key] for one in MUTANTS if one.key in results}
        draft = RESULTS.with_name(f"{RESULTS.name}.tmp")
        draft.write_text(json.dumps(ordered, indent=1) + "\n")
        draft.replace(RESULTS)


sys.exit(main())
