# SPDX-License-Identifier: Apache-2.0
"""A training run and its directory."""
