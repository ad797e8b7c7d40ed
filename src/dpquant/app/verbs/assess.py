# SPDX-License-Identifier: Apache-2.0
"""The verb `dpquant assess`. Importing this file loads no torch."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from dpquant.app.options import Config, Json, settings_of, with_settings
from dpquant.app.output import results, say, tell_native
from dpquant.runs.named import check_named

if TYPE_CHECKING:
    from dpquant.app.assess import Assessment


@with_settings
def assess(
    given: dict[str, Any],
    model: Annotated[str | None, typer.Argument(help="as for train")] = None,
    hardware: Annotated[str, typer.Option(help="here (as measured) or fp4 (as the paper assumes)")] = "here",
    run: Annotated[Path | None, typer.Option(help="run directory, for its layers' impacts")] = None,
    runs_per_month: Annotated[float, typer.Option(help="runs of these settings a month")] = 0.0,
    cost_per_hour: Annotated[float, typer.Option(help="of the machine, in any currency")] = 0.0,
    rounds: Annotated[int, typer.Option(help="timings of every layer and steps of every policy")] = 8,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Estimate what quantization gains for a model on this machine: time per layer, steps predicted and measured.

    Trains nothing and reads no record. Progress goes to standard error.

    Example: dpquant assess resnet18 --data gtsrb --policy dpquant --macs 0.9 --runs-per-month 100 --cost-per-hour 0.4
    """
    settings = settings_of({**given, **({} if model is None else {"model": model})}, config)
    check_named(settings, records=False)
    from dpquant.app.assess import Usage
    from dpquant.app.assess import assess as assessment_of

    tell_native()
    assessment = assessment_of(
        settings,
        hardware=hardware,
        run=run,
        usage=Usage(runs_per_month=runs_per_month, cost_per_hour=cost_per_hour),
        rounds=rounds,
        watch=say,
    )
    if as_json:
        print(assessment.to_json(), end="")
    else:
        print_assessment(results(), assessment)


def print_assessment(console: Console, found: "Assessment") -> None:
    """Print an assessment: layers, steps, the speed-up of a whole run, the paper's model, and warnings."""
    layers = Table(box=None, pad_edge=False)
    titles = ("layer", "million MACs", "share of time", "gain", "last impact")
    for number, title in enumerate(titles):
        layers.add_column(title, justify="right" if number else "left")
    for name, layer in found.layers.items():
        layers.add_row(
            name,
            f"{layer.macs / 1e6:.2f}",
            f"{found.batch_size * layer.full / found.full_step:.1%}",
            f"{layer.gain:.2f}",
            f"{found.impacts[name]:.2g}" if name in found.impacts else "-",
        )
    steps = Table(box=None, pad_edge=False)
    for number, title in enumerate(("layers quantized", "MACs", "predicted s", "measured s", "speed-up", "error")):
        steps.add_column(title, justify="right" if number else "left")
    for policy in found.policies:
        seconds = policy.predicted if policy.measured is None else policy.measured
        steps.add_row(
            f"{len(policy.layers)} of {len(found.layers)}",
            f"{policy.share_of_macs:.0%}",
            f"{policy.predicted:.3f}",
            "-" if policy.measured is None else f"{policy.measured:.3f}",
            f"{found.full_step / seconds:.2f}",
            "-" if policy.measured is None else f"{policy.predicted / policy.measured - 1:+.0%}",
        )
    console.print(f"{found.model}, {found.format}, batch {found.batch_size:g}\n", highlight=False)
    console.print(layers)
    console.print("\nA step:", highlight=False)
    console.print(steps)
    assumed = "; ".join(f"{speedup:g} times if {share:.0%}" for speedup, share in found.paper.items())
    lines = [
        f"\nA step in full precision spends {found.overhead:.0%} of its time beyond these layers.",
        f"An analysis takes {found.analysis:.1f} s." if found.analysis else "No analyses are needed.",
        f"A run of these settings, analyses included, is {found.speedup:.2f} times as fast as in full precision.",
        "Quantized layers are taken as measured here."
        if found.profile == "here"
        else "Quantized layers are taken to run four times as fast, as FP4 against FP16; quantizing is taken as free.",
        f"The paper's model (4-bit work four times as fast, 90 % of it): {assumed} of a step cannot be sped up; "
        f"{found.paper_here:.2f} times with the {found.overhead:.0%} measured here.",
    ]
    if found.saved is not None:
        lines.append(f"In a month that saves {found.saved.hours:,.1f} hours, which cost {found.saved.money:,.2f}.")
    lines += [f"Warning: {sign}" for sign in found.warnings]
    lines.append(f"\n{found.hardware}")
    console.print("\n".join(lines), markup=False, highlight=False)
