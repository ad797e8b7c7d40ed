# SPDX-License-Identifier: Apache-2.0
"""Products of codes."""


def run(report, end):
    """Nothing yet."""
