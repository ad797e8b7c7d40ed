# SPDX-License-Identifier: Apache-2.0
"""Trials that could refute a claimed epsilon, run on the real code."""
