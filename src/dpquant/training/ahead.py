# SPDX-License-Identifier: Apache-2.0
"""Work of a step that is done while the model computes: the next microbatch is read, and for a GPU the noise is drawn.

Threads do it. Both belong to a step that is charged already, and neither changes a bit: microbatches are
made in the same order, and noise follows from key, step and name alone. A thread that reads mostly waits for a disk,
so it reads ahead on a CPU, too. Drawing noise would take the cores from the step there.
"""

import collections
import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from dpquant.engine.batches import pinned

Item = TypeVar("Item")


def made_ahead(makers: Iterable[Callable[[], Item]], workers: int = 1) -> Iterator[Item]:
    """Yield what each function returns, in their order; while the caller works with one, threads make the next ones.

    What a function raises is raised where its item would be yielded. Once the caller stops, the items that are being
    made are waited for, and no other is begun.

    Args:
      makers: functions; with several workers they are called at the same time.
      workers: number of threads, and of items that are made ahead.
    """
    todo = iter(makers)
    with ThreadPoolExecutor(workers) as pool:
        coming = collections.deque(pool.submit(make) for make in itertools.islice(todo, workers))
        try:
            while coming:
                item = coming.popleft().result()
                coming.extend(pool.submit(make) for make in itertools.islice(todo, 1))
                yield item
        finally:
            for one in coming:
                one.cancel()


@contextlib.contextmanager
def drawing(draws: Mapping[str, Callable[[], Tensor]], device: torch.device) -> Iterator[Callable[[str], Tensor]]:
    """Yield a function that returns the tensor of a name, drawn in a thread by then; on a CPU it draws when called.

    It raises what the draw raises, and gives each tensor once. What is not drawn when the block ends is left out.

    Args:
      draws: {name: function that draws a tensor on the CPU}, in the order in which they will be asked for.
      device: to which the tensors will be copied.
    """
    if device.type == "cpu":
        yield lambda name: draws[name]()
        return
    worker = ThreadPoolExecutor(1)
    try:
        coming = {name: worker.submit(lambda draw=draw: pinned(draw(), device)) for name, draw in draws.items()}
        yield lambda name: coming.pop(name).result()
    finally:
        worker.shutdown(cancel_futures=True)
