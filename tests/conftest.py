# SPDX-License-Identifier: Apache-2.0
"""What every test shares: one thread, so that parallel test processes do not fight over cores."""

import torch

torch.set_num_threads(1)
