# SPDX-License-Identifier: Apache-2.0
"""A sharded optimizer has the bits of a whole one, and its state in parts. Processes are threads here."""

import contextlib
import copy
import shutil

import pytest
import torch
from torch import nn

import dpquant
from dpquant.errors import DataError, GroupError, ModelError, SettingError
from dpquant.privacy.ledger import Ledger
from dpquant.privacy.mechanism import Mechanism
from dpquant.privacy.secret import SecretKey
from dpquant.training.distributed import Alone
from dpquant.training.moved import check_moved
from dpquant.training.shared_ledger import shared
from dpquant.training.steps import ShardedSteps, Steps, check_shardable, steps_of
from groups import each
from mechanisms import begun
from networks import loss

OPTIMIZERS = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1),
    "momentum": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "adam": lambda groups: torch.optim.Adam(groups, lr=0.02, amsgrad=True, weight_decay=1e-3),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.02),
    "foreach": lambda groups: torch.optim.AdamW(groups, lr=0.02, foreach=True),
}
STEPS = 6


class Network(nn.Module):
    """Parameters of several shapes and layouts; one is frozen."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def drawn(*shape):
            return torch.randn(shape, generator=generator)

        self.a = nn.Parameter(drawn(37, 5))
        self.scalar = nn.Parameter(drawn())
        self.frozen = nn.Parameter(drawn(6), requires_grad=False)
        self.channels_last = nn.Parameter(drawn(4, 3, 5, 5).to(memory_format=torch.channels_last))
        self.b = nn.Parameter(drawn(101))


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def groups_of(model):
    """Two groups of different settings; the frozen parameter is in the second."""
    first = [model.a, model.channels_last]
    others = [p for p in model.parameters() if all(p is not one for one in first)]
    return [{"params": first}, {"params": others, "lr": 0.03, "weight_decay": 0.05}]


def sums_of(model, step, rank):
    generator = torch.Generator().manual_seed(100 * step + rank)
    return {name: torch.randn(p.shape, generator=generator) for name, p in trainable(model).items()}


def as_it_is(name, part, total):
    return total.reshape(-1).float()


def trained(group, *, optimizer, sharded, until=STEPS, steps_class=None, before=lambda step, model: None):
    """Model, optimizer and steps of a process after some steps, with a schedule of the learning rate."""
    model = Network()
    one = OPTIMIZERS[optimizer](groups_of(model))
    schedule = torch.optim.lr_scheduler.LambdaLR(one, lambda step: 1 / (1 + step))
    make = steps_class or (lambda *a: steps_of(*a, sharded=sharded))
    steps = make(one, trainable(model), group)
    for step in range(until):
        before(step, model)
        steps.receive(trainable(model), sums_of(model, step, group.rank), noised_of(group))
        steps.step()
        schedule.step()
    return model, one, steps


def noised_of(group):
    """As noise is added, to a part; one process' tensor keeps its shape."""
    return as_it_is if group.size > 1 else lambda name, part, total: total


def values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def equal(one, other):
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return one == other


def of_all(size, work):
    """What `work` returns on each process; raises what the first that fails raises, rather than that it is gone."""
    results, made = each(size, work)
    failed = [one for one in results if isinstance(one, Exception)]
    for one in sorted(failed, key=lambda one: isinstance(one, GroupError)):
        raise one
    assert all(exchanges == made[0] for exchanges in made)
    return results


def refusal(work):
    """The text of the error; returned, because what a test raises in a thread would be lost."""
    try:
        work()
    except (SettingError, ModelError) as error:
        return str(error)
    return ""


@pytest.mark.parametrize("size", [2, 3, 7])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_sharded_optimizer_has_the_bits_of_a_whole_one(optimizer, size):
    wholes = of_all(size, lambda group: trained(group, optimizer=optimizer, sharded=False))
    parts = of_all(size, lambda group: trained(group, optimizer=optimizer, sharded=True))
    for model, _, steps in parts:
        assert isinstance(steps, ShardedSteps)
        assert equal(values(model), values(wholes[0][0]))
        assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_a_schedule_and_groups_are_those_of_the_user(optimizer):
    """The control for the equality above: without schedule, or with one group, parameters end elsewhere."""
    whole, _, _ = trained(Alone(), optimizer=optimizer, sharded=False)
    model = Network()
    one = OPTIMIZERS[optimizer](list(trainable(model).values()))
    for step in range(STEPS):
        for name, gradient in sums_of(model, step, 0).items():
            trainable(model)[name].grad = gradient
        one.step()
    assert not equal(values(model), values(whole))


