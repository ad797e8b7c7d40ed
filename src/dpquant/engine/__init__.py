# SPDX-License-Identifier: Apache-2.0
"""Per-example gradients of a model. Knows no budget."""
