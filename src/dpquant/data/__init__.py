# SPDX-License-Identifier: Apache-2.0
"""Records and networks by name. Knows no privacy and no quantization."""
