# SPDX-License-Identifier: Apache-2.0
"""Per-example gradients of a model, and the sum of them clipped. Knows neither budget nor noise."""
