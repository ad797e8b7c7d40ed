# SPDX-License-Identifier: Apache-2.0
"""Private training runs. This is the only room that reads private records."""
