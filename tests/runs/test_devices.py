# SPDX-License-Identifier: Apache-2.0
"""The setting `device` names the CPU or a GPU that is there and new enough, or it is one clear error."""

import pytest
import torch
from torch import nn

import dpquant
from dpquant.app.cli import run
from dpquant.errors import ModelError, SettingError
from dpquant.runs.devices import described, device_of
from gpus import Gpus

NEW, OLD = (9, 0), (6, 1)


def test_auto_takes_a_gpu_if_there_is_one():
    assert device_of("auto", Gpus()) == device_of("cpu", Gpus(NEW)) == torch.device("cpu")
    assert device_of("auto", Gpus(NEW)) == device_of("cuda", Gpus(NEW)) == torch.device("cuda", 0)
    assert device_of("cuda:1", Gpus(OLD, NEW)) == torch.device("cuda", 1)


@pytest.mark.parametrize(
    ("name", "gpus", "built_for", "words"),
    [
        ("cuda", Gpus(), None, "built for CPUs only"),
        ("cuda:3", Gpus(), "13.0", "no GPU, or no driver"),
        ("cuda:2", Gpus(NEW, NEW), "13.0", r"N in 0 \.\. 1; got device=cuda:2"),
        ("auto", Gpus(OLD), "13.0", r"capability 7\.0 or newer; got device=auto, Test \(6, 1\) of 6\.1"),
        ("cuda:1", Gpus(NEW, OLD), "13.0", "of 6.1"),
    ],
)
def test_a_gpu_that_cannot_be_used_is_one_error(name, gpus, built_for, words):
    with pytest.raises(SettingError, match=words) as error:
        device_of(name, gpus, built_for=built_for)
    assert "\n" not in str(error.value)


def test_a_device_is_told_with_its_name():
    assert described(torch.device("cpu"), Gpus()) == "cpu"
    assert described(torch.device("cuda", 1), Gpus(OLD, NEW)) == f"cuda:1 (Test {NEW})"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_run_on_a_gpu_that_is_not_there_leaves_nothing(capsys, tmp_path):
    assert run(["train", "--device", "cuda", "--out", str(tmp_path / "run")]) == 2
    assert "got none that torch sees" in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.parametrize("plant", ["parameter", "buffer"])
def test_a_model_on_two_devices_is_refused(plant):
    network = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    dpquant.prepare(network)
    if plant == "buffer":
        network.register_buffer("table", torch.zeros(3, device="meta"))
    else:
        network[1].weight = nn.Parameter(torch.zeros(2, 4, device="meta"))
    with pytest.raises(ModelError, match=r"0.weight on cpu and (1.weight|table) on meta"):
        dpquant.prepare(network)
