# SPDX-License-Identifier: Apache-2.0
"""Real processes, which torch.distributed connects by gloo. One set of them makes all checks, as starting them takes
longer than any. `tests/training/test_distributed.py` has more cases, on threads.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("worker.py")


def started(size, folder, *checks, backend="gloo"):
    """The results of each process' checks, {check: result}; the exit status of each."""
    folder.mkdir(exist_ok=True)
    paths = os.pathsep.join(str(Path(__file__).parents[up]) for up in (1,))
    facts = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "DPQUANT_CACHE": "off", "PYTHONPATH": paths}
    processes = [
        subprocess.Popen(
            [sys.executable, WORKER, str(rank), str(size), folder, *checks],
            env={**os.environ, **facts}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(size)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=600) for process in processes]
    found = [json.loads(path.read_text()) if path.exists() else {} for path in map(_result(folder), range(size))]
    return found, [process.returncode for process in processes], [errors for _, errors in outputs]


def _result(folder):
    return lambda rank: folder / f"rank{rank}.json"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """{number of processes: the results of each}."""
    folder = tmp_path_factory.mktemp("processes")
    checks = ("exact", "sharded", "plain", "messages", "tensors", "empty", "ledger")
    found = {}
    for size in (1, 2, 3):
        results, codes, errors = started(size, folder / str(size), *checks)
        assert codes == [0] * size, errors
        found[size] = results
    return found


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


def test_a_process_that_dies_takes_the_others_down_and_its_charge_stays(tmp_path):
    began = time.monotonic()
    _, codes, errors = started(2, tmp_path / "dead", "dies")
    assert codes == [1, 9] and time.monotonic() - began < 120
    assert "GroupError: Expected all processes of the run to answer" in errors[0]
    charged = [json.loads(line) for line in (tmp_path / "dead" / "ledger.jsonl").read_text().splitlines()]
    assert sum(line["count"] for line in charged if line["kind"] == "train") == 3
