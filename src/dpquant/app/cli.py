# SPDX-License-Identifier: Apache-2.0
"""`dpquant VERB`: each verb parses, calls the library and prints. Importing this file loads no torch.

Options are the fields of `TrainSettings`, with their help: one place for both. Bad input is one line on standard error
and exit code 2, and nothing else is written. A run that diverges ends with exit code 4, an alert of `watch` with 3.
"""

import dataclasses
import functools
import gc
import os
import sys
import warnings
from collections.abc import Callable, Mapping, MutableMapping
from types import MappingProxyType
from typing import Annotated, Any, NoReturn

import typer

from dpquant.app.corrections import corrected
from dpquant.app.options import DIVERGED, INTERRUPTED, EndsQuietly, InterruptedRun, refuse
from dpquant.app.output import Output, using
from dpquant.app.verbs.assess import assess
from dpquant.app.verbs.audit import audit
from dpquant.app.verbs.bench import bench
from dpquant.app.verbs.check_model import check_model
from dpquant.app.verbs.compare import compare
from dpquant.app.verbs.doctor import doctor
from dpquant.app.verbs.evaluate import evaluate
from dpquant.app.verbs.explain import explain
from dpquant.app.verbs.export import export
from dpquant.app.verbs.init import init
from dpquant.app.verbs.ledger import ledger
from dpquant.app.verbs.pack import pack
from dpquant.app.verbs.plan import plan
from dpquant.app.verbs.predict import predict
from dpquant.app.verbs.report import report
from dpquant.app.verbs.total import total
from dpquant.app.verbs.train import resume, train
from dpquant.app.verbs.verify import verify
from dpquant.app.verbs.watch import watch
from dpquant.errors import DivergedError, DPQuantError, GroupError, StoppedError
from dpquant.runs.launched import Launch
from dpquant.version import version

try:
    from typer.exceptions import TyperException
except ImportError:  # typer before 0.26 raises those of click, on which it depends
    from click import ClickException as TyperException

SPINS = "1000"  # some tens of microseconds, longer than from one operator to the next; `scripts/bench waiting`

_EPILOG = """-q leaves results only, -qq nothing, -v adds times; --color auto, always or never. They stand anywhere.

Exit codes: 0 done, 1 a result is wrong, 2 bad input or a refusal, 3 alert, 4 a run that diverged, 130 and 143 stopped
by Ctrl-C and SIGTERM."""

app = typer.Typer(
    name="dpquant",
    epilog=_EPILOG,
    help="Differentially private training with dynamic quantization.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("plan")(plan)
app.command("train")(train)
app.command("resume")(resume)
app.command("watch")(watch)
app.command("assess")(assess)
app.command("check-model")(check_model)
app.command("compare")(compare)
app.command("bench")(bench)
app.command("evaluate")(evaluate)
app.command("predict")(predict)
app.command("pack")(pack)
app.command("init")(init)
app.command("ledger")(ledger)
app.command("report")(report)
app.command("verify")(verify)
app.command("total")(total)
app.command("export")(export)
app.command("audit")(audit)
app.command("doctor")(doctor)
app.command("explain")(explain)


def main() -> NoReturn:
    """Run the command line that the user typed, and exit with its code."""
    sleep_soon(os.environ)
    code = run(sys.argv[1:])
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what Python flushes when it ends goes nowhere
        if not isinstance(error, BrokenPipeError):  # whoever read it has read enough
            code = code or refuse(_cannot_be_written(error))
    gc.freeze()  # or Python would look through all that it is about to free, a twentieth of a second for `plan`
    sys.exit(code)


def sleep_soon(environment: MutableMapping[str, str]) -> None:
    """Let OpenMP's threads spin for microseconds before they sleep, unless the user has said how they should wait.

    By default they spin for some ten milliseconds. On a busy machine a thread then spins while the thread that it
    waits for cannot run. libgomp, which comes with torch, reads the variable when it is loaded.
    """
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault("GOMP_SPINCOUNT", SPINS)


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit code; only a bug leaves a traceback."""
    with warnings.catch_warnings():
        warnings.showwarning = _warn
        return _run(arguments)


@functools.cache
def _command() -> Callable[..., Any]:
    """Return the parser of all verbs, which takes longer to build than to run."""
    return typer.main.get_command(app)


def _run(arguments: list[str]) -> int:
    try:
        output, arguments = Output.split(arguments)
        if Launch.here().rank > 0:  # of several processes the first one prints
            output = dataclasses.replace(output, quiet=2)
        with using(output):
            return _called(arguments)
    except DPQuantError as error:
        return refuse(str(error))


def _called(arguments: list[str]) -> int:
    try:
        result = _command()(arguments or ["--help"], prog_name="dpquant", standalone_mode=False)
        if result == INTERRUPTED:  # what typer makes of a KeyboardInterrupt outside a run
            return refuse("interrupted; what was charged so far stays in the run's ledger", INTERRUPTED)
        return result if isinstance(result, int) else 0
    except TyperException as error:
        return refuse(_with_correction(error.format_message(), arguments))
    except DivergedError as error:
        return refuse(str(error), DIVERGED)
    except StoppedError as stop:
        return refuse(str(stop), stop.exit_code)
    except GroupError as error:
        return refuse(str(error), told=error.told_by)
    except EndsQuietly as end:
        return end.exit_code
    except DPQuantError as error:
        return refuse(_with_correction(str(error), arguments, getattr(error, "instead", {})))
    except InterruptedRun as stop:
        return refuse(str(stop), INTERRUPTED)
    except OSError as error:
        return refuse(_cannot_be_written(error))


def _with_correction(message: str, arguments: list[str], instead: Mapping[str, Any] = MappingProxyType({})) -> str:
    """Return an error with the command that was meant, where it is known."""
    command = corrected(message, arguments, instead)
    return message if command is None else f"{message} Try: {command}"


def _cannot_be_written(error: OSError) -> str:
    """Return the error for a file or a standard output that fails."""
    where = "" if error.filename is None else f" on {error.filename}"
    return (
        f"Expected files and standard output that can be read and written; got {error.strerror or error}{where}. What "
        "was charged so far stays in the run's ledger. Mend it and begin again."
    )


def _warn(message: Warning | str, *_: object, **__: object) -> None:
    """Print a warning as one line, without the place in the source that Python would name."""
    if Launch.here().rank > 0:
        return
    print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)


@app.callback(invoke_without_command=True)
def _root(asked: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False) -> None:
    """Differentially private training with dynamic quantization."""
    if asked:
        print(version())
        raise typer.Exit
