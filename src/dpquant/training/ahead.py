# SPDX-License-Identifier: Apache-2.0
"""Work of a step that is done while the model computes: the next microbatch is read, and for a GPU the noise is drawn.

One worker thread does it. Both belong to a step that is charged already, and neither changes a bit: microbatches are
made in the same order, and noise follows from key, step and name alone. A thread that reads mostly waits for a disk,
so it reads ahead on a CPU, too. Drawing noise would take the cores from the step there.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from dpquant.engine.batches import pinned

Item = TypeVar("Item")

_END: Any = object()


def one_ahead(items: Iterable[Item]) -> Iterator[Item]:
    """Yield the items of an iterable; each is made in a thread while the caller works with the one before.

    What raises while an item is made is raised where the item would be yielded. Once the caller stops, the item that is
    being made is waited for, and no other is begun.
    """
    iterator = iter(items)
    with ThreadPoolExecutor(1) as worker:
        coming = worker.submit(next, iterator, _END)
        while (item := coming.result()) is not _END:
            coming = worker.submit(next, iterator, _END)
            yield item


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
