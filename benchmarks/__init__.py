# SPDX-License-Identifier: Apache-2.0
"""Measurements whose results are kept, by machine and date: `scripts/bench NAME`."""
