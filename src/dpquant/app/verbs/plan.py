# SPDX-License-Identifier: Apache-2.0
"""The verb `dpquant plan`. Loads no torch."""

import contextlib
import gc
from collections.abc import Iterator
from typing import Any

from dpquant.app.console import print_budget, print_defaults, print_meaning
from dpquant.app.options import Config, Json, command_of, defaults_of, settings_of, with_settings
from dpquant.app.output import results, tell_native
from dpquant.runs.settings import plan_of


@with_settings
def plan(given: dict[str, Any], config: Config = None, as_json: Json = False) -> None:
    """Print the privacy budget of a run, the defaults that it uses, and the command that trains with it. Reads no data.

    With --json: epsilon (of all that is planned), delta, noise_multiplier, sample_rate, expected_batch_size, steps,
    epochs, max_grad_norm and analysis_share (the part of epsilon that the analyses cost), all numbers; noise, a word;
    analysis: null, or count, sample_rate, expected_batch_size, noise_multiplier, max_norm, repeats and score (a
    word); records_per_person and epsilon_per_person, null if not given; and meaning: null, or attacks (a list of
    false_positive_rate, true_positive_rate and from_epsilon_alone), even_odds and mu.

    Example: dpquant plan --data fashion-mnist --epsilon 3 --epochs 25
    """
    settings = settings_of(given, config)
    with _without_collection():
        budget = plan_of(settings)
    if as_json:
        print(budget.to_json(), end="")
    else:
        tell_native()
        print_defaults(results(), settings, defaults_of(given, config))
        print_budget(results(), budget)
        print_meaning(results(), budget, settings.public_records)
        command = f"\nTrain with it: {command_of('train', given, config)}"
        results().print(command, markup=False, highlight=False, soft_wrap=True)


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
