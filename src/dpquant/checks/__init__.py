# SPDX-License-Identifier: Apache-2.0
"""Does a model, with its loss and collate function, keep its examples apart? Knows no budget."""
