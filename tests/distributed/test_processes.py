# SPDX-License-Identifier: Apache-2.0
"""Real processes, which torch.distributed connects by gloo. Three of them make all checks, as starting them takes
longer than any. `tests/training/test_distributed.py` has more cases, on threads.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("worker.py")
DIED = 9  # exit status of the process that dies


def started(folder, size=3):
    """What each process has found: [(number of processes, {check: result}), ...]; and where their files are."""
    facts = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "DPQUANT_CACHE": "off"}
    facts["PYTHONPATH"] = str(Path(__file__).parents[1])
    processes = [
        subprocess.Popen(
            [sys.executable, WORKER, str(rank), folder],
            env={**os.environ, **facts}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(size)
    ]  # fmt: skip
    errors = [process.communicate(timeout=600)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, DIED, 0], errors
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(size)]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """A folder, and what each process has found in it."""
    folder = tmp_path_factory.mktemp("processes")
    return folder, started(folder)


@pytest.fixture(scope="module")
def results(found):
    """{number of processes: the results of each}; of several groups of one number, those of the first."""
    return {
        size: [next(results for one, results in stages if one == size) for stages in found[1][:size]]
        for size in (1, 2, 3)
    }


@pytest.mark.parametrize("size", [2, 3])
def test_exact_sums_give_the_bits_of_one_process(size, results):
    one = results[1][0]["exact"]
    assert all(rank["exact"] == one for rank in results[size])


@pytest.mark.parametrize("size", [2, 3])
def test_a_sharded_optimizer_has_the_bits_and_the_checkpoint_of_one_process(size, results):
    one, ranks = results[1][0]["sharded"], [rank["sharded"] for rank in results[size]]
    assert all(rank["bits"] == one["bits"] for rank in ranks)
    values = 40 + 325  # of the convolution and of the linear layer
    assert one["held"] == 0 and 2 * values <= sum(rank["held"] for rank in ranks) < 2 * values + 6 * size


@pytest.mark.parametrize("size", [2, 3])
def test_plain_sums_are_the_same_on_all_processes_and_differ_from_those_of_one(size, results):
    """The second is the control for the exact ones."""
    assert all(rank["plain"]["parameters"] == results[size][0]["plain"]["parameters"] for rank in results[size])
    assert all(rank["plain"]["charged"] == results[1][0]["plain"]["charged"] for rank in results[size])
    assert results[size][0]["plain"]["parameters"] != results[1][0]["plain"]["parameters"]


@pytest.mark.parametrize("size", [2, 3])
def test_messages_and_tensors_come_as_they_were_sent(size, results):
    for rank in results[size]:
        assert rank["messages"] == [["from 0"] * 2, [f"from {one}" * one for one in range(size)]]
        assert rank["tensors"] == [True, True]


@pytest.mark.parametrize("size", [2, 3])
def test_a_process_without_records_makes_as_many_exchanges(size, results):
    ranks = [rank["empty"] for rank in results[size]]
    assert any(0 in rank["read"] for rank in ranks), "no empty share was drawn"
    assert all(rank["exchanges"] == ranks[0]["exchanges"] > 0 for rank in ranks)
    assert all(rank["parameters"] == ranks[0]["parameters"] for rank in ranks)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_where_the_ledger_fails_no_process_reads_a_record(size, results):
    for rank in results[size]:
        assert rank["ledger"]["error"] == "LedgerError" and rank["ledger"]["read"] == 0


@pytest.mark.parametrize("size", [2, 3])
def test_processes_with_records_of_their_own_have_the_bits_of_one_with_all(size, results):
    ranks, one = [rank["apart"] for rank in results[size]], results[1][0]["apart"]
    assert all(rank["parameters"] == one["parameters"] and rank["scores"] == one["scores"] for rank in ranks)
    assert sorted(read for rank in ranks for read in rank["read"]) == one["read"] != [], "each where it lies"
    assert all(rank["outside"] == [] and rank["said"] for rank in ranks) and not one["said"]


def test_a_run_of_one_process_goes_on_with_two_and_then_with_one(found, results):
    """Two steps by each, and the last: with exact sums and a seed, the bits of a run that was not stopped."""
    _, (first, second, _) = found
    one, two, last = first[1][1]["continued"], first[2][1]["continued"], first[3][1]["continued"]
    assert [one[2], two[2], last[2]] == [2, 4, 5]
    assert two[:3] == second[1][1]["continued"][:3]
    assert last[:2] == results[1][0]["exact"] != two[:2]
    assert [one[3], two[3], last[3]] == [False, True, True], "what was trusted stays said"


def test_a_process_that_hangs_in_a_step_counts_as_lost_before_it_goes_on(results):
    """The control is the step before: of a group that dpquant has not set up, whose timeout is the user's."""
    waits, late = (rank["hangs"] for rank in results[2])
    assert waits["steps"] == late["steps"] == 3
    assert waits["error"] == "GroupError" and waits["at"] < late["at"] - 5


ENDS = """
import atexit, sys, torch.distributed as dist
atexit.register(lambda: print(dist.is_initialized()))  # comes last
if sys.argv[1] == "program":
    dist.init_process_group("gloo")
from dpquant.training.distributed import group_here
assert group_here().size == 2
"""


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_no_thread_of_a_group_is_left_when_python_ends():
    """It could abort the process. The control is a group that the program has initialised, which is the program's."""
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    processes = {}
    for whose in ("dpquant", "program"):
        port = free_port()
        processes[whose] = [
            subprocess.Popen(
                [sys.executable, "-c", ENDS, whose], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                env={**os.environ, **place, "RANK": str(rank), "MASTER_PORT": str(port)},
            )
            for rank in range(2)
        ]  # fmt: skip
    initialised = {whose: [one.communicate(timeout=300)[0] for one in pair] for whose, pair in processes.items()}
    assert initialised == {"dpquant": ["False\n"] * 2, "program": ["True\n"] * 2}


def test_a_process_that_dies_takes_the_others_down_and_its_charge_stays(found):
    folder, (first, second, _) = found
    number, (size, last) = len(first) - 1, first[-1]
    assert size == 2 and last["dies"].startswith("GroupError: Expected all processes of the run to answer")
    assert all("dies" not in results for _, results in second), "it has written nothing since"
    charged = [json.loads(line) for line in (folder / str(number) / "ledger.jsonl").read_text().splitlines()]
    assert sum(line["count"] for line in charged if line["kind"] == "train") == 3
