# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import pytest
import torch

from dpquant.errors import SettingError
from dpquant.runs.devices import device_of, use_threads
from dpquant.runs.launched import Launch

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "TORCHELASTIC_RESTART_COUNT": "2",
    "TORCHELASTIC_RUN_ID": "fraud-7-of-november",
    "OMP_NUM_THREADS": "1",
}


def test_what_torchrun_says_is_read():
    launch = Launch.here(TORCHRUN)
    assert (launch.rank, launch.size, launch.local_rank, launch.local_size, launch.attempt) == (5, 8, 1, 4, 2)
    assert launch.folder("digits") == Path("runs/digits-fraud-7-")


@pytest.mark.parametrize("environment", [{}, {"WORLD_SIZE": "1", "RANK": "0"}, {"WORLD_SIZE": "many"}, {"RANK": "3"}])
def test_a_process_alone_is_the_first_and_keeps_its_threads(environment):
    launch = Launch.here({**environment, "OMP_NUM_THREADS": "1"})
    assert (launch.rank, launch.size, launch.speaks, launch.threads(64)) == (0, 1, True, None)


def test_the_first_process_of_each_machine_speaks():
    assert not Launch.here(TORCHRUN).speaks
    assert Launch.here({**TORCHRUN, "LOCAL_RANK": "0"}).speaks


@pytest.mark.parametrize(
    ("cores", "set_to", "threads"), [(16, "1", 4), (18, "1", 4), (4, "1", None), (2, "1", None), (16, "3", None)]
)
def test_the_one_thread_that_torchrun_sets_is_undone_and_no_other_number(cores, set_to, threads):
    """4 processes share the machine; one core each is one thread already."""
    assert Launch.here({**TORCHRUN, "OMP_NUM_THREADS": set_to}).threads(cores) == threads


def test_threads_are_this_process_part_unless_they_are_given():
    before = torch.get_num_threads()
    try:
        use_threads(None, Launch(size=2, local_size=2))
        assert torch.get_num_threads() == before, "OMP_NUM_THREADS was not torchrun's"
        use_threads(2, Launch(size=2, local_size=2, one_thread=True))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("run_id", ["none", ""])
def test_without_a_name_that_all_share_there_is_no_default_directory(run_id):
    with pytest.raises(SettingError, match="Give --out RUN"):
        Launch.here({**TORCHRUN, "TORCHELASTIC_RUN_ID": run_id}).folder("digits")


class Gpus:
    """Four of them."""

    @staticmethod
    def is_available():
        return True

    @staticmethod
    def device_count():
        return 4

    @staticmethod
    def get_device_capability(number):
        return (9, 0)


def test_each_process_of_a_machine_takes_a_gpu_of_its_own():
    launch = Launch(rank=6, size=8, local_rank=2, local_size=4)
    assert device_of("auto", Gpus, launch=launch) == device_of("cuda", Gpus, launch=launch) == torch.device("cuda:2")
    assert device_of("cpu", Gpus, launch=launch) == torch.device("cpu")
    with pytest.raises(SettingError, match="share one GPU"):
        device_of("cuda:1", Gpus, launch=launch)
    with pytest.raises(SettingError, match="device=cuda:N with N in"):
        device_of("cuda", Gpus, launch=Launch(rank=4, size=8, local_rank=4, local_size=8))
