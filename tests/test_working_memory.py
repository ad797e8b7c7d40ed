# SPDX-License-Identifier: Apache-2.0
import contextlib
import threading

import pytest
import torch

from dpquant import working_memory as module
from dpquant.working_memory import working_memory

resource = pytest.importorskip("resource")
pytestmark = pytest.mark.skipif(
    module._glibc() is None or threading.current_thread() is not threading.main_thread(), reason="not managed here"
)


def new_pages(keep):
    """How many pages the second of two equal pieces of work gets anew."""
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        with keep():
            for _ in range(3):
                blocks = [torch.ones(2**24) for _ in range(4)]  # 64 MiB each
                del blocks
        pages = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        torch.ones(2**22)  # somebody else's block, larger than what glibc gives back at once
    return pages


def test_the_second_step_works_in_the_first_ones_pages():
    assert new_pages(working_memory) < 10_000


def test_without_it_pages_are_given_back():
    assert new_pages(contextlib.nullcontext) > 100_000


def test_between_steps_the_blocks_are_out_of_reach_and_in_one_free():
    with working_memory():
        assert not module._held
        block = torch.ones(2**22)
        del block
    held = list(module._held)
    assert held
    with working_memory(), working_memory():  # a step inside of a step changes nothing
        assert not module._held
    assert module._held


def test_another_thread_is_left_alone():
    seen = []

    def work():
        with working_memory():
            seen.append(list(module._held))

    with working_memory():
        pass
    before = list(module._held)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before] and module._held == before
