# SPDX-License-Identifier: Apache-2.0
"""Runs `dpquant train` with scales over the whole microbatch, to compare with per-example scales. NOT PRIVATE.

    python -m experiments.per_tensor train OPTIONS

With these scales one example's largest value decides the rounding of every other example, so that clipping does not
bound its influence. The checks that examples are kept apart would refuse the run, so they are disabled. The record of
the run has no epsilon, and names the backend that shares scales. OPTIONS must not include --backend.
"""

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from dpquant.app import cli
from dpquant.backends.doubles import SharedScale
from dpquant.backends.registry import BACKENDS
from dpquant.checks import codes
from dpquant.training import trial, watch

NOT_PRIVATE = "NOT PRIVATE, whatever was printed before: scales were taken over the batch."


def main(arguments: list[str]) -> int:
    """Run the command line of `dpquant` with shared scales, and remove epsilon and statement from its record."""
    with checks_disabled(), mock.patch.dict(BACKENDS, shared_scales(), clear=True):
        code = cli.run(arguments)
    if code == 0:
        path = Path(arguments[arguments.index("--out") + 1]) / "record.json"
        record = json.loads(path.read_text())
        record |= {"epsilon": None, "epsilon_analysis_share": None, "statement": NOT_PRIVATE}
        record["per_epoch"] = [{**epoch, "epsilon": None} for epoch in record["per_epoch"]]
        path.write_text(json.dumps(record, indent=2) + "\n")
        print(NOT_PRIVATE)
    return code


@contextlib.contextmanager
def checks_disabled() -> Iterator[None]:
    """Context: nothing refuses a run in which one example influences another's rounding."""
    with (
        mock.patch.object(codes, "_check_codes"),
        mock.patch.object(codes, "_check_quantized_losses"),
        mock.patch.object(trial, "check_at_size"),
        mock.patch.object(watch, "keeps_apart", return_value=True),
    ):
        yield


def shared_scales() -> dict[str, SharedScale]:
    """Return {name: backend} with one scale over the batch, for every backend."""
    doubles = [SharedScale(backend) for backend in BACKENDS.values()]
    return {double.name: double for double in doubles}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
