# SPDX-License-Identifier: Apache-2.0
"""What dpquant measures on a GPU; `scripts/gpu` runs it."""
