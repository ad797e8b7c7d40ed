# SPDX-License-Identifier: Apache-2.0
"""The numbers of an epoch under the names that every tracker uses."""

import math

from dpquant.privacy.plan import PrivacyPlan
from dpquant.runs.record import EpochRecord
from dpquant.runs.sinks import Progress


def numbers_of(epoch: EpochRecord, progress: Progress | None, plan: PrivacyPlan) -> dict[str, float]:
    """Return {name: number} for an epoch that has ended.

    Args:
      epoch: what came of it.
      progress: after its last step; None: this process has taken none of its steps.
      plan: of the run.
    Returns: `accuracy/test` and the other metrics of the task, `privacy/epsilon`, `privacy/epsilon_budget`,
      `quantized/macs` in 0..1 and, of an epoch with an analysis, `score/LAYER`. Of the two arguments' fields that are
      not for release, those that are there: `unsafe/accuracy_train` and `speed/examples_per_second`.
    Privacy: post-processing, but for these two.
    """
    found: dict[str, float | None] = {"accuracy/test": epoch.accuracy_test}
    found |= {f"{name}/test": value for name, value in (epoch.metrics_test or {}).items()}
    found |= {"privacy/epsilon": epoch.epsilon, "privacy/epsilon_budget": plan.epsilon}
    found |= {f"score/{layer}": value for layer, value in (epoch.scores or {}).items()}
    if progress is not None:
        found["quantized/macs"] = progress.macs_quantized
        if not math.isnan(progress.examples_per_second):
            found["speed/examples_per_second"] = progress.examples_per_second
    found["unsafe/accuracy_train"] = epoch.nonprivate_accuracy_train
    return {name: value for name, value in found.items() if value is not None}
