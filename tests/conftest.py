# SPDX-License-Identifier: Apache-2.0
"""What every test shares: one thread, so that parallel test processes do not fight over cores; no cache of choices.

Without a GPU, Triton's kernels run in its interpreter, which has to be told before triton is imported.
"""

import os

import torch

from dpquant.backends.choose import CACHE

pytest_plugins = ["durations", "tried"]

torch.set_num_threads(1)
os.environ[CACHE] = "off"
# Where these are set, pytest works out the whole difference of any two values that are compared: for two records of
# 20,000 lines, which planted bugs give, that takes hours.
for name in ("CI", "BUILD_NUMBER"):
    os.environ.pop(name, None)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