@pytest.mark.parametrize("size", [2, 3, 7])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_gathered_state_is_that_of_a_whole_optimizer(optimizer, size):
    _, whole, _ = of_all(size, lambda group: trained(group, optimizer=optimizer, sharded=False))[0]

    def work(group):
        _, one, steps = trained(group, optimizer=optimizer, sharded=True)
        assert not one.state
        steps.gather_state()
        return steps

    first, *others = of_all(size, work)
    assert equal(first.state_dict(), whole.state_dict())
    assert all("gather_state" in refusal(steps.state_dict) for steps in (first, *others)), "once, on the first alone"


def numbers_held(steps):
    return sum(v.numel() for state in steps._state.values() for key, v in state.items() if key != "step")


@pytest.mark.parametrize("size", [2, 3, 7])
def test_each_process_holds_its_part_of_the_state(size):
    parts = of_all(size, lambda group: trained(group, optimizer="adamw", sharded=True))
    count = sum(p.numel() for p in trainable(Network()).values())
    held = [numbers_held(steps) for _, _, steps in parts]
    assert sum(held) == 2 * count and max(held) <= 2 * -(-count // size)


def test_more_processes_than_values():
    def work(group):
        model = nn.Linear(1, 1)
        with torch.no_grad():
            model.weight.fill_(1.0)
            model.bias.fill_(2.0)
        one = torch.optim.AdamW(model.parameters(), lr=0.1)
        steps = ShardedSteps(one, trainable(model), group)
        steps.receive(trainable(model), {name: torch.ones(p.shape) for name, p in trainable(model).items()}, as_it_is)
        steps.step()
        steps.gather_state()
        return [p.item() for p in model.parameters()], steps.state_dict()["state"] if group.rank == 0 else None

    results = of_all(5, work)
    assert [moved for moved, _ in results] == [results[0][0]] * 5 and results[0][0] != [1.0, 2.0]
    assert [float(state["step"]) for state in results[0][1].values()] == [1.0, 1.0]


@pytest.mark.parametrize("optimizer", ["momentum", "adam", "adamw"])
def test_a_state_goes_on_on_any_number_of_processes(optimizer):
    """From three processes to two, to one, and to two with a whole optimizer: the moments are those of each value."""
    states = {}

    def saves(group):
        model, _, steps = trained(group, optimizer=optimizer, sharded=True, until=3)
        steps.gather_state()
        states[group.rank] = values(model), steps.state_dict() if group.rank == 0 else None

    def goes_on(sharded):
        def work(group):
            model = Network()
            model.load_state_dict(states[0][0])
            steps = steps_of(OPTIMIZERS[optimizer](groups_of(model)), trainable(model), group, sharded=sharded)
            steps.load_state_dict(copy.deepcopy(states[0][1]))
            for step in (3, 4):
                steps.receive(trainable(model), sums_of(model, step, 0), lambda n, part, total: noised(group, total))
                steps.step()
            return values(model)

        return work

    def noised(group, total):
        return (total / group.size).reshape(-1) if group.size > 1 else total

    of_all(3, saves)
    (one,) = of_all(1, goes_on(False))
    for size, sharded in ((2, False), (2, True), (4, True)):
        assert all(equal(found, one) for found in of_all(size, goes_on(sharded)))
    states[0][1]["state"].clear()
    (forgetful,) = of_all(1, goes_on(False))
    assert not equal(forgetful, one), "the state makes no difference"


def test_a_state_that_the_optimizer_had_before_the_run_is_kept():
    def work(sharded):
        def of(group):
            model = Network()
            one = OPTIMIZERS["adam"](groups_of(model))
            for name, gradient in sums_of(model, 9, 0).items():
                trainable(model)[name].grad = gradient
            one.step()
            steps = steps_of(one, trainable(model), group, sharded=sharded)
            steps.receive(trainable(model), sums_of(model, 0, group.rank), as_it_is)
            steps.step()
            return values(model)

        return of

    assert equal(of_all(2, work(True))[0], of_all(2, work(False))[0])


def test_values_that_the_user_sets_between_steps_are_stepped_from():
    def doubled(step, model):
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(2)

    def work(sharded):
        return lambda group: values(trained(group, optimizer="adam", sharded=sharded, before=doubled)[0])

    assert equal(of_all(2, work(True))[0], of_all(2, work(False))[0])


def test_a_trial_sees_the_slice_and_changes_nothing():
    def work(group):
        model, one, steps = trained(group, optimizer="adam", sharded=True)
        before, groups = values(model), [group["params"] for group in one.param_groups]
        gradients = {p: torch.full_like(p, 2.0) for p in trainable(model).values()}
        with steps.trial(gradients) as gradient_of:
            held = [p for group in one.param_groups for p in group["params"]]
            assert all(gradient_of[p].shape == p.shape and bool((gradient_of[p] == 2).all()) for p in held)
        assert equal(values(model), before) and not one.state
        assert all(now["params"] is params for now, params in zip(one.param_groups, groups, strict=True))
        return sum(p.numel() for p in held)

    assert sum(of_all(3, work)) == sum(p.numel() for p in trainable(Network()).values())


def test_a_gathered_state_is_not_saved_after_another_step():
    def work(group):
        model, _, steps = trained(group, optimizer="adam", sharded=True)
        steps.gather_state()
        steps.receive(trainable(model), sums_of(model, STEPS, group.rank), as_it_is)
        steps.step()
        return refusal(steps.state_dict)

    assert all("since the last step" in said for said in of_all(2, work))


def test_the_first_step_is_checked_as_that_of_a_whole_optimizer():
    """A slice that nobody steps: seen because gradients are gathered for the check; without them, any may stay."""

    class Forgetful(ShardedSteps):
        @contextlib.contextmanager
        def _holding(self, state):
            with super()._holding(state):
                for group in self.param_groups:
                    group["params"] = [p for p in group["params"] if p is not self._own.get("b")]
                yield

    def of(gathers):
        def work(group):
            model = Network()
            steps = Forgetful(OPTIMIZERS["adam"](groups_of(model)), trainable(model), group)
            steps.receive(trainable(model), sums_of(model, 0, group.rank), as_it_is)
            if gathers:
                steps.gather_gradients()
            return check_moved(model, steps)

        return work

    with pytest.raises(ModelError, match="got b where it was"):
        of_all(2, of(True))
    assert of_all(2, of(False)) == [True, True]


def test_parameters_of_another_run_are_refused():
    def work(group):
        model, _, steps = trained(group, optimizer="adam", sharded=True, until=1)
        model.b.requires_grad_(False)
        return refusal(lambda: steps.receive(trainable(model), sums_of(model, 1, group.rank), as_it_is))

    assert all("with which the run began" in said for said in of_all(2, work))


class OwnSGD(torch.optim.SGD):
    pass


def with_hook(parameters):
    one = torch.optim.SGD(parameters, lr=0.1)
    one.register_step_pre_hook(lambda *_: None)
    return one


REFUSED = {
    "Adagrad": lambda parameters: torch.optim.Adagrad(parameters),
    "OwnSGD": lambda parameters: OwnSGD(parameters, lr=0.1),
    "fused=True": lambda parameters: torch.optim.AdamW(parameters, fused=True),
    "hook": with_hook,
}


@pytest.mark.parametrize("what", REFUSED)
def test_an_optimizer_that_may_see_its_slice_is_refused(what):
    model = nn.Linear(3, 2)
    with pytest.raises(SettingError, match=f"SGD, Adam, AdamW with shard_optimizer.*{what}"):
        check_shardable(REFUSED[what](model.parameters()))


def test_one_process_has_nothing_to_share():
    model = nn.Linear(3, 2)
    one = torch.optim.Adagrad(model.parameters())
    assert type(steps_of(one, trainable(model), Alone(), sharded=True)) is Steps


# Runs

RECORDS, PLANNED = 60, 8  # 4 steps an epoch


def begin(group, *, ledger=None, sharded=True, optimizer=torch.optim.AdamW, factor=1.0):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8), nn.Linear(8, 5))
    records = list(zip(torch.randn(RECORDS, 1, 6, 6), torch.randint(0, 5, (RECORDS,)), strict=True))
    plan = dpquant.PrivacyPlan(
        noise_multiplier=1.2, delta=1e-5, max_grad_norm=0.7, sample_rate=0.25, expected_batch_size=15, steps=PLANNED
    )

    def opened():
        if ledger is not None and ledger.exists():
            return Ledger.resumed(ledger, budget=plan.budget(), research=True)
        return Ledger(ledger, budget=plan.budget(), research=True)

    return begun(
        model, records, plan=plan, policy=dpquant.RotatePolicy(fraction=0.5), group=group, lr=0.02,
        loss_fn=lambda model, batch: loss(lambda x: factor * model(x), batch),
        make_mechanism=lambda: Mechanism.keyed(SecretKey.from_seed(3), shared(group, opened)), microbatch_size=4,
        backend="simulate", exact_sums=True, optimizer=optimizer, shard_optimizer=sharded,
    )  # fmt: skip


