# SPDX-License-Identifier: Apache-2.0
"""How many rows a step computes: those of its records, and the copies that fill its last microbatch.

The number of records varies from step to step around the expected batch size, here as a normal variable. All of it is
public: nothing here knows how many records a step has drawn.
"""

import math

_BEGINS = {"cpu": 8}  # rows that take as long as beginning a pass: 2 to 4 in a MiniLM or ResNet18, 9 to 24 in a LeNet
_BEGINS_ELSEWHERE = 64  # not measured: a GPU is not filled by fewer
_ROOM = 8  # a size grows by at most an eighth to fit
_GAIN = 0.99  # share of the rows below which a size is changed


def fitted(size: int, expected_batch_size: float) -> int:
    """Return the size from n to 9 n / 8 with which a step computes the fewest rows; n unless that saves a hundredth.

    With n = 1024 and batches of 4096, half of the steps would have a fifth microbatch for a few records.
    """

    def rows(one: int) -> float:
        return rows_of_step(one, expected_batch_size)

    best = min(range(size, size + size // _ROOM + 1), key=rows)
    return best if rows(best) < _GAIN * rows(size) else size


def of_analysis(largest: int, expected_batch_size: float, *, groups: int, device: str) -> int:
    """Return the size up to `largest` with which an analysis takes the least time, on a CPU or another type of device.

    An analysis draws few records, and every pass of it is filled up: with 32 texts of four lengths and 64 examples a
    pass, seven of eight rows would be copies.
    """
    begins = _BEGINS.get(device, _BEGINS_ELSEWHERE)

    def cost(size: int) -> float:
        return rows_of_step(size, expected_batch_size, groups) * (1 + begins / size)

    return min(range(1, largest + 1), key=cost)


def rows_of_step(size: int, expected_batch_size: float, groups: int = 1) -> float:
    """Return how many rows a step computes on average, with microbatches of `size`.

    A step has microbatch number m, counted from 0, if it has more than m * size records. Of records in groups, as texts
    by their lengths, each group fills microbatches of its own. How many records are in which is private, so all count
    as equally large.
    """
    if groups > 1:
        return groups * rows_of_step(size, expected_batch_size / groups)
    spread = math.sqrt(2 * expected_batch_size)
    number = max(int((expected_batch_size - 4 * spread) / size), 0)
    microbatches = float(number)  # that practically every step has
    while (share := math.erfc((number * size - expected_batch_size) / spread) / 2) > 1e-4:
        microbatches += share
        number += 1
    return microbatches * size
