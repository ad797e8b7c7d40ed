# SPDX-License-Identifier: Apache-2.0
"""Whole training steps on a GPU: plain PyTorch in three precisions, Opacus, and ours; checked before they are timed.

The check's loop over examples runs in IEEE float32, whatever torch permits by default.
"""

import dataclasses
import time
from collections.abc import Sequence

from benchmarks.gpu.report import Report
from dpquant.app.bench import BenchSettings, measure
from dpquant.app.contenders import GPU_SIDES
from dpquant.backends.precision import ieee_float32

STAGE = "steps"

# the most valuable first
CASES: tuple[BenchSettings, ...] = (
    BenchSettings(model="resnet18-cifar", batch_size=1024, physical_batch_size=256, rounds=5, device="cuda"),
    BenchSettings(model="bert-base", batch_size=64, physical_batch_size=16, rounds=5, device="cuda"),
    BenchSettings(model="resnet50", batch_size=128, image_size=224, physical_batch_size=32, rounds=3, device="cuda"),
)
_OURS, _OTHERS = ("full", "full, TF32", "most", "all"), ("plain", "plain, TF32", "plain, bfloat16", "opacus", "ghost")
RATIOS = (*((a, b) for a in _OTHERS for b in _OURS), ("full", "most"), ("full", "all"))


def run(report: Report, deadline: float, cases: Sequence[BenchSettings] = CASES) -> None:
    """Measure one case after another until the deadline (of `time.monotonic`), and put each into the report."""
    for settings in cases:
        if time.monotonic() > deadline:
            report.put(STAGE, settings.model, "not run: no time was left")
            continue
        with ieee_float32():
            record = measure(
                settings, sides=GPU_SIDES, ratios=RATIOS, watch=lambda what: print(f"  {what}", flush=True)
            )
        report.put(STAGE, settings.model, dataclasses.asdict(record))
        for row in record.table():
            print(" | ".join(row), flush=True)
