# SPDX-License-Identifier: Apache-2.0
"""Secrets, chance, and the budget. Knows no model."""