def stepped(run, until=PLANNED):
    for epoch in run.epochs():
        for batch in epoch:
            run.step(batch)
            if run.steps_taken == until:
                return run
    return run


@pytest.fixture(scope="module")
def alone():
    """The parameters of one process' run."""
    return values(of_all(1, lambda group: stepped(begin(Alone(), sharded=False)))[0].model)


def test_a_sharded_run_has_the_bits_of_one_process(alone):
    runs = of_all(3, lambda group: stepped(begin(group)))
    assert all(equal(values(run.model), alone) for run in runs)
    assert all(not run.optimizer.state for run in runs)


def test_noise_of_a_sharded_run_is_one_unit():
    """Without gradients a run of SGD moves by its noise: as far as one process, and by the same bits."""
    sgd = torch.optim.SGD
    (one,) = of_all(1, lambda group: stepped(begin(Alone(), optimizer=sgd, factor=1e-4)))
    for run in of_all(3, lambda group: stepped(begin(group, optimizer=sgd, factor=1e-4))):
        assert equal(values(run.model), values(one.model))
    flat = [torch.cat([p.flatten() for p in values(run.model).values()]) for run in (one, begin(Alone()))]
    unit = 0.02 * 1.2 * 0.7 / 15 * PLANNED**0.5  # learning rate, noise multiplier, norm, batch size, steps
    assert float((flat[0] - flat[1]).square().mean().sqrt()) == pytest.approx(unit, rel=0.1)


