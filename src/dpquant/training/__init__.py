# SPDX-License-Identifier: Apache-2.0
"""A private run: the only room that reads private records."""
