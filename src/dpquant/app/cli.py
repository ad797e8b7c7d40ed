# SPDX-License-Identifier: Apache-2.0
"""`dpquant VERB`: each verb parses, calls the library and prints. Importing this file loads no torch.

Options are the fields of `TrainSettings`, with their help: one place for both. Bad input is one line on standard error
and exit code 2, and nothing else is written. A run that diverges ends with exit code 4.
"""

import datetime
import functools
import importlib.metadata
import os
import sys
import typing
import warnings
from collections.abc import Callable, MutableMapping
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from typer.exceptions import TyperException

from dpquant.app.console import (
    ProgressBar,
    print_assessment,
    print_bench,
    print_budget,
    print_comparison,
    print_meaning,
    print_run,
)
from dpquant.app.options import (
    DIVERGED,
    INTERRUPTED,
    WRONG_RESULT,
    Config,
    Json,
    NoReport,
    Out,
    command_line,
    refuse,
    settings_of,
    with_settings,
    written_path,
)
from dpquant.app.verbs.audit import audit
from dpquant.app.verbs.check_model import check_model
from dpquant.app.verbs.evaluate import evaluate
from dpquant.app.verbs.export import export
from dpquant.app.verbs.init import init
from dpquant.app.verbs.ledger import ledger
from dpquant.app.verbs.pack import pack
from dpquant.app.verbs.predict import predict
from dpquant.app.verbs.report import report
from dpquant.app.verbs.total import total
from dpquant.app.verbs.verify import verify
from dpquant.errors import DivergedError, DPQuantError, SettingError, StoppedError
from dpquant.runs.place import Place
from dpquant.runs.settings import TrainSettings, plan_of

if typing.TYPE_CHECKING:
    from dpquant.app.bench import BenchRecord

SPINS = "1000"  # some tens of microseconds, longer than from one operator to the next; `scripts/bench waiting`

app = typer.Typer(
    name="dpquant",
    help="Differentially private training with dynamic quantization.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("check-model")(check_model)
app.command("evaluate")(evaluate)
app.command("predict")(predict)
app.command("export")(export)
app.command("audit")(audit)
app.command("init")(init)
app.command("ledger")(ledger)
app.command("report")(report)
app.command("verify")(verify)
app.command("total")(total)
app.command("pack")(pack)


class _Interrupted(Exception):
    """Raised when the user stops a run; the message says what the run has spent."""


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
        result = _command()(arguments or ["--help"], prog_name="dpquant", standalone_mode=False)
        if result == INTERRUPTED:  # what typer makes of a KeyboardInterrupt outside a run
            return refuse("interrupted; what was charged so far stays in the run's ledger", INTERRUPTED)
        return result if isinstance(result, int) else 0
    except TyperException as error:
        return refuse(error.format_message())
    except DivergedError as error:
        return refuse(str(error), DIVERGED)
    except StoppedError as stop:
        return refuse(str(stop), stop.exit_code)
    except DPQuantError as error:
        return refuse(str(error))
    except _Interrupted as stop:
        return refuse(str(stop), INTERRUPTED)
    except OSError as error:
        return refuse(_cannot_be_written(error))


def _cannot_be_written(error: OSError) -> str:
    """Return the error for a file or a standard output that fails."""
    where = "" if error.filename is None else f" on {error.filename}"
    return (
        f"Expected files and standard output that can be read and written; got {error.strerror or error}{where}. What "
        "was charged so far stays in the run's ledger. Mend it and begin again."
    )


def _warn(message: Warning | str, *_: object, **__: object) -> None:
    """Print a warning as one line, without the place in the source that Python would name."""
    print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False) -> None:
    """Differentially private training with dynamic quantization."""
    if version:
        print(importlib.metadata.version("dpquant"))
        raise typer.Exit


