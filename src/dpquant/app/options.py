# SPDX-License-Identifier: Apache-2.0
"""What the verbs of the command line share: exit codes, the error line, and options. Loads no torch."""

import sys
from typing import Annotated

import typer

WRONG_RESULT = 1
BAD_INPUT = 2
DIVERGED = 4
INTERRUPTED = 130

Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output, and nothing else.")]


def refuse(message: str, code: int = BAD_INPUT) -> int:
    """Print one error line on standard error, and return the exit code."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code
