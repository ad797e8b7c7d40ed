# SPDX-License-Identifier: Apache-2.0
"""The verb `dpquant audit`. Loads no torch before it runs."""

import datetime
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from dpquant.app.console import ProgressBar, print_audit
from dpquant.app.options import WRONG_RESULT, Json, command_line, written_path

if TYPE_CHECKING:
    from dpquant.audits.report import Audit


def audit(
    run: Annotated[Path, typer.Argument(help="directory of the run")],
    mode: Annotated[str, typer.Option(help="all, tap, game or one-run")] = "all",
    canaries: Annotated[
        int | None, typer.Option(help="in the training copy of one-run [1000, at most as many as records]")
    ] = None,
    seed: Annotated[int, typer.Option(help="of coins, canaries and small networks; public")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            parser=written_path, help="new directory of the training copy [RUN-audit-TIME, beside RUN]", metavar="PATH"
        ),
    ] = None,
    as_json: Json = False,
) -> int:
    """Try to refute a run's epsilon, by its own settings on the real code. Exit code 1: refuted; 0: not refuted.

    tap measures noise and contributions of a small run with the plan's numbers; game lets an attacker guess whether one
    record took part in a step or an analysis; both read no private record and take seconds. one-run trains a copy of
    the run with canaries among its records and guesses which: it takes as long as the run and charges a ledger of its
    own. DO NOT RELEASE THE COPY. An honest run is refuted in at most one of 10,000 audits.

    With --json: run, mode, epsilon, delta, false_alarm, refuted; taps, games (lists) and one_run (null if not made),
    each with what was claimed, measured, p-values and power; copy, the copy's directory or null.

    Example: dpquant audit runs/fashion --mode tap
    """
    from dpquant.audits.report import AuditRequest
    from dpquant.audits.report import audit as audited

    request = AuditRequest(mode=mode, canaries=canaries, seed=seed)
    place = out or run.with_name(f"{run.absolute().name}-audit-{datetime.datetime.now():%Y%m%d-%H%M%S}")
    console = Console(quiet=as_json)
    with ProgressBar(console) as bar:
        found = audited(
            run,
            request,
            out=place,
            command=command_line(),
            sinks=[bar],
            watch=lambda what: print(what, file=sys.stderr, flush=True),
        )
    return report(console, found, as_json=as_json)


def report(console: Console, found: "Audit", *, as_json: bool) -> int:
    """Print an audit and return the verb's exit code."""
    if as_json:
        print(found.to_json(), end="")
    else:
        print_audit(console, found)
    return WRONG_RESULT if found.refuted else 0
