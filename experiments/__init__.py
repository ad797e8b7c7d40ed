# SPDX-License-Identifier: Apache-2.0
"""Experiments of docs/paper.md: one file per table or figure; results/ has the results with their commands."""
