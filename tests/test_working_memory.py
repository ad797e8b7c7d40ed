# SPDX-License-Identifier: Apache-2.0
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from dpquant import working_memory as module
from dpquant.working_memory import give_back, working_memory

resource = pytest.importorskip("resource")
pytestmark = pytest.mark.skipif(
    module._glibc() is None or threading.current_thread() is not threading.main_thread(), reason="not managed here"
)


def new_pages(keep):
    """How many pages the last of some equal pieces of work gets anew."""
    for _ in range(4):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        with keep():
            for _ in range(3):
                blocks = [torch.ones(2**24) for _ in range(4)]  # 64 MiB each
                del blocks
        pages = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        torch.ones(2**22)  # somebody else's block, larger than what glibc gives back at once
    return pages


def test_a_step_works_in_the_pages_of_those_before():
    assert new_pages(working_memory) < 10_000


def test_without_it_pages_are_given_back():
    """In a process of its own, whose heap has no large free block from earlier tests."""
    program = "import contextlib, test_working_memory as t; print(t.new_pages(contextlib.nullcontext))"
    fresh = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
    )
    assert int(fresh.stdout) > 100_000


def test_between_steps_the_blocks_are_out_of_reach_and_in_one_free():
    with working_memory():
        assert not module._held
        free = module._glibc().mallinfo2().fordblks  # left by whatever ran before
        block = torch.ones(free // 4 + 2**22)
        del block
    held = list(module._held)
    assert held
    with working_memory(), working_memory():  # a step inside of a step changes nothing
        assert not module._held
    assert module._held


def in_use_after_a_step(then):
    """Bytes of physical memory that a step's work has taken, and what of it is left once `then` was called."""

    def now():
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize()

    before = now()
    with working_memory():
        blocks = [torch.ones(2**24) for _ in range(4)]
        del blocks
    after_step = now() - before
    then()
    return after_step, now() - before


def test_what_is_held_can_be_given_back():
    give_back()
    taken, left = in_use_after_a_step(give_back)
    assert taken > 2**27 and left < 2**25 and not module._held


def test_otherwise_it_stays():
    give_back()
    taken, left = in_use_after_a_step(lambda: None)
    assert taken > 2**27 and left > 2**27


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


def heap_growth(steps):
    """Bytes that the heap grows by in so many steps, the program renewing what it keeps of their results."""
    libc = module._glibc()
    kept = None
    before = libc.mallinfo2().arena
    for _ in range(steps):
        with working_memory():
            result = [torch.ones(2**20) for _ in range(8)]  # 4 MiB each
        kept = [t * 2 for t in result]
        del result
    assert kept is not None
    return libc.mallinfo2().arena - before


def test_the_heap_does_not_grow_from_step_to_step():
    heap_growth(5)
    assert heap_growth(10) < 2**26


def test_the_heap_grows_where_all_that_is_free_is_held(monkeypatch):
    hold = module._hold

    def greedy(libc):
        module._free = 0
        hold(libc)

    monkeypatch.setattr(module, "_hold", greedy)
    heap_growth(5)
    assert heap_growth(10) > 2**26
