# SPDX-License-Identifier: Apache-2.0

import pytest
import torch

from dpquant.data import dataset as data
from dpquant.data.rows import Rows
from dpquant.data.task import Task
from dpquant.runs.evaluation import accuracy, check_evaluation, evaluation_batch


def frozen_in_evaluation_mode():
    """A network whose last dropout its user keeps in evaluation mode, and whose first one not."""
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Flatten(), torch.nn.Dropout(), torch.nn.Linear(64, 10))
    model[2].eval()
    return model.requires_grad_(True)


def assert_gives_back_every_mode(evaluate):
    model, test = frozen_in_evaluation_mode(), data.load("digits").test
    modes = [module.training for module in model.modules()]
    assert evaluate(model, test) == evaluate(model, test), "evaluation drew at random"
    assert [module.training for module in model.modules()] == modes


def test_evaluation_gives_every_module_its_own_mode_back():
    assert_gives_back_every_mode(accuracy)


def with_one_mode_for_all(model, split):
    training = model.training
    found = accuracy(model, split)
    model.train(training)
    return found


def in_training_mode(model, split):
    inputs, targets = split.batch(torch.arange(len(split)))
    return float((model(inputs).argmax(1) == targets).float().mean())


@pytest.mark.parametrize("planted", [with_one_mode_for_all, in_training_mode])
def test_modes_that_are_not_given_back_would_be_seen(planted):
    with pytest.raises(AssertionError):
        assert_gives_back_every_mode(planted)


class Counting:
    """A split that counts the records that are asked for at once."""

    def __init__(self, split):
        self._split, self.sizes = split, []
        self.targets, self.readable = split.targets, split.readable

    def __len__(self):
        return len(self._split)

    def batch(self, ids):
        self.sizes.append(len(ids))
        return self._split.batch(ids)


def assert_takes_at_most(evaluate, size):
    """Every record once, so many at once at most."""
    split = Counting(data.load("digits").test)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    assert evaluate(model, split, batch_size=size) == accuracy(model, data.load("digits").test)
    assert max(split.sizes) == size and sum(split.sizes) == len(split)


def test_evaluation_takes_no_more_records_at_once_than_it_is_given():
    assert_takes_at_most(accuracy, 100)
    split = Counting(data.load("digits").test)
    accuracy(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)), split, records=8)
    assert split.sizes == [8]


def all_at_once(model, split, *, batch_size):
    return accuracy(model, split)


def the_first_batch_only(model, split, *, batch_size):
    return accuracy(model, split, batch_size=batch_size, records=batch_size)


@pytest.mark.parametrize("planted", [all_at_once, the_first_batch_only])
def test_another_number_of_records_would_be_seen(planted):
    with pytest.raises(AssertionError):
        assert_takes_at_most(planted, 100)


@pytest.mark.parametrize(("memory", "microbatch", "expected"), [(None, 32, 500), (2.0, 32, 32), (2.0, 4096, 500)])
def test_where_memory_is_limited_evaluation_takes_a_microbatch_at_once(memory, microbatch, expected):
    assert evaluation_batch(memory, microbatch) == expected


def rows_of(targets):
    return Rows(torch.zeros(len(targets), 3), torch.tensor(targets), torch.ones(len(targets), dtype=torch.bool))


def test_test_records_of_one_class_are_said_before_the_run():
    with pytest.warns(UserWarning, match="of one class"):
        check_evaluation(torch.nn.Linear(3, 2), rows_of([1, 1, 1]))
    check_evaluation(torch.nn.Linear(3, 2), rows_of([0, 1, 1]))
    check_evaluation(torch.nn.Linear(3, 1), rows_of([0.0, 0.0]), Task(kind="regression"))
