# SPDX-License-Identifier: Apache-2.0
"""The paper's main table on a GPU: ResNet18 at full width on GTSRB, epsilon = 8; as many runs as the time holds."""

import dataclasses
import functools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from experiments.runner import Run, Site, Table
from experiments.settings import EPSILON, GTSRB, SEEDS

from benchmarks.gpu.images import unpack
from benchmarks.gpu.report import Report

STAGE = "table"
KEPT = (
    *("accuracy_test", "epsilon", "epsilon_analysis_share", "quantized_fraction_macs", "four_bit_fraction_macs"),
    *("seconds_train", "seconds_analysis", "execution", "command"),
)

# ResNet18 as wide as torchvision's, layers chosen by the policy alone; the most valuable rows first
_COMMON = f"{GTSRB} {EPSILON} --width 1 --backend auto"
ROWS = {
    "full precision": "--policy none",
    "dpquant 0.9": "--policy dpquant --fraction 0.9",
    "static 0.9": "--policy static --fraction 0.9",
    "dpquant 0.5": "--policy dpquant --fraction 0.5",
    "static 0.5": "--policy static --fraction 0.5",
    "int4-clip, dpquant 0.9": "--policy dpquant --fraction 0.9 --format int4-clip",
    "int8, dpquant 0.9": "--policy dpquant --fraction 0.9 --format int8",
    "dpquant 0.75": "--policy dpquant --fraction 0.75",
    "static 0.75": "--policy static --fraction 0.75",
}
TABLE = Table(name="main", title="GTSRB, ResNet18, epsilon = 8", common=_COMMON, rows=ROWS, seeds=SEEDS)


def run(
    report: Report,
    deadline: float,
    images: Path | None,
    *,
    device: str = "cuda",
    table: Table = TABLE,
    launch: Callable[..., subprocess.CompletedProcess] = subprocess.run,
) -> None:
    """Train one run after another, as long as another of the longest one's time ends before the deadline.

    Args:
      report: gets each run's accuracy, epsilon and time.
      deadline: of `time.monotonic`.
      images: zip of the data set, ordinary or packed; None: nothing is run.
      device: of the training.
      table: the runs, in the order in which they are wanted.
      launch: runs a command, with the arguments of `subprocess.run`.
    """
    if images is None:
        report.put(STAGE, "note", "not run: no images were given")
        return
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        report.put(STAGE, "quality of the packed images", unpack(images, home / "images"))
        site = Site(work=home / "runs", folders={"GTSRB": home / "images"})
        longest = 0.0
        for one in table.runs():
            if time.monotonic() + longest > deadline:
                print(f"  no time for: {one.row}, seed {one.seed}", flush=True)
                continue
            began = time.monotonic()
            on_device = Run(one.row, one.seed, f"{one.options} --device {device}", one.program)
            limited = functools.partial(launch, timeout=max(deadline - began, 1))
            try:
                here = dataclasses.replace(site, launch=limited)
                here.do([on_device])
                failure = here.failed.get(on_device)
            except subprocess.TimeoutExpired as late:
                failure = str(late)
            if failure is not None:
                report.put(STAGE, f"{one.row}, seed {one.seed}", f"failed: {failure}")
                print(failure, file=sys.stderr)
                continue
            longest = max(longest, time.monotonic() - began)
            record = site.record(on_device)
            assert record is not None
            report.put(STAGE, f"{one.row}, seed {one.seed}", {name: record[name] for name in KEPT})
            print(f"  {one.row}, seed {one.seed}: {json.dumps(record['accuracy_test'])}", flush=True)
