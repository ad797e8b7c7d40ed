# SPDX-License-Identifier: Apache-2.0
"""What is done ahead in a thread changes no bit, surfaces its own errors, and stays within its step."""

import threading

import pytest
import torch

import dpquant
from dpquant.errors import DataError, ModelError
from dpquant.training.ahead import drawing, made_ahead
from dpquant.training.private import PrivateTraining
from dpquant.training.records import Records
from elsewhere import DEVICE, Device, Elsewhere
from items import Collating, Items, dropping, plan_of, trained
from networks import loss

CPU = torch.device("cpu")


def in_main():
    return threading.current_thread() is threading.main_thread()


@pytest.mark.parametrize("workers", [1, 3])
def test_items_come_in_order_and_as_many_as_there_are_workers_are_made_ahead(workers):
    made, used = [], []

    def maker(number):
        return lambda: made.append((number, in_main())) or number

    for item in made_ahead(map(maker, range(9)), workers):
        assert len(made) <= len(used) + 1 + workers, "more were made ahead"
        used.append(item)
    assert used == list(range(9)) and sorted(made) == [(number, False) for number in used]


def test_several_workers_make_items_at_the_same_time():
    meet = threading.Barrier(2, timeout=30)  # one alone would wait until it breaks
    assert list(made_ahead([lambda: meet.wait() >= 0] * 4, 2)) == [True] * 4


def test_what_raises_ahead_is_raised_in_its_place():
    def fails():
        raise KeyError("of the user")

    for workers in (1, 2):
        ahead = made_ahead([lambda: 1, fails, lambda: 3], workers)
        assert next(ahead) == 1
        with pytest.raises(KeyError, match="of the user"):
            next(ahead)


@pytest.mark.parametrize("workers", [1, 3])
def test_who_stops_leaves_nothing_running(workers):
    made, before = [], threading.active_count()
    ahead = made_ahead((lambda number=number: made.append(number) or number for number in range(20)), workers)
    assert next(ahead) == 0
    assert threading.active_count() > before
    ahead.close()
    assert len(made) <= 1 + workers and threading.active_count() == before


def test_draws_of_a_gpu_are_made_in_a_thread_and_those_of_a_cpu_when_asked_for():
    for device, expected in ((CPU, True), (DEVICE, False)):
        threads = []

        def draw(name, threads=threads):
            threads.append(threading.current_thread() is threading.main_thread())
            return torch.full((2,), float(name))

        with drawing({str(name): lambda name=name: draw(name) for name in range(3)}, device) as drawn:
            assert [drawn(str(name)).tolist() for name in range(3)] == [[0, 0], [1, 1], [2, 2]]
        assert threads == [expected] * 3


def test_a_draw_that_raises_surfaces_as_itself_and_the_rest_is_left_out():
    drew, begun_drawing, go_on = [], threading.Event(), threading.Event()

    def fails():
        begun_drawing.set()
        go_on.wait(10)
        raise ZeroDivisionError("of the noise")

    with (
        pytest.raises(ZeroDivisionError, match="of the noise"),
        drawing({"a": fails, "b": lambda: drew.append(1) or torch.ones(1)}, DEVICE) as drawn,
    ):
        assert begun_drawing.wait(10)
        go_on.set()
        drawn("a")
    go_on.clear()
    with drawing({"a": lambda: go_on.wait(0.2) and torch.ones(1), "b": lambda: drew.append(2)}, DEVICE):
        pass  # the step failed before it asked
    assert 2 not in drew


class Hurried(PrivateTraining):
    """A run on the CPU that does ahead what one on a GPU does ahead."""

    def __init__(self, setup, records, *others):
        super().__init__(setup, records, *others)
        self._device = records._device = DEVICE
        records._checked = lambda batch, count: batch  # which stays on the CPU


class Patient(PrivateTraining):
    """A run that reads nothing ahead."""

    def __init__(self, setup, records, *others):
        super().__init__(setup, records, *others)
        records.__class__ = type("ReadsNothingAhead", (Records,), {"reads_ahead": False})


class Reckless(Hurried):
    """A plant: every data set is read in the thread, those that draw too."""

    def __init__(self, setup, records, *others):
        super().__init__(setup, records, *others)
        records.__class__ = type("ReadsAlwaysAhead", (Records,), {"reads_ahead": True})


def parameters(run):
    return torch.cat([p.detach().flatten() for p in run.model.parameters()])


