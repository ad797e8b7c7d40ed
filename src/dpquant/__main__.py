# SPDX-License-Identifier: Apache-2.0
"""`python -m dpquant`: the command line, also where its program is not on the path."""

from dpquant.cli import main

main()
