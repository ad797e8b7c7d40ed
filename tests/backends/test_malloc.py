# SPDX-License-Identifier: Apache-2.0
import ast
import contextlib
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from dpquant.backends import malloc as module
from dpquant.backends.malloc import working_memory

resource = pytest.importorskip("resource")
pytestmark = pytest.mark.skipif(
    module._glibc() is None or threading.current_thread() is not threading.main_thread(), reason="not managed here"
)


@pytest.fixture(scope="module")
def in_a_fresh_process():
    """A function's value where the heap is as it is after the imports: earlier tests leave blocks of all sizes.

    The functions are this file's, `t`. One process imports it, and forks for each question.
    """
    program = "import test_malloc as t; t.answer_questions()"
    command = [sys.executable, "-c", program]
    with subprocess.Popen(
        command, cwd=Path(__file__).parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as fresh:

        def ask(expression):
            print(expression, file=fresh.stdin, flush=True)
            return ast.literal_eval(fresh.stdout.readline())

        yield ask


def answer_questions():
    torch.set_num_threads(1)
    for expression in sys.stdin:
        if not os.fork():
            try:
                print(repr(eval(expression, {"t": sys.modules[__name__]})), flush=True)
            except BaseException as error:
                print(repr(repr(error)), flush=True)
            os._exit(0)
        os.wait()


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


def test_a_step_works_in_the_pages_of_those_before(in_a_fresh_process):
    assert in_a_fresh_process("t.new_pages(t.working_memory)") < 10_000


def test_without_it_pages_are_given_back(in_a_fresh_process):
    assert in_a_fresh_process("t.new_pages(t.contextlib.nullcontext)") > 100_000


def own_memory():
    """Bytes of physical memory that hold no file: the first call of an operator maps more of torch's own libraries."""
    _, resident, of_files, *_ = Path("/proc/self/statm").read_text().split()
    return (int(resident) - int(of_files)) * resource.getpagesize()


def in_use_after_a_step(then=lambda: None):
    """Bytes of physical memory that a step's work has taken, and what of it is left once `then` was called."""
    before = own_memory()
    with working_memory():
        blocks = [torch.ones(2**24) for _ in range(4)]
        del blocks
    after_step = own_memory() - before
    then()
    return after_step, own_memory() - before


def test_what_steps_keep_can_be_given_back(in_a_fresh_process):
    taken, left = in_a_fresh_process("t.in_use_after_a_step(t.module.give_back)")
    assert taken > 2**27 and left < 2**25


def test_otherwise_it_stays(in_a_fresh_process):
    taken, left = in_a_fresh_process("t.in_use_after_a_step()")
    assert taken > 2**27 and left > 2**27


def left_of_a_large_block():
    """Bytes of physical memory that the program's own block leaves behind, once it is freed."""
    before = own_memory()
    block = torch.ones(2**25)
    del block
    return own_memory() - before


def left_between_and_in_steps():
    with working_memory(), working_memory():
        pass
    between = left_of_a_large_block()
    with working_memory():
        return between, left_of_a_large_block()


def test_between_steps_large_blocks_come_and_go_as_before_and_in_steps_they_stay(in_a_fresh_process):
    between, within = in_a_fresh_process("t.left_between_and_in_steps()")
    assert between < 2**24 and within > 2**26


def held_in_turn():
    """Whether anything is held: in a step, after it, in a step inside of a step, after that."""
    seen = []
    with working_memory():
        seen.append(bool(module._held))
        block = torch.ones(2**24)
        del block
    seen.append(bool(module._held))
    with working_memory(), working_memory():
        seen.append(bool(module._held))
    return [*seen, bool(module._held)]


def test_between_steps_the_blocks_are_out_of_reach_and_in_one_free(in_a_fresh_process):
    assert in_a_fresh_process("t.held_in_turn()") == [False, True, False, True]


def growth_by_holding(believed=None):
    """Bytes that the heap grows by when a step's blocks are taken, and bytes that are held then."""
    libc = module._glibc()
    module._release(libc)
    block = torch.ones(2**24)
    del block
    before = libc.mallinfo2().arena
    module._hold(believed or libc)
    return libc.mallinfo2().arena - before, sum(module._held.values())


def test_holding_does_not_make_the_heap_grow(in_a_fresh_process):
    grown, held = in_a_fresh_process("t.growth_by_holding()")
    assert grown == 0 and held > 2**25


class Boastful:
    """The C library, with a heap that claims to have more free than it has, and that takes nothing from elsewhere."""

    def __getattr__(self, name):
        return getattr(module._glibc(), name)

    def mallopt(self, parameter, value):
        return module._glibc().mallopt(parameter, module._NEVER)

    def mallinfo2(self):
        info = module._glibc().mallinfo2()
        info.fordblks += 2**28
        return info


def test_it_would_where_more_is_taken_than_is_free(in_a_fresh_process):
    grown, _ = in_a_fresh_process("t.growth_by_holding(t.Boastful())")
    assert grown > 2**26


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


def heap_growth(steps, warm=5, hold=None):
    """Bytes that the heap grows by in so many steps after the first, the program renewing what it keeps of results."""
    libc = module._glibc()
    kept = None
    before = 0
    for step in range(warm + steps):
        if step == warm:
            before = libc.mallinfo2().arena
        with working_memory(hold):
            result = [torch.empty(2**20) for _ in range(8)]  # 4 MiB each
        kept = [torch.empty_like(t) for t in result]
        del result
    assert kept is not None
    return libc.mallinfo2().arena - before


def test_the_heap_does_not_grow_from_step_to_step(in_a_fresh_process):
    assert in_a_fresh_process("t.heap_growth(10)") < 2**26


def greedy(libc):
    """Hold all that is free, so that the program gets its own memory anew after every step."""
    module._free = 0
    module._hold(libc)


def test_the_heap_grows_where_all_that_is_free_is_held(in_a_fresh_process):
    assert in_a_fresh_process("t.heap_growth(10, hold=t.greedy)") > 2**26


def fragment(draw, hold):
    """Leave a heap of blocks of any size, of steps and of the program, some of them in use: these are returned."""
    kept = []
    for _ in range(draw.randint(1, 6)):
        largest = draw.uniform(14, 24)
        with working_memory(hold) if draw.random() < 0.6 else contextlib.nullcontext():
            blocks = [torch.empty(int(2 ** draw.uniform(6, largest))) for _ in range(draw.randint(20, 200))]
            draw.shuffle(blocks)
            kept.append(blocks[: int(len(blocks) * draw.uniform(0, 0.5))])
            del blocks
        draw.shuffle(kept)
        del kept[3:]
    return kept


def creeps(heaps, steps, hold=None):
    """Bytes that the heap grows by once warm, from heaps of random blocks, each in a process of its own."""
    found = []
    for seed in range(heaps):
        reader, writer = os.pipe()
        if not os.fork():
            kept = fragment(random.Random(seed), hold)
            os.write(writer, str(heap_growth(steps, warm=20, hold=hold)).encode())
            del kept
            os._exit(0)
        found.append(int(os.read(reader, 100)))
        os.wait()
    return found


def test_the_heap_does_not_creep_from_whatever_it_begins_with(in_a_fresh_process):
    # glibc alone does the same: blocks of which others have taken pieces fit no longer, until enough lie about
    assert max(in_a_fresh_process("t.creeps(heaps=20, steps=500)")) < 2**27


def test_creeping_is_seen_where_all_that_is_free_is_held(in_a_fresh_process):
    assert min(in_a_fresh_process("t.creeps(heaps=3, steps=30, hold=t.greedy)")) > 2**27