@pytest.mark.parametrize(("data_set", "readers"), [(Items, {True}), (Collating, {True, False})])
def test_a_run_is_the_same_bit_for_bit_whatever_is_done_ahead(data_set, readers):
    """Random transforms and dropout, quantized: data sets that draw are read between passes, others in the thread."""
    records = data_set()
    plain = trained(records, Patient)
    assert records.readers == {True}
    for kind, workers in ((PrivateTraining, 1), (Hurried, 1), (PrivateTraining, 3)):  # a CPU's noise is drawn later
        ahead = trained(records, kind, workers=workers)
        assert records.readers == readers  # the probe's two batches are always read by the main thread
        assert torch.equal(parameters(plain), parameters(ahead))


def test_records_are_read_ahead_within_a_charged_step_alone():
    """What is read when a step begins was drawn for it, and its charge is in the ledger."""
    charged, read = [], []

    class Seen(Collating):
        def dpquant_batch(self, record_ids):
            read.append(len(charged))
            return super().dpquant_batch(record_ids)

    class Counting(PrivateTraining):
        def step(self, batch):
            before = len(read)
            charged.append(batch)
            super().step(batch)
            assert set(read[before:]) <= {len(charged)} and threading.active_count() == threads

    threads = threading.active_count()
    trained(Seen(), Counting)
    assert len(charged) == 4 and read[-1] == 4


def test_a_random_transform_in_the_thread_would_be_seen():
    """Its generators are those of the model's dropout: a read that falls into a pass draws from another seed."""
    in_a_pass, passes = threading.Event(), []

    def in_the_middle():
        if threading.current_thread() is not threading.main_thread():
            in_a_pass.clear()
            in_a_pass.wait(0.3)

    def telling():
        network = dropping()
        network[1].register_forward_hook(lambda *_: passes.append(1) or in_a_pass.set())
        return network

    plain = parameters(trained(Items(), PrivateTraining))
    try:
        same = torch.equal(plain, parameters(trained(Items(before=in_the_middle), Reckless, network=telling)))
    except ModelError as error:  # or a backward pass finds that somebody draws meanwhile
        same = "backward pass to draw" not in str(error)
    assert passes and not same


def test_a_data_set_that_collates_at_random_is_refused():
    class AtRandom(Collating):
        def dpquant_batch(self, record_ids):
            inputs, labels = super().dpquant_batch(record_ids)
            return inputs + torch.randn(6), labels

    class OfItsOwn(Collating):
        generator = torch.Generator()

        def dpquant_batch(self, record_ids):
            inputs, labels = super().dpquant_batch(record_ids)
            return inputs + torch.randn(6, generator=self.generator), labels

    for kind in (AtRandom, OfItsOwn):
        with pytest.raises(DataError, match="draw no random numbers"):
            trained(kind(), PrivateTraining)


def test_an_error_of_the_noise_stops_the_step_as_itself():
    def fails(honest, *_, **purpose):
        if purpose["stream"] == "train" and purpose["step"] == 1:
            raise dpquant.SettingError("no noise today")
        return honest(*_, **purpose)

    for make_run in (PrivateTraining, Hurried):
        with pytest.raises(dpquant.SettingError, match="no noise today"):
            trained(Collating(), make_run, gaussian=fails)


def test_a_run_on_another_device_is_the_same_run():
    """All of it: checks, trial, steps. Data set and collate function give tensors of the CPU; the noise is drawn ahead.

    Records are read by the main thread, as the stand-in for a device is known to no other.
    """
    expected = parameters(trained(Items(noise=0), PrivateTraining))
    with Device() as device, device.waits("run"):
        found = torch.cat([p.detach().flatten() for p in trained(
            Items(noise=0), PrivateTraining, network=lambda: dropping().to(DEVICE)
        ).model.parameters()])  # fmt: skip
        assert isinstance(found, Elsewhere)
    torch.testing.assert_close(found.held, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("workers", [0, 65, -1, 1.5])
def test_workers_are_a_small_number(workers):
    with pytest.raises(dpquant.SettingError, match="Expected workers"):
        dpquant.make_private(
            model := dropping(), torch.optim.SGD(model.parameters(), lr=0.1), Collating(), loss_fn=loss,
            plan=plan_of(), policy=dpquant.AllPolicy(), workers=workers,
        )  # fmt: skip
