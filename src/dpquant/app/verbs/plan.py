# SPDX-License-Identifier: Apache-2.0
"""The verb `dpquant plan`. Loads no torch."""

import contextlib
import dataclasses
import gc
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from dpquant.app.console import print_budget, print_defaults, print_meaning
from dpquant.app.options import Config, Json, command_of, defaults_of, settings_of, with_settings
from dpquant.app.output import results, tell_native
from dpquant.data.sizes import TABLE_PREFIX
from dpquant.data.spec import Spec
from dpquant.errors import SettingError
from dpquant.runs.settings import TrainSettings, plan_of
from dpquant.runs.step_times import step_times
from dpquant.training.scaling import Network, Scaling

_MOST_WORKERS = 65_536
_BANDWIDTH = 10.0  # Gbit a second


@with_settings
def plan(
    given: dict[str, Any],
    world_size: Annotated[
        int | None, typer.Option(help="Number of processes under torchrun: predicts the time of a step.")
    ] = None,
    bandwidth: Annotated[
        float | None, typer.Option(help="Gbit a second between the machines, with --world-size. [10]")
    ] = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Print the privacy budget of a run, the defaults that it uses, and the command that trains with it. Reads no data.

    Of a table it checks the spec, if it is there.

    With --world-size it also predicts how long a step takes on 1 to 1,024 workers: a model, from times of one worker
    that dpquant assess has measured on this machine, or from assumed ones. It says which.

    With --json: epsilon (of all that is planned), delta, noise_multiplier, sample_rate, expected_batch_size, steps,
    epochs, max_grad_norm and analysis_share (the part of epsilon that the analyses cost), all numbers; noise, a word;
    analysis: null, or count, sample_rate, expected_batch_size, noise_multiplier, max_norm, repeats and score (a
    word); records_per_person and epsilon_per_person, null if not given; and meaning: null, or attacks (a list of
    false_positive_rate, true_positive_rate and from_epsilon_alone), even_odds and mu; with --world-size also scaling:
    world_size, times (fixed, per_example, values and source, in words), network (bandwidth, latency and exact) and
    workers, a list of workers, examples, seconds, exchange_seconds, speedup, efficiency, efficiency_growing and
    megabytes.

    Example: dpquant plan --data fashion-mnist --epsilon 3 --epochs 25
    """
    settings = settings_of(given, config)
    _check_spec(settings)
    scaling = _scaling(settings, world_size, bandwidth)
    with _without_collection():
        budget = plan_of(settings)
    if as_json:
        facts = json.loads(budget.to_json()) | ({} if scaling is None else {"scaling": dataclasses.asdict(scaling)})
        print(json.dumps(facts, indent=2))
    else:
        tell_native()
        print_defaults(results(), settings, defaults_of(given, config))
        print_budget(results(), budget)
        print_meaning(results(), budget, settings.public_records)
        train = command_of("train", given, config)
        if scaling is not None:
            print_scaling(results(), scaling)
            train = train.replace("dpquant", f"torchrun --standalone --nproc-per-node {world_size} -m dpquant", 1)
        results().print(f"\nTrain with it: {train}", markup=False, highlight=False, soft_wrap=True)


def _check_spec(settings: TrainSettings) -> None:
    """Read the spec of a table if it is there: it is public, and a mistake is better told before training than then.

    A plan is also made where neither records nor spec are, so a spec that is not there is left to training.

    Raises: DataError: it is a draft, or has something that is unknown, missing or contradictory.
    """
    if settings.spec is not None and settings.data.startswith(TABLE_PREFIX) and (path := Path(settings.spec)).is_file():
        Spec.read(path)


def _scaling(settings: TrainSettings, world_size: int | None, bandwidth: float | None) -> Scaling | None:
    """Return the predicted steps that the options ask for; None if they ask for none.

    Raises:
      SettingError: an option is out of range or has no effect, or nothing is known of the step's time.
    """
    if world_size is None and bandwidth is None:
        return None
    if world_size is None:
        raise SettingError(
            f"Expected world_size with bandwidth; got bandwidth={bandwidth} alone. One process exchanges nothing. "
            "Give --world-size, or leave bandwidth out."
        )
    if not 1 <= world_size <= _MOST_WORKERS:
        raise SettingError(
            f"Expected world_size in 1 .. {_MOST_WORKERS}; got world_size={world_size}. It is the number of processes."
        )
    if bandwidth is not None and not 0 < bandwidth < math.inf:
        raise SettingError(
            f"Expected bandwidth > 0 and finite; got bandwidth={bandwidth}. It is in Gbit a second, as 10."
        )
    network = Network(bandwidth=_BANDWIDTH if bandwidth is None else bandwidth, exact=settings.exact_sums)
    return Scaling.of(step_times(settings), network, settings.batch_size, world_size)


def print_scaling(console: Console, scaling: Scaling) -> None:
    """Print the predicted steps, and on what the prediction rests."""
    times, network = scaling.times, scaling.network
    shown = Table(title=f"a step on several workers, predicted, {network.bandwidth:g} Gbit/s")
    columns = ("workers", "examples each", "seconds", "of them exchange", "times as fast", "efficiency")
    for column in (*columns, "with a batch W times as large", "MB sent by each"):
        shown.add_column(column, justify="right")
    for one in scaling.workers:
        shown.add_row(
            f"{one.workers:,}",
            f"{one.examples:,.4g}",
            f"{one.seconds:.3g}",
            f"{one.exchange_seconds:.2g}",
            f"{one.speedup:.1f}",
            f"{one.efficiency:.0%}",
            f"{one.efficiency_growing:.0%}",
            f"{one.megabytes:,.4g}",
            style="bold" if one.workers == scaling.world_size else None,
        )
    console.print(shown)
    console.print(
        f"A model, not a measurement. One worker: {times.fixed:.3g} s a step and {1000 * times.per_example:.3g} ms an "
        f"example, {times.values:,} values; {times.source}. A message takes {1e6 * network.latency:.0f} us (assumed).",
        markup=False,
        highlight=False,
    )


@contextlib.contextmanager
def _without_collection() -> Iterator[None]:
    """Context: no garbage is looked for. A thousand modules are imported, which leave none."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
