# SPDX-License-Identifier: Apache-2.0
import ast
import contextlib  # noqa: F401 - for the fresh process
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
    for _ in range(8):
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


def in_a_fresh_process(expression):
    """The value of one of this file's functions where the heap has no large free block from earlier tests."""
    program = f"import test_working_memory as t; print(t.{expression})"
    fresh = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
    )
    return ast.literal_eval(fresh.stdout)


def test_without_it_pages_are_given_back():
    assert in_a_fresh_process("new_pages(t.contextlib.nullcontext)") > 100_000


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


def test_what_steps_keep_can_be_given_back():
    give_back()
    taken, left = in_use_after_a_step(give_back)
    assert taken > 2**27 and left < 2**25


def test_otherwise_it_stays():
    give_back()
    taken, left = in_use_after_a_step(lambda: None)
    assert taken > 2**27 and left > 2**27


def left_of_a_large_block():
    """Bytes of physical memory that the program's own block leaves behind, once it is freed."""
    before = Path("/proc/self/statm").read_text().split()[1]
    block = torch.ones(2**25)
    del block
    return (int(Path("/proc/self/statm").read_text().split()[1]) - int(before)) * resource.getpagesize()


def left_between_and_in_steps():
    with working_memory(), working_memory():
        pass
    between = left_of_a_large_block()
    with working_memory():
        return between, left_of_a_large_block()


def test_between_steps_large_blocks_come_and_go_as_before_and_in_steps_they_stay():
    between, within = in_a_fresh_process("left_between_and_in_steps()")
    assert between < 2**24 and within > 2**26


def test_between_steps_the_blocks_are_out_of_reach_and_in_one_free():
    with working_memory():
        assert not module._held
        free = module._glibc().mallinfo2().fordblks  # left by whatever ran before
        block = torch.ones(free // 4 + 2**22)
        del block
    assert module._held
    with working_memory(), working_memory():  # a step inside of a step changes nothing
        assert not module._held
    assert module._held


def test_holding_does_not_make_the_heap_grow():
    libc = module._glibc()
    with working_memory():
        block = torch.ones(2**24)
        del block
        before = libc.mallinfo2().arena
    assert libc.mallinfo2().arena == before and sum(module._held.values()) > 2**25


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
    assert seen == [before] and list(module._held) == before


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
