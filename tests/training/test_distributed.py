# SPDX-License-Identifier: Apache-2.0
"""Two processes compute what one does. Both are simulated in this one: whenever the first has come to a sum that is to
be added up, the second walks on until it has come there too.
"""

import dataclasses

import pytest
import torch
from torch import nn

import dpquant
from dpquant.privacy.mechanism import Mechanism
from dpquant.privacy.secret import SecretKey
from dpquant.training.distributed import Alone
from dpquant.training.state import RunState
from mechanisms import begun, with_doubles
from networks import loss

RECORDS, BATCH, STEPS, ANALYSES = 60, 15, 8, 2  # 4 steps an epoch
KEY = bytes(range(16))


class One(Alone):
    """One process that writes down what it would share and add up."""

    def __init__(self):
        self.sums, self.shares = [], []

    def share(self, record_ids):
        self.shares.append(record_ids)
        return record_ids

    def add(self, sums):
        self.sums.append({name: tensor.clone() for name, tensor in sums.items()})


@dataclasses.dataclass
class Rank:
    """One of two processes.

    Attributes:
      shared: what both have sent, by rank; and what the first has told the second.
      wait_for: lets the other one walk on. None: this is the second, and the first has been here before.
      sums: what it got.
      shares: the ids of the records that it took.
    """

    rank: int
    shared: list = dataclasses.field(default_factory=lambda: [[], []])
    told: list = dataclasses.field(default_factory=list)
    wait_for: object = None
    sums: list = dataclasses.field(default_factory=list)
    shares: list = dataclasses.field(default_factory=list)
    size = 2

    def share(self, record_ids):
        self.shares.append(record_ids[self.rank :: self.size])
        return self.shares[-1]

    def add(self, sums):
        self.shared[self.rank].append({name: tensor.clone() for name, tensor in sums.items()})
        place = len(self.shared[self.rank]) - 1
        while len(self.shared[1 - self.rank]) <= place:
            next(self.wait_for)
        for name, tensor in sums.items():
            tensor.add_(self.shared[1 - self.rank][place][name])
        self.sums.append({name: tensor.clone() for name, tensor in sums.items()})

    def from_first(self, value):
        if self.rank == 0:
            self.told.append(value)
        return self.told[-1]

    def barrier(self):
        pass


def walked(run):
    """The run, a step at a time."""
    for epoch in run.epochs():
        yield
        for batch in epoch:
            run.step(batch)
            yield


