# SPDX-License-Identifier: Apache-2.0
"""One file per table or figure; results, with the commands that made them, under results/."""
