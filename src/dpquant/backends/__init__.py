# SPDX-License-Identifier: Apache-2.0
"""Quantization to number codes and exact products of codes, per device. Knows neither models nor privacy."""
