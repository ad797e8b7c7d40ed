# SPDX-License-Identifier: Apache-2.0
"""Pages and texts about runs: the report, the comparison of several runs, a model card and a registry draft.

Everything here is a function of released facts (`facts.Facts`) and returns text. Nothing here loads torch, reads a run
directory or computes an epsilon: `app/report.py` gathers the facts.
"""
