# SPDX-License-Identifier: Apache-2.0
"""The verb `dpquant audit`. Loads no torch before it runs."""

import datetime
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from dpquant.app.console import ProgressBar
from dpquant.app.options import WRONG_RESULT, Json, command_line, written_path

if TYPE_CHECKING:
    from dpquant.audits.report import Audit

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


def print_audit(console: Console, found: "Audit") -> None:
    """Print an audit: what was claimed and found, how likely faults would have been found, and the verdict."""
    from dpquant.privacy.plan import rounded_up

    console.print(f"{found.run}: epsilon {rounded_up(found.epsilon)}, delta {found.delta:g}\n", highlight=False)
    table = Table(box=None, pad_edge=False)
    for number, title in enumerate(("trial", "claimed", "found", "p-value", "chance to find a fault")):
        table.add_column(title, justify="right" if 0 < number < 4 else "left")
    for tap in found.taps:
        name = f"taps, {tap.format or 'full precision'}"
        table.add_row(
            f"{name}: noise", f"{tap.noise_claimed:.4f}", f"{tap.noise_measured:.4f}", f"{tap.noise_p:.2g}",
            f"halved: {tap.power['noise halved']:.0%}",
        )  # fmt: skip
        table.add_row(
            f"{name}: mean", f"{tap.contribution_claimed:.4f}", f"{tap.contribution_measured:.4f}",
            f"{tap.contribution_p:.2g}", f"doubled: {tap.power['contribution doubled']:.0%}",
        )  # fmt: skip
    for game in found.games:
        table.add_row(
            f"game, {game.release}: mu", f"{game.mu_claimed:.4f}", f">= {game.mu_bound:.4f}",
            f"{game.p_value:.2g}", f"noise halved: {game.power['noise halved']:.0%}",
        )  # fmt: skip
    one = found.one_run
    if one is not None:
        table.add_row(
            "training with canaries: epsilon",
            "infinite" if one.epsilon_claimed is None else f"{one.epsilon_claimed:.4f}",
            f">= {one.epsilon_bound:.4f}", f"{one.p_value:.2g}",
            f"noise halved: {one.power['noise halved']:.0%}, epsilon doubled: {one.power['epsilon doubled']:.0%}",
        )  # fmt: skip
    console.print(table)
    lines = ["\nLower bounds hold with 95 % confidence. A bound below the claim does not prove the claim."]
    if one is not None:
        true = "no true epsilon" if one.detectable is None else f"only a true epsilon above {one.detectable:.2f}"
        lines += [
            f"Bound for a Gaussian curve: {one.epsilon_bound_gaussian:.4f}. With {one.canaries} canaries no claim "
            f"above {one.ceiling:.2f} can be refuted; against this claim the best attack finds {true} nine times in "
            "ten. The attack by losses that was made finds less. Wrong noise or sensitivity is for tap and game to "
            "find; a training with canaries is an alarm for what they do not run.",
            f"The copy in {found.copy} was trained on the private records. DO NOT RELEASE IT. Whoever publishes these "
            f"numbers adds the copy's epsilon to the run's: dpquant ledger {found.run} {found.copy}",
        ]
    lines.append(
        f"\nREFUTED: with a claim that holds, this happens once in {1 / found.false_alarm:,.0f} audits or less."
        if found.refuted
        else "\nNot refuted."
    )
    console.print("\n".join(lines), markup=False, highlight=False)
