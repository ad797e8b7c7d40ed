# SPDX-License-Identifier: Apache-2.0
"""What the native kernels compute of fixed inputs, as hashes: the same on every processor. Needs NumPy alone.

python tests/bits.py FOLDER      prints the hashes of the _native module in a folder, for example under an emulator
"""

import hashlib
import sys
from pathlib import Path
from types import ModuleType

import numpy as np


def hashes(native: ModuleType) -> dict[str, str]:
    """Return {what: SHA-256 of the result}."""
    words = np.random.PCG64(1)
    found = {}
    noise = np.empty(100_001, np.float32)
    native.fill_noise(words.random_raw(100_002), noise, std=1.25, threads=1)
    found["noise"] = noise
    raw = words.random_raw(6 * 3 * 500)
    x = ((raw >> np.uint64(40)).astype(np.float32) * np.float32(2**-23) - 1).reshape(6, 1500)
    x[3] *= np.float32(1e-20)
    x[4] = 0
    for name, given in {
        "uniform, nearest": {"uniform": True, "stochastic": False, "max_code": 127.0, "zero_point": 0, "clip": None},
        "uniform, stochastic": {"uniform": True, "stochastic": True, "max_code": 7.0, "zero_point": 0, "clip": 2.5},
        "logarithmic": {"uniform": False, "stochastic": True, "max_code": 64.0, "zero_point": 0, "clip": None},
    }.items():
        codes, scale = np.zeros(x.shape, np.uint8), np.zeros(len(x), np.float32)
        keys = np.arange(1, len(x) + 1, dtype=np.int64) * 0x9E3779B97F4A7
        native.quantize_rows(x, keys, codes, scale, line=None, channels=1, threads=1, **given)
        found[name] = np.concatenate([codes.ravel(), scale.view(np.uint8)])
    return {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in found.items()}


if __name__ == "__main__":
    sys.path.insert(0, str(Path(sys.argv[1])))
    import _native

    for what, told in hashes(_native).items():
        print(f"{told}  {what}")
