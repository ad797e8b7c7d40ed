# SPDX-License-Identifier: Apache-2.0
"""The entry point of the command line, at a place that does not move: `dpquant.cli:main`. Loads no torch."""

from dpquant.app.cli import main

__all__ = ["main"]
