# SPDX-License-Identifier: Apache-2.0
"""The verb `dpquant report`. Loads no torch."""

from pathlib import Path
from typing import Annotated

import typer

from dpquant.app.completion import run_directories
from dpquant.app.options import Json, written_path
from dpquant.runs.names import REPORT


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            autocompletion=run_directories, help="directories of runs that have ended; several are compared"
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(parser=written_path, help="File to write [report.html in RUN; comparison.html]", metavar="FILE"),
    ] = None,
    redact: Annotated[
        bool, typer.Option("--redact", help="Leave out the command, folders, settings and declared words.")
    ] = False,
    registry: Annotated[
        Path | None,
        typer.Option(parser=written_path, help="Also write a draft for OpenDP's Deployments Registry.", metavar="FILE"),
    ] = None,
    card: Annotated[
        Path | None, typer.Option(parser=written_path, help="Also write a model card, as README.md.", metavar="FILE")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write the report of a run: one HTML file that loads nothing, and whose first printed page can be signed.

    It says what is promised, what epsilon means in risk, what is not covered, and answers the 24 questions that a
    privacy officer asks. Everything that can be recomputed is recomputed first, and what does not hold stands on top.
    Of several runs it is a page that compares them. `dpquant train` writes it by itself.

    With --json nothing is written but a list on standard output, an object a run: name, model, dataset, epsilon (null:
    infinite), delta, accuracy_test, record_sha256, holds (true: all checks do), alarms (texts), meaning (null, or
    attacks, even_odds and mu), persons (records and epsilon), epsilons ({delta: epsilon}) and answers (question, answer
    and section).

    Example: dpquant report runs/fashion --registry deployment.yaml
    """
    from dpquant.app.report import facts_of, to_json, write
    from dpquant.errors import SettingError
    from dpquant.runs.pages.comparison import comparison
    from dpquant.runs.pages.report import report as page_of
    from dpquant.runs.pages.texts import model_card, registry_draft

    if len(runs) > 1 and (registry or card):
        raise SettingError(
            f"Expected one run with registry or card; got {len(runs)}. Both describe one model. Name one run."
        )
    facts = [facts_of(run, redact=redact) for run in runs]
    if as_json:
        print(to_json(facts), end="")
        return
    if len(runs) == 1:
        place = out or runs[0] / REPORT
        write(place, page_of(facts[0]))
    else:
        from dpquant.app.spent import total

        place = out or Path("comparison.html")
        write(place, comparison(facts, together=total(runs).told))
    print(f"report: {place}")
    for path, made, what in ((registry, registry_draft, "registry draft"), (card, model_card, "model card")):
        if path is not None:
            write(path, made(facts[0]))
            print(f"{what}: {path}")
