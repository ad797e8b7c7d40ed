# SPDX-License-Identifier: Apache-2.0
"""Too little memory: before the first charge a smaller microbatch is tried once; later it is one error."""

import dataclasses

import pytest
import torch

import dpquant
from dpquant.engine.passes import Objective
from dpquant.errors import SettingError
from dpquant.training import tuning
from dpquant.training.execution import ExecutionRequest
from dpquant.training.private import PrivateTraining
from dpquant.training.trial import that_fits
from items import Collating, Items, trained
from networks import loss

TOO_LITTLE = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    MemoryError(),
    RuntimeError("DefaultCPUAllocator: can't allocate memory"),
)
CHOSEN = ExecutionRequest(chosen=dpquant.formats.precision("luq-fp4"))


def execution_of(size):
    run = trained_once()
    return dataclasses.replace(run.execution, microbatch_size=size, analysis_microbatch_size=64)


_ONCE = []


def trained_once():
    if not _ONCE:
        _ONCE.append(trained(Collating(), PrivateTraining))
    return _ONCE[0]


def fits(largest, error=TOO_LITTLE[0]):
    tried = []

    def trial(execution):
        tried.append(execution.microbatch_size)
        if execution.microbatch_size > largest:
            raise error
        return 0.5

    return tried, trial


@pytest.mark.parametrize("error", TOO_LITTLE)
def test_a_smaller_microbatch_is_tried_once(error):
    tried, trial = fits(100, error)
    found, result = that_fits(execution_of(128), CHOSEN, trial)
    assert result == 0.5
    assert tried == [128, 64] and found.microbatch_size == found.analysis_microbatch_size == 64
    tried, trial = fits(128, error)
    assert that_fits(execution_of(128), CHOSEN, trial) == (execution_of(128), 0.5) and tried == [128]
    tried, trial = fits(20, error)
    with pytest.raises(SettingError, match=r"64 examples a backward pass; got too little\. Nothing was charged"):
        that_fits(execution_of(128), CHOSEN, trial)
    assert tried == [128, 64]


def test_a_size_of_the_users_is_not_replaced():
    tried, trial = fits(100)
    with pytest.raises(SettingError, match="128 examples"):
        that_fits(execution_of(128), dataclasses.replace(CHOSEN, microbatch_size=128), trial)
    assert tried == [128]


def test_other_errors_of_the_trial_are_not_about_memory():
    tried, trial = fits(0, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes"):
        that_fits(execution_of(128), CHOSEN, trial)
    assert tried == [128]


class RunsOut(PrivateTraining):
    """The third step needs more memory than there is."""

    error = TOO_LITTLE[0]

    def _clipped_sum(self, pieces, key):
        if self.steps_taken == 3:
            raise self.error
        return super()._clipped_sum(pieces, key)


@pytest.mark.parametrize("error", TOO_LITTLE)
def test_in_the_middle_of_a_step_it_is_one_error_and_the_charge_stays(error):
    kept = []

    class Kept(RunsOut):
        def __init__(self, *parts):
            super().__init__(*parts)
            self.error = error
            kept.append(self)

    with pytest.raises(SettingError, match="smaller microbatch_size") as raised:
        trained(Collating(), Kept)
    assert raised.value.__cause__ is raised.value.__context__ is None, "its message may hold data"
    assert [event.count for event in kept[0].events()] == [3] and kept[0].steps_taken == 3


def test_a_record_that_finds_no_memory_is_not_broken():
    class Greedy(Items):
        armed = False

        def __getitem__(self, index):
            if self.armed:
                raise TOO_LITTLE[0]
            return super().__getitem__(index)

    records = Greedy(noise=0)

    class Armed(PrivateTraining):
        def __init__(self, *parts):
            super().__init__(*parts)
            records.armed = True

    with pytest.raises(SettingError, match="memory enough for the step"):
        trained(records, Armed)


def test_sizes_are_doubled_while_the_device_holds_them():
    def sum_of(*_, microbatch_size, **__):
        if microbatch_size > 128:
            raise TOO_LITTLE[0]

    def timed(works):
        for work in works.values():
            work()
        return {name: 1 / int(name) for name in works}

    run = trained_once()
    batch = run._records._data_set.dpquant_batch(torch.arange(3))
    instruments = tuning.Instruments(timed=timed, clipped_sum=sum_of)
    size = tuning.fastest_microbatch_size(
        Objective(run.model, loss), batch, {}, expected_batch_size=4096, memory=None, by=instruments
    )
    assert size == 128
