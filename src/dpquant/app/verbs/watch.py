# SPDX-License-Identifier: Apache-2.0
"""The verb `dpquant watch`. Loads no torch."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dpquant.app.completion import run_directories
from dpquant.app.options import ALERT, INTERRUPTED, EndsQuietly
from dpquant.app.output import results
from dpquant.errors import SettingError

if TYPE_CHECKING:
    from dpquant.app.watch import WatchServer
    from dpquant.runs.following import Following

_LARGEST_PORT = 65535


def watch(
    run: Annotated[
        Path, typer.Argument(autocompletion=run_directories, help="directory of a run, which need not have begun")
    ],
    port: Annotated[int | None, typer.Option(help="to listen on; 0 for any that is free [0]")] = None,
    terminal: Annotated[bool, typer.Option("--terminal", help="Show it here, without a page.")] = False,
    once: Annotated[bool, typer.Option("--once", help="Print the state once, and stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --once: print JSON.")] = False,
) -> int:
    """Watch a run: how far it is, epsilon against its plan, accuracy, layers, and what deserves attention.

    It reads the directory and changes nothing, so it works on a run that goes on, has ended, was killed or copied. A
    run that is not there yet is waited for. The page is on 127.0.0.1 only, under an address with a random token, and
    loads nothing from elsewhere. From another machine: ssh -L PORT:127.0.0.1:PORT HOST, with --port PORT here.

    It ends when the run is over: --terminal at once, the page when the end was shown and nobody has asked for a
    minute. A run that has stopped may be continued, so it is watched on. Ctrl-C: exit code 130.

    Exit code 3: with --once, there is an alert that is more than advice.

    With --once --json: name, phase (starting, running, silent, stopped, diverged or finished), model, dataset, policy,
    format, step, steps, epoch (epochs that have ended), epochs, charged (steps), epsilon and epsilon_planned (null:
    infinite), delta, accuracy_test and metrics_test ({name: value}) of the last epoch, silent (seconds since the last
    sign of life), examples_per_second, seconds_left, and alerts, a list of kind, text, grave and advice. What is not
    known is null.

    Example: dpquant watch runs/fashion --terminal
    """
    from dpquant.runs.following import Following

    if as_json and not once:
        raise SettingError("Expected json with once; got json alone. It prints one state. Give --once --json.")
    if once and terminal:
        raise SettingError("Expected one of once and terminal; got both. One prints the state, the other follows it.")
    if port is not None and (once or terminal):
        raise SettingError(f"Expected no port with once or terminal; got port={port}. Neither makes a page.")
    if port is not None and not 0 <= port <= _LARGEST_PORT:
        raise SettingError(
            f"Expected port in 0 .. {_LARGEST_PORT}; got port={port}. It is that of an address. Leave it out for any "
            "free one."
        )
    following = Following(run)
    if once:
        return _print_once(following, run, as_json=as_json)
    try:
        if terminal:
            from dpquant.app.terminal import follow

            follow(following, results())
        else:
            from dpquant.app.watch import serve

            serve(following, port=port or 0, announce=lambda server: _announce(server, run))
            print(f"{run} is over, and the page has shown it.")
    except KeyboardInterrupt as interrupt:
        raise EndsQuietly(INTERRUPTED) from interrupt
    return 0


def _print_once(following: "Following", run: Path, *, as_json: bool) -> int:
    from dpquant.app.terminal import to_json, view
    from dpquant.runs.alerts import alerts

    status = following.status()
    if status.phase == "waiting":
        raise SettingError(
            f"Expected a run that has begun; got {run}, which is not there or empty. There is no state to print. "
            f"Without --once it is waited for: dpquant watch {run}"
        )
    found = alerts(status)
    if as_json:
        print(to_json(status, found), end="")
    else:
        console = results()
        console.print(view(status, found, ascii_only=console.options.ascii_only))
    return ALERT if any(not one.is_advice for one in found) else 0


def _announce(server: "WatchServer", run: Path) -> None:
    waits = "" if run.exists() else " It is not there yet; the page fills as soon as it is."
    print(f"watching {run}.{waits} Only this machine can open the page; Ctrl-C ends it.\n{server.url}", flush=True)
