# SPDX-License-Identifier: Apache-2.0
"""What every test shares: one thread, so that parallel test processes do not fight over cores; no cache of choices."""

import os

import torch

from dpquant.backends.choose import CACHE

torch.set_num_threads(1)
os.environ[CACHE] = "off"