@pytest.mark.parametrize(("size", "sharded"), [(2, True), (2, False), (1, True)])
def test_a_sharded_run_continues_with_another_number_of_processes(size, sharded, alone, tmp_path):
    def first(group):
        run = stepped(begin(group, ledger=tmp_path / "ledger.jsonl"), 5)
        run.gather_state()
        if group.rank == 0:
            run.save(tmp_path / "checkpoint")
            shutil.copy(tmp_path / "ledger.jsonl", tmp_path / "killed.jsonl")

    def second(group):
        group = group if size > 1 else Alone()
        run = begin(group, ledger=tmp_path / "killed.jsonl", sharded=sharded)
        run.load(tmp_path / "checkpoint")
        return values(stepped(run).model)

    of_all(3, first)
    assert all(equal(one, alone) for one in of_all(size, second))


def test_a_checkpoint_without_the_others_parts_is_refused(tmp_path):
    def work(group):
        run = stepped(begin(group), 1)
        return refusal(lambda: run.save(tmp_path / "checkpoint"))

    assert all("gather_state" in said for said in of_all(2, work))
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path):
    def in_two_groups(parameters, lr):
        return torch.optim.AdamW([{"params": parameters[:1]}, {"params": parameters[1:]}], lr=lr)

    def first(group):
        run = stepped(begin(group, ledger=tmp_path / "ledger.jsonl", optimizer=in_two_groups), 1)
        run.gather_state()
        if group.rank == 0:
            run.save(tmp_path / "checkpoint")

    of_all(2, first)
    with pytest.raises(DataError, match="Expected optimizer to take over"):
        of_all(2, lambda group: begin(group, ledger=tmp_path / "ledger.jsonl").load(tmp_path / "checkpoint"))


def test_a_run_refuses_before_it_charges(tmp_path):
    ledger = tmp_path / "ledger.jsonl"
    with pytest.raises(SettingError, match="got Adagrad"):
        of_all(2, lambda group: begin(group, ledger=ledger, optimizer=torch.optim.Adagrad))
    with pytest.raises(SettingError, match="another shard_optimizer on process 1"):
        of_all(2, lambda group: begin(group, ledger=ledger, sharded=group.rank == 0))
    assert not ledger.exists()
