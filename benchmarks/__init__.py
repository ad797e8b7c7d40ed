# SPDX-License-Identifier: Apache-2.0
"""Benchmarks, run by `scripts/bench NAME`. Results are stored by machine and date."""
