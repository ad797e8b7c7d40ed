# SPDX-License-Identifier: Apache-2.0
"""The command that a user may have meant, where an error knows it: to be pasted."""

import difflib
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

_MEANT = re.compile(r"Did you mean '?([^\s?']+)'?\?")
_OPTIONS = re.compile(r"No such option:? '?([\w-]+)'?\.? \((?:Possible options:|Did you mean one of:) (.+?)[?]?\)")


def corrected(message: str, arguments: Sequence[str], instead: Mapping[str, Any]) -> str | None:
    """Return the corrected command line; None if it is not known.

    Args:
      message: the error. Where it asks "Did you mean X?", X replaces the only argument, or value of an option as
        --name=value, that it quotes and that X resembles: words inside of a file are not on the command line.
      arguments: the command line, without the program.
      instead: {setting: value} with which the command is accepted.
    """
    if instead:
        return _command(_with(arguments, instead))
    if listed := _OPTIONS.search(message):
        nearest = difflib.get_close_matches(listed[1], listed[2].replace("'", "").split(", "), n=1)
        return _replaced(arguments, listed[1], nearest[0]) if nearest else None
    meant = _MEANT.search(message)
    if meant is None:
        return None
    before = message[: meant.start()]
    wrong = {value for word in arguments for value in (word, word.partition("=")[2]) if value and value != meant[1]}
    quoted = [
        value
        for value in wrong
        if value.startswith("-") == meant[1].startswith("-")
        and difflib.get_close_matches(meant[1], [value])
        and re.search(rf"(?<![\w-]){re.escape(value)}(?![\w-])", before)
    ]
    return _replaced(arguments, quoted[0], meant[1]) if len(quoted) == 1 else None


def _replaced(arguments: Sequence[str], wrong: str, right: str) -> str | None:
    """Return the command line with an argument, an option's name or its value replaced, if it stands there once."""
    parts = [(word, *word.partition("=")) for word in arguments]
    places = [number for number, (word, name, _, value) in enumerate(parts) if wrong in (word, name, value)]
    if len(places) != 1:
        return None
    word, name, equals, value = parts[places[0]]
    new = right if wrong == word else f"{right}{equals}{value}" if wrong == name else f"{name}{equals}{right}"
    return _command([*arguments[: places[0]], new, *arguments[places[0] + 1 :]])


def _with(arguments: Sequence[str], instead: Mapping[str, Any]) -> list[str]:
    """Return the arguments with these settings, in place of those that were given."""
    words, options = list(arguments), {f"--{name.replace('_', '-')}": value for name, value in instead.items()}
    for option, value in options.items():
        text = f"{value:g}" if isinstance(value, float) else str(value)
        places = [number for number, word in enumerate(words) if word == option or word.startswith(f"{option}=")]
        for number in reversed(places):
            del words[number : number + (2 if words[number] == option else 1)]
        words += [option, text]
    return words


def _command(words: Sequence[str]) -> str:
    return shlex.join(["dpquant", *words])
