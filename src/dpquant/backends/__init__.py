# SPDX-License-Identifier: Apache-2.0
"""How codes are made and multiplied on a device. Knows no model, no privacy."""
