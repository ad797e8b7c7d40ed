# SPDX-License-Identifier: Apache-2.0
"""The sums that a step makes of its records, and their noise, in the arithmetic that the plan's noise asks for.

plan.noise     sums       noise                                   what is released
gaussian       float32    NoiseSource.gaussian, float32           (sum + noise) / expected batch size
discrete       int64      NoiseSource.discrete, int64             (sum + noise) grid / expected batch size
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

from torch import Tensor

from dpquant.engine.batches import Microbatch
from dpquant.engine.clip import ClippedSum, clipped_sum_of
from dpquant.engine.grid_sum import grid_sum_of
from dpquant.engine.passes import Objective
from dpquant.errors import ModelError
from dpquant.privacy.mechanism import Noise
from dpquant.privacy.plan import PrivacyPlan
from dpquant.training.epoch import Batch
from dpquant.training.impact import ImpactSum, impact_sum


def step_sum(
    objective: Objective, pieces: Iterable[Microbatch], plan: PrivacyPlan, key: int, *, leaves_out: bool
) -> ClippedSum:
    """Return the sum of the records' clipped gradients; a parameter that none reached has zeros.

    Args: as for `clip.clipped_sum_of`.
    Privacy: per example. No noise is added here, and no event is charged.
    """
    norm = plan.max_grad_norm
    grid = plan.grid(plan.train_noise_std(norm))
    if grid is None:
        return clipped_sum_of(objective, pieces, max_grad_norm=norm, key=key, leaves_out=leaves_out, complete=False)
    return grid_sum_of(objective, pieces, max_grad_norm=norm, grid=grid, key=key, leaves_out=leaves_out)


def check_sensitivity(clipped: ClippedSum, plan: PrivacyPlan) -> None:
    """Raise a ModelError unless a sum has the sensitivity for which the plan's noise is drawn."""
    if clipped.sensitivity != plan.max_grad_norm:
        raise ModelError(f"Expected sums of sensitivity C, for which noise is drawn; got {clipped.sensitivity}.")


def analysis_sum(
    objective: Objective, pieces: Iterable[Microbatch], plan: PrivacyPlan, names: Sequence[str], keys: Sequence[int]
) -> ImpactSum:
    """Return the sum of the records' clipped impacts of these layers.

    Args:
      objective: model and loss.
      pieces: microbatches of one size.
      plan: has an analysis.
      names: of the layers, one policy for each.
      keys: secret keys of the roundings.
    Privacy: per example. No noise is added here, and no event is charged.
    """
    analysis = plan.analysis
    assert analysis is not None, "make_private refuses a policy that needs scores without an analysis"
    grid = plan.grid(plan.analysis_noise_std(analysis.max_norm))
    return impact_sum(
        objective, pieces, names=names, max_norm=analysis.max_norm, keys=keys, score=analysis.score, grid=grid
    )


def draws_of_noise(
    noise: Noise, plan: PrivacyPlan, batch: Batch, parameters: Mapping[str, Tensor]
) -> dict[str, Callable[[], Tensor]]:
    """Return {parameter's name: function that draws the noise of its sum}. It depends on no record."""
    of_step = {"stream": "train", "step": batch.step, "attempt": batch.attempt}
    if plan.noise == "discrete":
        return {name: partial(noise.discrete, p.shape, **of_step, name=name) for name, p in parameters.items()}
    std = plan.train_noise_std(plan.max_grad_norm)
    return {name: partial(noise.gaussian, p.shape, std, **of_step, name=name) for name, p in parameters.items()}


def analysis_noise(noise: Noise, plan: PrivacyPlan, batch: Batch, measured: ImpactSum) -> Tensor:
    """Return the noise of a sum of impacts, in its dtype. It depends on no record."""
    purpose = {"stream": "analysis", "step": batch.step, "attempt": batch.attempt, "name": "impacts"}
    if plan.noise == "discrete":
        return noise.discrete(measured.impacts.shape, **purpose)
    drawn = noise.gaussian(measured.impacts.shape, plan.analysis_noise_std(measured.sensitivity), **purpose)
    return drawn.to(measured.impacts.dtype)


def noisy_mean(noise: Tensor, total: Tensor, *, grid: float | None, expected: float) -> Tensor:
    """Return a sum plus its noise, over the expected batch size.

    Args:
      noise: of the sum; overwritten.
      total: the sum of what the records contribute.
      grid: what 1 stands for in integers; None: they are floats.
      expected: the plan's expected batch size.
    Returns: of the dtype of `noise`; for integers float64.
    Privacy: what the noise hides is hidden; without it, per example.
    """
    noisy = noise.add_(total)
    return noisy.div_(expected) if grid is None else noisy.double().mul_(grid / expected)
