# SPDX-License-Identifier: Apache-2.0
"""Trackers: sinks that hand a run's released numbers to other programs, where `--track` names them."""