@app.command()
@with_settings
def plan(given: dict[str, Any], config: Config = None, as_json: Json = False) -> None:
    """Print the privacy budget of a run. Reads no data.

    With --json: epsilon (of all that is planned), delta, noise_multiplier, sample_rate, expected_batch_size, steps,
    epochs, max_grad_norm and analysis_share (the part of epsilon that the analyses cost), all numbers; noise, a word;
    analysis: null, or count, sample_rate, expected_batch_size, noise_multiplier, max_norm, repeats and score (a
    word); records_per_person and epsilon_per_person, null if not given; and meaning: null, or attacks (a list of
    false_positive_rate, true_positive_rate and from_epsilon_alone), even_odds and mu.

    Example: dpquant plan --data fashion-mnist --epsilon 3 --epochs 25
    """
    settings = settings_of(given, config)
    budget = plan_of(settings)
    if as_json:
        print(budget.to_json(), end="")
    else:
        print_budget(Console(), budget)
        print_meaning(Console(), budget, settings.public_records)


@app.command()
@with_settings
def train(
    given: dict[str, Any],
    config: Config = None,
    out: Out = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in OUT, if there is one.")] = False,
    no_report: NoReport = False,
    as_json: Json = False,
) -> None:
    """Train a model privately, layers rotating through low precision. Without options: handwritten digits, offline.

    SIGTERM and Ctrl-C end the run between two steps, with a checkpoint; exit code 143 or 130.

    Example: dpquant train --data fashion-mnist --epsilon 3 --policy dpquant --fraction 0.75 --out runs/fashion
    """
    settings = settings_of(given, config)
    if resume and out is None:
        raise SettingError("Expected out with resume; got none. It names the run. Give --out RUN.")
    name = settings.data.rsplit("/", 1)[-1].replace(":", "-")
    folder = out or Path("runs") / f"{datetime.datetime.now():%Y%m%d-%H%M%S}-{name}"
    _train(settings, folder, resume=resume, no_report=no_report, as_json=as_json)


@app.command()
def resume(
    run: Annotated[Path, typer.Argument(help="directory of the run")],
    no_report: NoReport = False,
    as_json: Json = False,
) -> None:
    """Continue a run that was stopped or killed, from its newest checkpoint, with the settings in its directory.

    What was charged stays charged: steps after the checkpoint are lost, and epsilon does not exceed the plan's.

    Example: dpquant resume runs/fashion
    """
    _train(Place(run).settings(), run, resume=True, no_report=no_report, as_json=as_json)


def _train(settings: TrainSettings, folder: Path, *, resume: bool, no_report: bool, as_json: bool) -> None:
    """Train into a run directory and print the result."""
    place = Place(folder)
    with place.taken(settings, resume=resume):  # before torch is imported: a run killed meanwhile can be continued
        from dpquant.runs.directory import charged
        from dpquant.runs.names import LEDGER
        from dpquant.runs.train import train as run_training

        console = Console(quiet=as_json)
        try:
            with ProgressBar(console) as bar:
                record = run_training(settings, place, command=command_line(), sinks=[bar])
        except KeyboardInterrupt as interrupt:
            budget = plan_of(settings)
            raise _Interrupted(charged(folder / LEDGER, budget).told(budget)) from interrupt
    if not no_report:
        from dpquant.app.report import write_report

        write_report(folder)
    if as_json:
        print(record.to_json(), end="")
        return
    print_run(console, record, folder)


@app.command()
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
    from dpquant.app.assess import Usage
    from dpquant.app.assess import assess as assessment_of

    named = {} if model is None else {"model": model}
    assessment = assessment_of(
        settings_of({**given, **named}, config),
        hardware=hardware,
        run=run,
        usage=Usage(runs_per_month=runs_per_month, cost_per_hour=cost_per_hour),
        rounds=rounds,
        watch=lambda what: print(what, file=sys.stderr, flush=True),
    )
    if as_json:
        print(assessment.to_json(), end="")
    else:
        print_assessment(Console(), assessment)


