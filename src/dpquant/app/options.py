# SPDX-License-Identifier: Apache-2.0
"""What the verbs share: exit codes, the error line and options, one of them for every setting. Loads no torch."""

import dataclasses
import functools
import inspect
import re
import shlex
import sys
import time
import typing
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated, Any

import typer

from dpquant.app.completion import completer
from dpquant.errors import DPQuantError, SettingError
from dpquant.runs.defaults import BY_DATA, GENERAL, Default, defaults
from dpquant.runs.launched import Launch
from dpquant.runs.settings import TrainSettings, from_toml

WRONG_RESULT = 1
BAD_INPUT = 2
ALERT = 3
DIVERGED = 4
INTERRUPTED = 130

OF_SOURCES = (
    "data_dir",
    "image_size",
    "normalize",
    "test",
    "test_share",
    "label_column",
    "spec",
    "text_column",
    "classes",
    "tokenizer",
    "max_length",
)
"""Settings that say how the records of a data set are read."""

Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output, and nothing else.")]

_WHILE_IT_IS_TOLD = 2.0  # seconds; as soon as one process has ended, torchrun ends those that have not

NoReport = Annotated[bool, typer.Option("--no-report", help="Do not write report.html at the end.")]


class EndsQuietly(Exception):
    """Raised by a verb that the user has stopped and that has nothing more to say.

    Attributes:
      exit_code: of the command.
    """

    def __init__(self, exit_code: int):
        super().__init__()
        self.exit_code = exit_code


class InterruptedRun(Exception):
    """Raised when the user stops a run; the message says what the run has spent."""


def refuse(message: str, code: int = BAD_INPUT, *, told: bool | None = None) -> int:
    """Print one error line on standard error, and return the exit code.

    Args:
      message: what is wrong.
      code: the exit code.
      told: whether this process prints it; None: the first one on each machine does, of several that all have it.
    """
    if told is False or (told is None and not Launch.here().speaks):
        time.sleep(_WHILE_IT_IS_TOLD)
        return code
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code


def command_line() -> str:
    """Return the command line that the user typed, for a run's record."""
    return shlex.join(["dpquant", *sys.argv[1:]])


def with_settings(verb: Callable[..., Any], names: Collection[str] | None = None) -> Callable[..., Any]:
    """Return the verb with one option for every field of TrainSettings, or for those named, collected in `given`.

    An option that the user does not give is not in `given`. A field that the verb has a parameter for stays the verb's.
    """
    parameters = [p for p in inspect.signature(verb).parameters.values() if p.name != "given"]
    own_names = {p.name for p in parameters}
    hints = typing.get_type_hints(TrainSettings)
    for field in dataclasses.fields(TrainSettings):
        named = names is None or field.name in names
        if field.name in own_names or not named or not field.metadata["option"]:
            continue
        plain = hints[field.name]
        shown = _default_shown(field)
        option = typer.Option(
            help=f"{field.metadata['help']}{shown}", show_default=False, autocompletion=completer(field.name)
        )
        annotation = Annotated[plain | None, option]
        parameters.append(
            inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        )

    def collected(**options: Any) -> Any:
        own = {name: options.pop(name) for name in list(options) if name in own_names}
        return verb(given={name: value for name, value in options.items() if value is not None}, **own)

    functools.update_wrapper(collected, verb)
    vars(collected)["__signature__"] = inspect.Signature(parameters)  # what typer makes options of
    collected.__annotations__ = {p.name: p.annotation for p in parameters}
    return collected


def _default_shown(field: dataclasses.Field) -> str:
    """Return the default as the help shows it; empty where the help text itself names it."""
    if field.default is not None:
        return f" [{field.default}]"
    if field.name in GENERAL:
        digits = BY_DATA["digits"].get(field.name, GENERAL[field.name])
        return f" [{GENERAL[field.name]}; digits {digits}; others by data set]"
    return ""


def written_path(text: str) -> Path:
    """Return a path that an option names. Python would take an empty one for the working directory."""
    if not text.strip():
        raise SettingError("Expected a path; got an empty one. It would be the working directory. Write . for that.")
    return Path(text)


Out = Annotated[
    Path | None, typer.Option(parser=written_path, help="Directory to write, new or empty.", metavar="PATH")
]
Config = Annotated[Path | None, typer.Option(help="TOML file of settings; options on the command line win.")]


def settings_of(given: dict[str, Any], config: Path | None) -> TrainSettings:
    """Return the settings of a verb: given ones, then those of the file, then defaults."""
    file = from_toml(config) if config else {}
    try:
        return TrainSettings.chosen(given, file)
    except DPQuantError as error:
        line = line_of(str(error), file.keys() - given.keys(), config)
        if line is None:
            raise
        raise type(error)(f"{error} It is line {line} of {config}.") from error


def line_of(message: str, names: Collection[str], config: Path | None) -> int | None:
    """Return the number of the line in a file of settings that an error is about; None if it is about none.

    Args:
      message: of the error.
      names: of the settings that the file gives and the command line does not.
      config: the file.
    """
    told = [name for name in names if re.search(rf"(got |Expected |got a table \[){name}\b", message)]
    if config is None or not told:
        return None
    lines = enumerate(config.read_text(encoding="utf-8").splitlines(), 1)
    return next((number for number, line in lines if re.match(rf"\s*\[?{told[0]}\s*[=\]]", line)), None)


def defaults_of(given: dict[str, Any], config: Path | None) -> dict[str, Default]:
    """Return the defaults of the settings that neither the user nor the file gives, with where they come from."""
    both = {**(from_toml(config) if config else {}), **given}
    return {name: default for name, default in defaults(both).items() if both.get(name) is None}


def command_of(verb: str, given: dict[str, Any], config: Path | None) -> str:
    """Return the command line of a verb with these settings, to be pasted."""
    words = ["dpquant", verb, *(["--config", str(config)] if config else [])]
    for name, value in given.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        else:
            words += [f"--{option}", f"{value:g}" if isinstance(value, float) else str(value)]
    return shlex.join(words)
