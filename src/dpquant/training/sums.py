# SPDX-License-Identifier: Apache-2.0
"""The sums that a step makes of its records, and their noise, in the arithmetic that the plan's noise asks for.

plan.noise     sums       noise                                   what is released
gaussian       float32    NoiseSource.gaussian, float32           (sum + noise) / expected batch size
  exact sums   int64      NoiseSource.gaussian, float32           (sum grid + noise) / expected batch size
discrete       int64      NoiseSource.discrete, int64             (sum + noise) grid / expected batch size
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

from torch import Tensor

from dpquant.engine.batches import Microbatch
from dpquant.engine.clip import ClippedSum, clipped_sum_of
from dpquant.engine.exact_sum import exact_grid, exact_sum_of
from dpquant.engine.grid_sum import grid_sum_of
from dpquant.engine.passes import Objective
from dpquant.errors import ModelError
from dpquant.privacy.mechanism import Noise
from dpquant.privacy.plan import PrivacyPlan
from dpquant.training.epoch import Batch
from dpquant.training.exchange import Noised
from dpquant.training.impact import ImpactSum, impact_sum


def step_sum(
    objective: Objective,
    pieces: Iterable[Microbatch],
    plan: PrivacyPlan,
    key: int,
    *,
    leaves_out: bool,
    exact: bool = False,
) -> ClippedSum:
    """Return the sum of the records' clipped gradients; a parameter that none reached has zeros.

    Args: as for `clip.clipped_sum_of`; `exact` as in `engine/exact_sum.py`. With discrete noise all sums are exact.
    Privacy: per example. No noise is added here, and no event is charged.
    """
    norm = plan.max_grad_norm
    grid = plan.grid(plan.train_noise_std(norm))
    if grid is None and exact:
        return exact_sum_of(objective, pieces, max_grad_norm=norm, key=key, leaves_out=leaves_out)
    if grid is None:
        return clipped_sum_of(objective, pieces, max_grad_norm=norm, key=key, leaves_out=leaves_out, complete=False)
    return grid_sum_of(objective, pieces, max_grad_norm=norm, grid=grid, key=key, leaves_out=leaves_out)


def check_sensitivity(clipped: ClippedSum, plan: PrivacyPlan) -> None:
    """Raise a ModelError unless a sum has the sensitivity for which the plan's noise is drawn."""
    if clipped.sensitivity != plan.max_grad_norm:
        raise ModelError(f"Expected sums of sensitivity C, for which noise is drawn; got {clipped.sensitivity}.")


def analysis_sum(
    objective: Objective,
    pieces: Iterable[Microbatch],
    plan: PrivacyPlan,
    names: Sequence[str],
    keys: Sequence[int],
    *,
    exact: bool = False,
) -> ImpactSum:
    """Return the sum of the records' clipped impacts of these layers.

    Args:
      objective: model and loss.
      pieces: microbatches of one size.
      plan: has an analysis.
      names: of the layers, one policy for each.
      keys: secret keys of the roundings.
      exact: add integers: each record's impacts are rounded to a grid, towards zero.
    Privacy: per example. No noise is added here, and no event is charged.
    """
    analysis = plan.analysis
    assert analysis is not None, "make_private refuses a policy that needs scores without an analysis"
    grid = plan.grid(plan.analysis_noise_std(analysis.max_norm))
    if grid is None and exact:
        grid = exact_grid(analysis.max_norm)
    return impact_sum(
        objective, pieces, names=names, max_norm=analysis.max_norm, keys=keys, score=analysis.score, grid=grid
    )


def draws_of_noise(
    noise: Noise,
    plan: PrivacyPlan,
    batch: Batch,
    parameters: Mapping[str, Tensor],
    parts: Mapping[str, slice] | None = None,
) -> dict[str, Callable[[], Tensor]]:
    """Return {parameter's name: function that draws the noise of its sum}. It depends on no record.

    Args:
      noise: the run's noise.
      plan: decides its law and its size.
      batch: of the step; its records are not used.
      parameters: whose shapes the sums have.
      parts: {name: the part of the flattened tensor to draw for}; parameters without one are missing from the result.
        None: all of each, in its shape.
    """
    of_step = {"stream": "train", "step": batch.step, "attempt": batch.attempt}
    draw, std = (
        (noise.discrete, ())
        if plan.noise == "discrete"
        else (noise.gaussian, (plan.train_noise_std(plan.max_grad_norm),))
    )
    wanted = dict.fromkeys(parameters) if parts is None else parts
    return {
        name: partial(draw, parameters[name].shape, *std, **of_step, name=name, part=part)
        for name, part in wanted.items()
    }


def analysis_noise(noise: Noise, plan: PrivacyPlan, batch: Batch, measured: ImpactSum) -> Tensor:
    """Return the noise of a sum of impacts, float64 or int64. It depends on no record."""
    purpose = {"stream": "analysis", "step": batch.step, "attempt": batch.attempt, "name": "impacts"}
    if plan.noise == "discrete":
        return noise.discrete(measured.impacts.shape, **purpose)
    drawn = noise.gaussian(measured.impacts.shape, plan.analysis_noise_std(measured.sensitivity), **purpose)
    return drawn.double()


def noising(clipped: ClippedSum, noise_of: Callable[[str], Tensor], plan: PrivacyPlan) -> Noised:
    """Return the function that makes noisy means, float32, of parts of a step's sum.

    Args:
      clipped: this process' sum.
      noise_of: returns the noise of the part of a name.
      plan: of the run.
    """

    def noised(name: str, part: slice, total: Tensor) -> Tensor:
        noise = noise_of(name).to(total.device, non_blocking=total.device.type != "cpu")
        return noisy_mean(noise, total, grid=clipped.grid, expected=plan.expected_batch_size).float()

    return noised


def noising_analysis(measured: ImpactSum, noise: Tensor, plan: PrivacyPlan) -> Noised:
    """Return the function that makes noisy means, float64, of parts of an analysis' sum; `noise` is of the whole."""
    assert plan.analysis is not None
    expected = plan.analysis.expected_batch_size
    return lambda name, part, total: noisy_mean(noise[part], total, grid=measured.grid, expected=expected)


def noisy_mean(noise: Tensor, total: Tensor, *, grid: float | None, expected: float) -> Tensor:
    """Return a sum plus its noise, over the expected batch size.

    Args:
      noise: of the sum; overwritten.
      total: the sum of what the records contribute.
      grid: what 1 stands for in integers, of which exact sums are made; None: all are floats.
      expected: the plan's expected batch size.
    Returns: of the dtype of `noise`; for integers float64.
    Privacy: what the noise hides is hidden; without it, per example.
    """
    if grid is not None and noise.is_floating_point():
        total, grid = total.double().mul_(grid).to(noise.dtype), None
    noisy = noise.add_(total)
    return noisy.div_(expected) if grid is None else noisy.double().mul_(grid / expected)
