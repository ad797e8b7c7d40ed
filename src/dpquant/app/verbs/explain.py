# SPDX-License-Identifier: Apache-2.0
"""The verb `dpquant explain`. Loads no torch."""

from typing import Annotated

import typer
from rich.columns import Columns

from dpquant.app.output import results

_WIDEST = 100  # columns that are read with ease


def explain(
    context: typer.Context,
    word: Annotated[list[str] | None, typer.Argument(help="a word, a setting or a verb; none: list them")] = None,
) -> None:
    """Explain a word in about ten lines: epsilon, a format, a policy, any setting, any verb, exit codes.

    A setting comes with its range and its default, and says where that comes from. Without a word: all words.

    Example: dpquant explain noise_multiplier
    """
    from rich.markdown import Markdown  # slow to import

    from dpquant.app.explain import explained, words

    root = context.find_root().command
    verbs = {name: verb.help or "" for name, verb in getattr(root, "commands", {}).items()}
    console = results()
    console.width = min(console.width, _WIDEST)
    if not word:
        console.print(Columns(words(verbs), padding=(0, 3), equal=True, column_first=True))
        return
    console.print(Markdown(explained(" ".join(word), verbs)))
