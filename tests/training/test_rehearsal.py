# SPDX-License-Identifier: Apache-2.0
"""A step is tried before the first charge: what cannot work is refused, and what is tried on stays as it was."""

import copy
import dataclasses

import pytest
import torch
from torch import nn
from torch.utils.data import default_collate

import dpquant
from dpquant.checks.isolation import check_isolation
from dpquant.checks.synthetic import candidates
from dpquant.engine.passes import Objective
from dpquant.errors import DataError, ModelError, SettingError
from dpquant.training.distributed import Alone
from dpquant.training.rehearsal import rehearse, step_seconds
from dpquant.training.setup import Setup
from dpquant.training.steps import Steps
from networks import loss

RECORD = torch.zeros(6), torch.tensor(0)


def network():
    torch.manual_seed(0)
    return dpquant.prepare(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), backend="simulate")


def found_of(model, loss_fn=loss):
    return check_isolation(Objective(model, loss_fn), candidates([RECORD], default_collate, torch.device("cpu")))


def plan_of(analysis=True):
    measured = dpquant.AnalysisPlan(count=1, sample_rate=0.3, expected_batch_size=6, noise_multiplier=3.0, max_norm=0.5)
    return dpquant.PrivacyPlan(
        noise_multiplier=1.0, delta=1e-5, max_grad_norm=1.0, sample_rate=0.5, expected_batch_size=10, steps=4,
        analysis=measured if analysis else None,
    )  # fmt: skip


def tried(optimizer, model, found=None, *, size=4, analysed="2"):
    optimizer = optimizer(model.parameters()) if callable(optimizer) else optimizer
    setup = Setup(
        optimizer=optimizer, steps=Steps(optimizer, Alone()), plan=plan_of(), policy=dpquant.NonePolicy(), seed=0,
        found=found or found_of(model),
    )  # fmt: skip
    rehearse(setup, size=size, analysis_size=size, analysed=analysed)
    return optimizer


def with_momentum(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def state_of(model, optimizer):
    state = copy.deepcopy(optimizer.state_dict())
    return [p.detach().clone() for p in model.parameters()], [p.grad for p in model.parameters()], state


def assert_nothing_moves(optimizer):
    """Parameters, gradients, the optimizer's state and the global generators are what they were."""
    model = network()
    optimizer, found = optimizer(model.parameters()), found_of(model)
    for p in model.parameters():  # a state that a step would change
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.zero_grad()
    before, drawn = state_of(model, optimizer), torch.random.get_rng_state()
    tried(optimizer, model, found)
    after = state_of(model, optimizer)
    assert all(map(torch.equal, before[0], after[0])) and before[1] == after[1] == [None] * 4
    assert repr(before[2]) == repr(after[2]) and torch.equal(drawn, torch.random.get_rng_state())


@pytest.mark.parametrize("optimizer", [with_momentum, torch.optim.Adam, torch.optim.Adafactor])
def test_neither_the_model_nor_the_optimizer_moves(optimizer):
    assert_nothing_moves(optimizer)


class ItsOwnCopy(torch.optim.SGD):
    def __deepcopy__(self, memo):
        return self


def test_a_step_of_the_optimizer_itself_is_caught():
    with pytest.raises(AssertionError):
        assert_nothing_moves(lambda parameters: ItsOwnCopy(parameters, lr=0.1, momentum=0.9))


def test_an_optimizer_under_a_scheduler_does_not_move():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    before = [p.detach().clone() for p in model.parameters()]
    tried(optimizer, model)
    assert all(map(torch.equal, before, model.parameters())) and schedule.get_last_lr() == [0.1]


class NeedsClosure(torch.optim.SGD):
    def step(self, closure):
        return closure()


class Raises(torch.optim.SGD):
    def step(self, closure=None):
        raise KeyError("momentum")


class OnItsSecondStep(torch.optim.SGD):
    """Raises where there is state, so not on the first step of a fresh one."""

    def step(self, closure=None):
        super().step()
        if any("momentum_buffer" in one for one in self.state.values()):
            raise RuntimeError("a state of another shape")


class Uncopied(torch.optim.SGD):
    def __deepcopy__(self, memo):
        raise TypeError("a handle")


OPTIMIZERS = {
    "a closure": (NeedsClosure, "closure"),
    "an error": (Raises, "KeyError from Raises"),
    "an error with momentum": (lambda ps: OnItsSecondStep(ps, lr=0.1, momentum=0.9), "of another shape"),
    "one that cannot be copied": (Uncopied, "can be copied.*TypeError"),
    "one for sparse gradients": (torch.optim.SparseAdam, "dense gradient.*SparseAdam"),
}


@pytest.mark.parametrize(("optimizer", "words"), OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_an_optimizer_that_cannot_step_is_refused(optimizer, words):
    with pytest.raises(SettingError, match=words):
        tried(optimizer, network())


def raising_at(size):
    def loss_fn(model, batch):
        if len(batch[1]) == size:
            raise ValueError("a table of another size")
        return loss(model, batch)

    return loss_fn


def test_a_microbatch_size_that_the_model_does_not_take_is_refused():
    model, loss_fn = network(), raising_at(5)
    found = found_of(model, loss_fn)
    tried(with_momentum, model, found, size=4)
    with pytest.raises(ModelError):
        tried(with_momentum, model, found, size=5)


def too_much_in_an_analysis(model, batch):
    """An analysis runs in evaluation mode, and a step does not."""
    if not model.training:
        raise MemoryError("two sets of operands are too many")
    return loss(model, batch)


def assert_the_analysis_is_tried(analysed):
    model = network()
    found = found_of(model)
    asking = dataclasses.replace(found, objective=Objective(model, too_much_in_an_analysis))
    with pytest.raises(MemoryError, match="two sets"):
        tried(with_momentum, model, asking, analysed=analysed)


def test_the_analysis_is_tried_where_there_will_be_one():
    assert_the_analysis_is_tried("2")


def test_an_analysis_that_is_not_tried_is_caught():
    with pytest.raises(BaseException, match="DID NOT RAISE"):
        assert_the_analysis_is_tried(None)


class Harmless(NeedsClosure):
    """Its copy needs no closure: a rehearsal that says nothing."""

    def __deepcopy__(self, memo):
        return torch.optim.SGD([p.detach().clone() for p in self.param_groups[0]["params"]], lr=0.1)


def assert_refused_before_a_charge(optimizer, tmp_path):
    model = network()
    with pytest.raises(SettingError, match="closure"):
        dpquant.make_private(
            model, optimizer(model.parameters()), [RECORD] * 8, loss_fn=loss, plan=plan_of(False),
            policy=dpquant.NonePolicy(), ledger=tmp_path / "ledger.jsonl", microbatch_size=4,
        )  # fmt: skip
    assert not list(tmp_path.iterdir())


def test_a_run_is_rehearsed_before_anything_is_charged(tmp_path):
    assert_refused_before_a_charge(NeedsClosure, tmp_path)


def test_a_run_that_is_not_rehearsed_would_be_seen(tmp_path):
    with pytest.raises(BaseException, match="DID NOT RAISE"):
        assert_refused_before_a_charge(Harmless, tmp_path)


def test_a_steps_time_grows_with_its_examples_and_reads_no_record():
    """The estimate is of the whole step: as many passes as the expected batch needs."""
    found, plan = found_of(network()), plan_of()
    small, large = step_seconds(found, plan, 10), step_seconds(found, plan, 2)
    assert 0 < small < 1 and large > 0
    assert step_seconds(found, plan_of_batch(10_000), 10) > 100 * small


def plan_of_batch(size):
    return dpquant.PrivacyPlan(
        noise_multiplier=1.0, delta=1e-5, max_grad_norm=1.0, sample_rate=0.5, expected_batch_size=size, steps=4
    )


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError])
def test_what_says_that_memory_does_not_suffice_is_raised_unchanged(error):
    """`start` tries a smaller microbatch then."""

    def too_large(model, batch):
        raise error("too large")

    model = network()
    found = dataclasses.replace(found_of(model), objective=Objective(model, too_large))
    with pytest.raises(error):
        tried(with_momentum, model, found)


