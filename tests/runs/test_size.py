# SPDX-License-Identifier: Apache-2.0
"""What does not fit into memory is refused from its shapes alone; what does, is not."""

import pytest
import torch
from torch import nn

from dpquant.data import models
from dpquant.errors import SettingError
from dpquant.runs.settings import TrainSettings
from dpquant.runs.size import check_data_fits, check_network_fits


def settings(**given):
    return TrainSettings.chosen({"policy": "none", **given})


@pytest.mark.parametrize(
    ("given", "gib"),
    [
        ({"data": "mnist", "image_size": 1024}, 60_000 * 1024**2 / 2**30),
        ({"data": "cifar10", "image_size": 256}, 50_000 * 256**2 * 3 / 2**30),
        ({"data": "image-folder:x", "image_size": 256, "records": 10_000}, 10_000 * 256**2 * 6 / 2**30),
        ({"data": "image-folder:x", "image_size": 256, "sample_rate": 0.1, "batch_size": 1000.0}, 10_000 * 6 / 2**14),
    ],
)
def test_records_are_refused_just_above_the_memory_there_is(given, gib):
    check_data_fits(settings(**given), gib * 1.01)
    with pytest.raises(SettingError, match=f"image_size={given['image_size']}"):
        check_data_fits(settings(**given), gib * 0.99)


def test_records_of_their_own_size_are_not_judged():
    check_data_fits(settings(data="mnist"), 1e-9)


def network(width=1.0):
    return lambda: models.build("cnn", num_classes=10, input_shape=(1, 28, 28), width=width)


def blank(size=28):
    return torch.empty(2, 1, size, size, device="meta")


def test_a_network_is_refused_by_its_parameters_and_by_its_maps():
    check_network_fits(network(), blank(), "a network", 0.01)
    for build, images in ((network(100.0), blank()), (network(), blank(2000))):
        with pytest.raises(SettingError, match="Expected a network that fits into the memory of 0 GiB; got a network"):
            check_network_fits(build, images, "a network", 0.01)


def test_its_parameters_are_counted_with_what_is_kept_for_each():
    with_a_million = lambda: nn.Linear(1000, 1000, bias=False)  # noqa: E731
    gib = (4 * 10**6 + 2 * 1000 + 2 * 1000) * 4 / 2**30
    inputs = torch.empty(2, 1000, device="meta")
    check_network_fits(with_a_million, inputs, "it", gib * 1.001)
    with pytest.raises(SettingError):
        check_network_fits(with_a_million, inputs, "it", gib * 0.999)


def test_a_network_beyond_all_numbers_is_refused():
    with pytest.raises(SettingError, match="takes inf GiB"):
        check_network_fits(lambda: nn.Linear(2**40, 2**40), torch.empty(2, 2**40, device="meta"), "it", 1.0)


def test_a_network_that_does_not_run_is_left_to_the_checks_that_explain_it():
    check_network_fits(lambda: nn.Linear(3, 4), blank(), "it", 1.0)


def test_nothing_is_allocated():
    before = torch.get_rng_state()
    with pytest.raises(SettingError):
        check_network_fits(network(10_000.0), blank(), "it", 1.0)
    assert torch.equal(torch.get_rng_state(), before)


def test_of_records_that_stay_on_their_machine_each_process_holds_its_part(monkeypatch):
    """Four processes, a quarter each: 100,000 images of 224 pixels take 28 GiB, 7 on each."""
    given = {"data": "image-folder:/x", "records": 100_000, "image_size": 224}
    apart, shared = (TrainSettings.chosen({**given, "partition": one}) for one in ("range", "even"))
    monkeypatch.setenv("WORLD_SIZE", "4")
    check_data_fits(apart, 8)
    for settings, memory in ((apart, 6), (shared, 8)):
        with pytest.raises(SettingError, match="Expected records that fit"):
            check_data_fits(settings, memory)