def start(group, mechanism, policy, noise="gaussian", steps=STEPS):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8), nn.Dropout(0.2), nn.Linear(8, 5)
    )
    records = list(zip(torch.randn(RECORDS, 1, 6, 6), torch.randint(0, 5, (RECORDS,)), strict=True))
    plan = dpquant.PrivacyPlan(
        noise_multiplier=1.2, delta=1e-5, max_grad_norm=0.7, sample_rate=BATCH / RECORDS, expected_batch_size=BATCH,
        steps=steps,
        analysis=dpquant.AnalysisPlan(
            count=min(ANALYSES, steps // 4), sample_rate=0.3, expected_batch_size=18, noise_multiplier=2.0, max_norm=0.5
        ),
        noise=noise,
    )  # fmt: skip
    return begun(
        model, records, loss_fn=loss, plan=plan, policy=policy, mechanism=mechanism, group=group,
        microbatch_size=4 if noise == "gaussian" else 1, backend="simulate",
    )  # fmt: skip


def the_same(mechanism, rank):
    return mechanism


@dataclasses.dataclass
class Seen:
    """A run that is over: its parameters, what was added up for it, what it read and charged, and its state."""

    parameters: torch.Tensor
    sums: list
    shares: list
    events: list
    state: RunState


def seen(run, group):
    parameters = torch.cat([p.detach().flatten() for p in run.model.parameters()])
    return Seen(parameters, group.sums, group.shares, run.events(), run.state)


def alone(policy, **settings):
    group = One()
    run = start(group, Mechanism.keyed(SecretKey(KEY), None), policy, **settings)
    list(walked(run))
    return seen(run, group)


def together(policy, *, change=the_same, rank=Rank, **settings):
    """Both ranks of a run; `change(mechanism, rank)` plants something."""
    groups = [rank(0)]
    groups.append(rank(1, groups[0].shared, groups[0].told))
    mechanisms = [change(Mechanism.keyed(SecretKey(KEY), None), number) for number in (0, 1)]
    runs = [start(group, mechanism, policy, **settings) for group, mechanism in zip(groups, mechanisms, strict=True)]
    groups[0].wait_for = walked(runs[1])
    list(walked(runs[0]))
    list(groups[0].wait_for)  # the second's last step
    return [seen(run, group) for run, group in zip(runs, groups, strict=True)]


def flat(sums):
    return torch.cat([tensor.double().flatten() for tensor in sums.values()])


def assert_two_compute_what_one_does(one, two, *, exact):
    """Ranks agree bit for bit, and share one process' batches; their first `exact` sums are its own up to round-off."""
    first, second = two
    assert torch.equal(first.parameters, second.parameters)
    assert len(one.sums) == len(first.sums) == len(second.sums) >= exact
    for mine, its, wanted in list(zip(first.sums, second.sums, one.sums, strict=True))[:exact]:
        assert torch.equal(flat(mine), flat(its))
        assert (flat(mine) - flat(wanted)).norm() <= 1e-5 * flat(wanted).norm()
    for mine, its, whole in zip(first.shares, second.shares, one.shares, strict=True):
        assert sorted([*mine.tolist(), *its.tolist()]) == whole.tolist() and abs(len(mine) - len(its)) <= 1
    assert first.events == second.events == one.events
    for name in ("steps_taken", "analyses_made", "draws", "policies", "execution", "ledger_head"):
        assert getattr(first.state, name) == getattr(second.state, name) == getattr(one.state, name), name
    if exact == len(one.sums):
        assert (first.parameters - one.parameters).norm() <= 1e-5 * one.parameters.norm()


IN_FULL, QUANTIZED = dpquant.NonePolicy(), dpquant.DPQuantPolicy(fraction=0.7)


@pytest.mark.always
@pytest.mark.parametrize(("policy", "exact"), [(IN_FULL, STEPS), (QUANTIZED, 2)], ids=["full", "quantized"])
def test_two_processes_compute_what_one_does(policy, exact):
    """Where layers run quantized, a step's last bit can become another code of the next: not its law, but its value."""
    assert_two_compute_what_one_does(alone(policy), together(policy), exact=exact)


def assert_two_have_the_bits_of_one(one, two):
    for run in two:
        assert torch.equal(run.parameters, one.parameters)
    for mine, wanted in zip(two[0].sums, one.sums, strict=True):
        assert torch.equal(flat(mine), flat(wanted))


def test_with_discrete_noise_two_processes_have_the_bits_of_one():
    """Sums of integers are exact; a last bit that differs would be seen."""
    one, two = (runs(IN_FULL, noise="discrete", steps=2) for runs in (alone, together))
    assert_two_have_the_bits_of_one(one, two)
    off = dataclasses.replace(two[1], parameters=two[1].parameters.nextafter(torch.tensor(9.0)))
    with pytest.raises(AssertionError):
        assert_two_have_the_bits_of_one(one, [two[0], off])


def a_rate_of_its_own(mechanism, rank):
    return with_doubles(mechanism, draw=lambda honest, n, rate, **k: honest(n, rate / 2, **k))


def records_of_its_own(mechanism, rank):
    return with_doubles(
        mechanism, draw=lambda honest, *a, **k: honest(*a, **{**k, "attempt": 100 * rank + k["attempt"]})
    )


def noise_of_each_rank(mechanism, rank):
    """As if each had noised its share: the sum has the noise of both."""

    def twice(honest, *a, **k):
        return honest(*a, **k) + honest(*a, **{**k, "attempt": 100 + k["attempt"]})

    return with_doubles(mechanism, gaussian=twice)


def noise_that_differs(mechanism, rank):
    return with_doubles(mechanism, gaussian=lambda honest, *a, **k: honest(*a, **{**k, "attempt": rank + k["attempt"]}))


def another_key_for_records(mechanism, rank):
    return dataclasses.replace(mechanism, record_key=mechanism.record_key + rank)


def a_charge_for_each_rank(mechanism, rank):
    return with_doubles(mechanism, charge=lambda honest, **event: [honest(**event) for _ in range(2)])


class AllForEach(Rank):
    def share(self, record_ids):
        return record_ids


class Forgetful(Rank):
    """The last record of a batch is in nobody's share."""

    def share(self, record_ids):
        return super().share(record_ids[:-1])


class NotAdded(Rank):
    def add(self, sums):
        own = {name: tensor.clone() for name, tensor in sums.items()}
        super().add(sums)
        for name, tensor in sums.items():
            tensor.copy_(own[name])


class MeanOfRanks(Rank):
    def add(self, sums):
        super().add(sums)
        for tensor in sums.values():
            tensor.div_(2)


FAULTS = {
    "the number of processes enters the sampling": {"change": a_rate_of_its_own},
    "each draws by itself": {"change": records_of_its_own},
    "noise is added twice": {"change": noise_of_each_rank},
    "each has noise of its own": {"change": noise_that_differs},
    "each step is charged twice": {"change": a_charge_for_each_rank},
    "each takes the whole batch": {"rank": AllForEach},
    "a record is left out": {"rank": Forgetful},
    "sums are not added": {"rank": NotAdded},
    "sums are averaged": {"rank": MeanOfRanks},
    "records draw by another key": {"change": another_key_for_records},
}


@pytest.fixture(scope="module")
def in_full():
    return alone(IN_FULL)


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_processes_that_do_not_are_seen(fault, in_full):
    two = together(IN_FULL, **fault)
    with pytest.raises(AssertionError):
        assert_two_compute_what_one_does(in_full, two, exact=STEPS)


def test_the_first_ones_execution_holds_for_all():
    group = Rank(0)
    first = start(group, Mechanism.secret(None), IN_FULL)
    second = Rank(1, told=[group.told[0].replace(b'"microbatch_size": 4', b'"microbatch_size": 5')])
    assert first.execution.microbatch_size == 4
    assert start(second, Mechanism.secret(None), IN_FULL).execution.microbatch_size == 5


def test_nobody_reads_before_all_have_charged():
    log = []

    class Waits(Alone):
        def barrier(self):
            log.append("barrier")

        def share(self, record_ids):
            log.append("share")
            return record_ids

    mechanism = with_doubles(
        Mechanism.secret(None), charge=lambda honest, **event: (honest(**event), log.append("charge"))[0]
    )
    list(walked(start(Waits(), mechanism, QUANTIZED)))
    assert log == ["charge", "barrier", "share"] * (STEPS + ANALYSES)


def test_one_process_alone_has_nobody_to_ask():
    ids, sums = torch.arange(5), {"w": torch.ones(3)}
    group = Alone()
    group.add(sums)
    group.barrier()
    assert (group.rank, group.size) == (0, 1) and torch.equal(group.share(ids), ids)
    assert torch.equal(sums["w"], torch.ones(3)) and group.from_first(b"x") == b"x"
