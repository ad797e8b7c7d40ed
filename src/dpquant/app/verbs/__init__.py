# SPDX-License-Identifier: Apache-2.0
"""Verbs of the command line, one a file: each parses, calls the library and prints. `app/cli.py` registers them."""
