# SPDX-License-Identifier: Apache-2.0
"""The documentation site: pages of this repository, built for reading without a network.

`stage.py` copies pages and what they link to, `reference.py` writes the page of the command line from the settings,
zensical makes HTML of them, and `check.py` looks for every link of the result. `python -m website` does it all.
"""
