# SPDX-License-Identifier: Apache-2.0
"""Write the page of the command line, docs/command-line.md, from the verbs' help and the settings themselves."""

import inspect
from pathlib import Path
from typing import Any

import typer

from dpquant.app.cli import app
from dpquant.app.explain import facts, settings, texts

PAGE = Path(__file__).parents[1] / "docs" / "command-line.md"
_HEAD = """# The command line

Made from the program itself by `python -m website reference`; do not edit it. `dpquant VERB --help` prints the same,
and `dpquant explain WORD` one section of it.

"""
_SETTINGS = """## Settings

Options of `plan`, `train` and of all verbs that name *the settings*, and entries of a file that `--config` names, over
which options win. `dpquant init` drafts such a file. Defaults that depend on the data are shown by `dpquant plan`.
"""


def reference() -> str:
    """Return the page."""
    root: Any = typer.main.get_command(app)
    verbs = [_verb(name, command) for name, command in root.commands.items()]
    options = [_setting(name, field) for name, field in settings().items()]
    return "\n".join([_HEAD + root.epilog, "", *verbs, _SETTINGS, *options])


def _verb(name: str, command: Any) -> str:
    """Return the section of a verb: its help, its arguments and the options that are its own."""
    shared = [one for one in command.params if one.name in settings() and one.param_type_name == "option"]
    own = [one for one in command.params if one not in shared and one.name != "help"]
    rows = [f"| {_spelt(one)} | {_cell(getattr(one, 'help', None) or '')} |" for one in own]
    if shared:
        listed = ", ".join(f"[`--{_option(one.name)}`](#{one.name})" for one in shared)
        everything = len(shared) >= len([f for f in settings().values() if f.metadata["option"]]) - 2
        rows.append(f"| {'*the settings*' if everything else listed} | [Settings](#settings) |")
    table = ["| argument or option | |", "|---|---|", *rows, ""] if rows else []
    return "\n".join([f"## dpquant {name}", "", _help(command), "", *table])


def _help(command: Any) -> str:
    """Return a verb's help, its examples as code."""
    parts = []
    for paragraph in inspect.cleandoc(command.help).split("\n\n"):
        if paragraph.startswith("Example: "):
            example = " ".join(paragraph.removeprefix("Example: ").split())
            parts.append(f"```console\n{example}\n```")
        else:
            parts.append(_cell(paragraph))
    return "\n\n".join(parts)


def _setting(name: str, field: Any) -> str:
    return "\n".join([f"### {name}", "", texts("settings").get(name, ""), "", facts(field), ""]).replace(
        "\n\n\n", "\n\n"
    )


def _spelt(one: Any) -> str:
    if one.param_type_name == "argument":
        return f"`{one.metavar or one.name.upper()}`"
    names = [f"`{name}`" for name in (*one.opts, *one.secondary_opts)]
    return ", ".join(names)


def _option(name: str) -> str:
    return name.replace("_", "-")


def _cell(text: str) -> str:
    """Return a text of the program as Markdown on one line, in which signs mean themselves."""
    plain = " ".join(text.split())
    for sign in ("\\", "*", "_", "<", "[", "|"):
        plain = plain.replace(sign, f"\\{sign}")
    return plain
