# SPDX-License-Identifier: Apache-2.0
"""Whoever is lost is named, once. The processes are threads, and their store is in memory."""

import datetime
import threading

import pytest
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]: documented

from dpquant.errors import GroupError
from dpquant.training.roll_call import RollCall, departing, lost

SOON = datetime.timedelta(seconds=0.3)
LATE = datetime.timedelta(seconds=30)


def answers(size, alive, question):
    """`question(roll)` of each process that is alive, {rank: answer or error}; all ask at the same time."""
    store, found = HashStore(), {}

    def ask(rank):
        try:
            found[rank] = question(RollCall(store, rank, size))
        except GroupError as error:
            found[rank] = error

    threads = [threading.Thread(target=ask, args=(rank,)) for rank in alive]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return found


@pytest.mark.parametrize(("alive", "dead"), [((0, 1), 2), ((0, 2), 1), ((1, 2), 0)])
def test_the_one_that_is_lost_is_known_at_once_and_one_process_tells(alive, dead):
    found = answers(3, alive, lambda roll: roll.lost(LATE))
    assert found == {rank: ([dead], rank == min(alive)) for rank in alive}


def test_several_that_are_lost_are_known_after_a_while():
    assert answers(4, (1, 3), lambda roll: roll.lost(SOON)) == {1: ([0, 2], True), 3: ([0, 2], False)}


def test_nobody_tells_of_a_process_that_has_told_its_error_itself():
    def ask(roll):
        if roll.rank == 1:
            return roll.leave()
        return roll.lost(LATE)

    found = answers(3, (0, 1, 2), ask)
    assert found[0] == ([1], False) or not found[0][1]
    assert not found[2][1]


def test_all_come_and_agree_on_a_name():
    found = answers(3, (0, 1, 2), lambda roll: roll.come(LATE).name)
    assert found[0] == found[1] == found[2] != ""


def test_those_who_have_not_come_are_named_by_process_0():
    found = answers(3, (0, 2), lambda roll: roll.come(datetime.timedelta(seconds=1)))
    assert "got none of process 1 within 1 s" in str(found[0]) and found[0].told_by
    found = answers(2, (1,), lambda roll: roll.come(datetime.timedelta(seconds=1)))
    assert "got none of process 0 within 1 s" in str(found[1]) and not found[1].told_by


@pytest.mark.parametrize("first", [0, 1])
def test_what_a_former_start_has_left_is_no_answer(first):
    """The same store sees two starts; whoever comes first to the second one does not hear those of the first."""
    store, names = HashStore(), []

    def come(rank):
        names.append(RollCall(store, rank, 2).come(LATE).name)

    for _ in range(2):
        threads = [threading.Thread(target=come, args=(rank,)) for rank in (first, 1 - first)]
        for thread in threads:
            thread.start()
            threading.Event().wait(0.2)
        for thread in threads:
            thread.join(20)
    assert names[0] == names[1] != names[2] == names[3]


def test_none_parts_before_all_have_what_was_sent():
    order = []

    def part(roll):
        if roll.rank == 1:
            threading.Event().wait(0.2)
            order.append("sent")
        roll.part(0)
        order.append("gone")

    answers(2, (0, 1), part)
    assert order == ["sent", "gone", "gone"]


def test_without_a_store_the_error_of_the_exchange_is_told(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    error = lost(RuntimeError("Connection closed by peer [127.0.0.1]:4711\nmore"))
    assert "got a RuntimeError: Connection closed by peer [127.0.0.1]:4711. One has" in str(error) and error.told_by
    with departing():
        pass
    with pytest.raises(KeyError), departing():
        raise KeyError