class Sentences(torch.utils.data.Dataset):
    """A data set in groups: a record is so many rows of two numbers, and those of one length are a group."""

    def __init__(self, *lengths):
        self.dpquant_lengths = tuple(sorted(set(lengths)))
        self._lengths = torch.tensor(lengths)

    def __len__(self):
        return len(self._lengths)

    def __getitem__(self, index):
        return torch.ones(int(self._lengths[index]), 2), torch.tensor(0)

    def dpquant_groups(self, record_ids):
        return self._lengths[record_ids]

    def dpquant_batch(self, record_ids):
        return default_collate([self[int(number)] for number in record_ids])


class Windows(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv1d(2, 3, width)

    def forward(self, x):
        return self.conv(x.mT).mean(2)


def begun(width, data, tmp_path):
    torch.manual_seed(0)
    model = Windows(width)
    example = [(torch.randn(9, 2), torch.tensor(number)) for number in range(3)]
    return dpquant.make_private(
        model, torch.optim.SGD(model.parameters(), lr=0.1), data, loss_fn=loss, plan=plan_of(False),
        policy=dpquant.NonePolicy(), ledger=tmp_path / "ledger.jsonl", microbatch_size=4, example=example,
    )  # fmt: skip


def assert_refused_for_the_shortest(data, tmp_path):
    with pytest.raises(ModelError, match=r"pass, 4 and 9 long; got a RuntimeError: .*[Kk]ernel.* can pad"):
        begun(5, data, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_model_that_cannot_read_the_shortest_records_is_refused_before_a_charge(tmp_path):
    """Records of 9 and of 4. What reads 4 together takes both; what reads 5 would leave out the short ones."""
    data = Sentences(*[9, 4] * 4)
    assert_refused_for_the_shortest(data, tmp_path)
    private = begun(4, data, tmp_path)
    for epoch in private.epochs():
        for batch in epoch:
            private.step(batch)
    assert private.steps_taken == 4


def test_groups_without_their_lengths_are_refused(tmp_path):
    """They would not count as groups, and records of several lengths would share a microbatch."""
    data = Sentences(*[9, 4] * 4)
    del data.dpquant_lengths
    with pytest.raises(DataError, match="to name dpquant_lengths"):
        begun(4, data, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_trial_of_the_longest_records_alone_is_seen(tmp_path):
    data = Sentences(*[9, 4] * 4)
    data.dpquant_lengths = (9,)
    with pytest.raises(BaseException, match="DID NOT RAISE"):
        assert_refused_for_the_shortest(data, tmp_path)