@app.command()
@with_settings
def compare(
    given: dict[str, Any],
    policies: Annotated[str, typer.Option(help="with commas between them")] = "none,static,rotate,dpquant",
    seeds: Annotated[int, typer.Option(help="runs of each policy")] = 3,
    config: Config = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Train under several policies and print their accuracies with confidence intervals.

    Runs that are in the directory already are not repeated. One that was interrupted is moved aside and repeated; what
    it had charged counts. Progress goes to standard error.

    Example: dpquant compare --data fashion-mnist --epsilon 3 --fraction 0.5 --seeds 3 --out runs/compare
    """
    from dpquant.app.compare import compare as comparison_of

    for name in ("policy", "seed"):
        if name in given:
            raise SettingError(
                f"Expected no {name} for compare; got {name}={given[name]}. Runs differ in it. Give --policies and "
                "--seeds."
            )
    settings = settings_of(given, config)
    folder = out or Path("runs") / f"{datetime.datetime.now():%Y%m%d-%H%M%S}-compare"
    names = [name.strip() for name in policies.split(",") if name.strip()]
    watch = functools.partial(print, file=sys.stderr, flush=True)
    comparison = comparison_of(settings, names, seeds, folder, watch=watch)
    if as_json:
        print(comparison.to_json(), end="")
    else:
        print_comparison(Console(), comparison, folder)


@app.command()
def bench(
    model: Annotated[
        str, typer.Option(help="resnet18-cifar, resnet18, resnet50, densenet121, cnn, transformer, mlp, bert-base")
    ] = ("resnet18-cifar"),
    batch_size: Annotated[int | None, typer.Option(help="examples a step [32; mlp 4096]")] = None,
    image_size: Annotated[int | None, typer.Option(help="side of the images [the network's own]")] = None,
    format: Annotated[str, typer.Option(help="recipe of the quantized contenders")] = "luq-fp4",
    threads: Annotated[int | None, typer.Option(help="threads to compute with [all cores]")] = None,
    rounds: Annotated[int, typer.Option(help="timed steps of every contender")] = 3,
    physical_batch_size: Annotated[
        int | None, typer.Option(help="physical batch size of Opacus [32; mlp 4096]")
    ] = None,
    memory: Annotated[
        bool, typer.Option("--memory", help="Measure peak memory too, each contender in a process of its own.")
    ] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N")] = "cpu",
    as_json: Json = False,
    out: Annotated[
        Path | None, typer.Option(parser=written_path, help="Write the record here, as JSON.", metavar="PATH")
    ] = None,
) -> int:
    """Time a private step on this machine against PyTorch and Opacus; results are checked first. About a minute.

    Exit code 1: a contender computes wrong gradients. Progress goes to standard error.

    Example: dpquant bench --model cnn --batch-size 256 --memory
    """
    from dpquant.app.bench import BenchSettings, measure
    from dpquant.runs.devices import device_of

    settings = BenchSettings(
        model=model,
        batch_size=batch_size,
        image_size=image_size,
        format=format,
        threads=threads,
        rounds=rounds,
        physical_batch_size=physical_batch_size,
        memory=memory,
        device=str(device_of(device)),
    )
    if out is not None and (out.is_dir() or not out.parent.is_dir() or not os.access(out.parent, os.W_OK)):
        raise SettingError(
            f"Expected out to be a file in a folder that exists and can be written to; got out={out}. The record is "
            "written there after the measurement. Make the folder first."
        )
    record = measure(settings, watch=lambda what: print(what, file=sys.stderr, flush=True))
    return report_bench(record, out, as_json=as_json)


def report_bench(record: "BenchRecord", out: Path | None, *, as_json: bool) -> int:
    """Write a benchmark's record to `out` if it is given, print it, and return the exit code of `dpquant bench`."""
    if out is not None:
        out.write_text(record.to_json())
    if as_json:
        print(record.to_json(), end="")
    else:
        print_bench(Console(), record)
    return WRONG_RESULT if record.wrong else 0
