# SPDX-License-Identifier: Apache-2.0
"""Records and networks by name. Knows no privacy and no quantization."""

from dpquant.data.dataset import Dataset, load, public_size
from dpquant.data.split import Split

__all__ = ["Dataset", "Split", "load", "public_size"]
