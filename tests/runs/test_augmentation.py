# SPDX-License-Identifier: Apache-2.0
"""Views of an image: what they are, that they follow from records, and that an example of several is one example."""

import dataclasses
import json

import pytest
import torch
from torch import nn

import dpquant
from dpquant.app.cli import run
from dpquant.data.dataset import load
from dpquant.engine.clip import clipped_sum
from dpquant.engine.randomness import RecordDraws
from dpquant.errors import SettingError
from dpquant.runs.augmentation import augmented, view_of
from dpquant.runs.evaluation import per_example_loss
from dpquant.runs.settings import TrainSettings

C, VIEWS, SHIFTED = 0.5, 3, torch.tensor([0.99, 0.99, 0.0])
STILL = torch.tensor([0.5, 0.5, 0.9])  # in the middle of all shifts, and not mirrored
DIGITS = load("digits")


def images(count=5):
    torch.manual_seed(0)
    return torch.randn(count, 1, 8, 8), torch.arange(count) % 10


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 36, 10))


def loss_of(augment="crop-flip", views=VIEWS):
    return augmented(per_example_loss, TrainSettings.chosen({"augment": augment, "views": views}), DIGITS)


def sum_of(loss_fn, batch, policy=(), format="int8", seed=0):
    model = dpquant.prepare(network(), format=format, backend="simulate")
    dpquant.set_policy(model, policy)
    ids = torch.arange(len(batch[1]))
    found = clipped_sum(model, loss_fn, batch, max_grad_norm=C, record_ids=ids, step=0, seed=seed)
    return torch.cat([one.flatten() for one in found.grads.values()])


def test_a_view_in_the_middle_is_the_image_and_others_are_shifted_and_mirrored():
    x, _ = images()
    assert torch.equal(view_of(x, STILL.expand(5, 3), mirrors=True), x)
    moved = view_of(x, SHIFTED.expand(5, 3), mirrors=False)
    assert torch.equal(moved[:, :, :-1, :-1], x[:, :, 1:, 1:]) and torch.equal(moved[:, :, -1, :-1], x[:, :, -2, 1:])
    mirrored = view_of(x, torch.tensor([0.5, 0.5, 0.1]).expand(5, 3), mirrors=True)
    assert torch.equal(mirrored, x.flip(3))
    assert torch.equal(view_of(x, torch.tensor([0.5, 0.5, 0.1]).expand(5, 3), mirrors=False), x)


def test_every_example_has_a_view_of_its_own():
    x, _ = images()
    views = view_of(x, torch.stack([STILL, SHIFTED, STILL, SHIFTED, STILL]), mirrors=True)
    assert [bool((view == image).all()) for view, image in zip(views, x, strict=True)] == [True, False] * 2 + [True]


def test_views_follow_from_the_record_and_not_from_its_place():
    def drawn(ids):
        with RecordDraws(7, torch.tensor(ids)):
            return torch.rand(len(ids), VIEWS, 3)

    both = drawn([4, 9, 2])
    assert torch.equal(both[[1, 2]], drawn([9, 2])) and not torch.equal(both[0], both[1])
    assert len(both.flatten().unique()) == both.numel()


@pytest.mark.parametrize("policy", [(), ("0", "3")])
def test_an_example_of_several_views_is_clipped_once(policy):
    """One example's sum is at most C, and that of all views that are alike is that of one."""
    x, y = images()
    for row in range(len(y)):
        alone = sum_of(loss_of(), (x[row : row + 1], y[row : row + 1]), policy)
        assert 0.9 * C < alone.norm() <= C
    flat = torch.ones(5, 1, 8, 8), y  # every shift of it is itself
    if not policy:
        assert torch.allclose(sum_of(loss_of(), flat), sum_of(per_example_loss, flat), atol=1e-6)


def test_the_sum_is_that_of_a_loop_over_examples_and_views():
    x, y = images()
    views = []

    def seen(model, batch):
        views.append(batch[0].detach())
        return per_example_loss(model, batch)

    settings = TrainSettings.chosen({"augment": "crop-flip", "views": VIEWS})
    found = sum_of(augmented(seen, settings, DIGITS), (x, y))
    views = torch.stack(views[-VIEWS:])[:, : len(y)]
    assert not torch.equal(views[0], views[1])
    expected, model = torch.zeros_like(found), network()
    for row in range(len(y)):
        model.zero_grad()
        torch.stack([per_example_loss(model, (view[None, row], y[None, row])) for view in views]).mean().backward()
        mine = torch.cat([p.grad.flatten() for p in model.parameters()])
        expected += mine * min(1.0, C / mine.norm())
    assert torch.allclose(found, expected, atol=1e-5)


def test_what_is_no_image_has_no_views():
    rows = dataclasses.replace(DIGITS, input_shape=(6,))
    with pytest.raises(SettingError, match="Expected images for augment=crop"):
        augmented(per_example_loss, TrainSettings.chosen({"augment": "crop"}), rows)
    assert augmented(per_example_loss, TrainSettings.chosen({}), rows) is per_example_loss


def test_a_run_on_views_is_checked_as_every_run(tmp_path, capsys):
    options = "--epochs 1 --augment crop --views 2 --microbatch-size 32 --policy all --backend simulate --threads 1"
    assert run(["train", *options.split(), "--out", str(tmp_path / "r"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["epsilon"] <= 8
    config = (tmp_path / "r" / "config.toml").read_text()
    assert 'augment = "crop"' in config and "views = 2" in config
