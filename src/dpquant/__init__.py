# SPDX-License-Identifier: Apache-2.0
"""Differentially private training with dynamic quantization."""
