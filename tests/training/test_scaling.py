# SPDX-License-Identifier: Apache-2.0
import dataclasses

import pytest

from dpquant.training import scaling
from dpquant.training.scaling import Network, Scaling, StepTimes, scaled

RESNET = StepTimes(fixed=0.205, per_example=4.5e-3, values=11_173_962, source="a benchmark")
FAST = Network(bandwidth=100.0)


def test_one_worker_takes_the_measured_time_and_sends_nothing():
    alone = scaled(RESNET, FAST, 1024, 1)
    assert alone.seconds == pytest.approx(0.205 + 4.5e-3 * 1024)
    assert (alone.speedup, alone.efficiency, alone.efficiency_growing, alone.megabytes) == (1, 1, 1, 0)


def test_two_workers_share_examples_and_noise_and_pay_for_the_exchange():
    two = scaled(RESNET, Network(bandwidth=1.0, latency=1e-3), 1024, 2)
    sent = 0.5 * 8 * RESNET.values  # half of it in each of two legs, 4 bytes a value
    exchange = sent * 8 / 1e9 + 2 * 1e-3
    assert two.megabytes == pytest.approx(sent / 1e6) and two.exchange_seconds == pytest.approx(exchange)
    assert two.seconds == pytest.approx(0.205 + 4.5e-3 * 512 - scaling.NOISE * RESNET.values / 2 + exchange)


def test_exact_sums_send_half_as_much_again():
    exact = dataclasses.replace(FAST, exact=True)
    assert exact.bytes_sent(RESNET.values, 4) == pytest.approx(1.5 * FAST.bytes_sent(RESNET.values, 4))


def test_what_no_example_takes_limits_how_much_faster_many_are():
    """Strong scaling ends, and a batch that grows with the workers goes on."""
    many = scaled(RESNET, FAST, 1024, 64)
    assert many.efficiency < 0.4 and many.efficiency_growing > 0.95
    free = dataclasses.replace(RESNET, fixed=0.0)
    assert scaled(free, FAST, 1024, 64).efficiency > 0.8


def test_a_slower_network_is_never_faster_and_1024_workers_are_in_the_table():
    found = {speed: Scaling.of(RESNET, Network(bandwidth=speed), 1024, 6) for speed in (1.0, 10.0, 100.0)}
    assert [one.workers for one in found[1.0].workers] == [1, 2, 4, 6, 8, 16, 64, 256, 1024]
    for slow, fast in zip(found[1.0].workers[1:], found[100.0].workers[1:], strict=True):
        assert slow.seconds > fast.seconds


def test_a_line_has_the_slope_of_the_sums_and_the_height_of_the_step():
    line = StepTimes.through((16, 0.1), (64, 0.34), values=3, source="here", whole=0.4)
    assert line.per_example == pytest.approx(0.005) and line.fixed == pytest.approx(0.4 - 64 * 0.005)


@pytest.mark.parametrize("few", [(16, 0.5), (16, -9.0)])
def test_noisy_times_give_no_negative_ones(few):
    line = StepTimes.through(few, (64, 0.34), values=3, source="here", whole=0.4)
    assert line.per_example >= 0 and line.fixed >= 0
    assert line.fixed + 64 * line.per_example == pytest.approx(0.4)
