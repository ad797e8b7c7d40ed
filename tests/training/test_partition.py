# SPDX-License-Identifier: Apache-2.0
"""Processes that each have records of their own compute what one does that has all. They are threads here."""

import dataclasses

import pytest
import torch
from torch import nn

import dpquant
from dpquant.errors import DataError, SettingError
from dpquant.privacy.ledger import Ledger
from dpquant.privacy.mechanism import Mechanism
from dpquant.privacy.sampling import PoissonSampler
from dpquant.privacy.secret import SecretKey
from dpquant.training.distributed import Alone
from dpquant.training.partition import Partition
from dpquant.training.private import PrivateTraining
from dpquant.training.records import Records
from dpquant.training.shared_ledger import shared
from groups import each
from mechanisms import begun, finish
from networks import loss

RECORDS, BATCH, STEPS = 60, 15, 4
SPLITS = [(23, 37), (1, 58, 1), (25, 0, 35)]
KEY = bytes(range(16))


def records(seed=0, count=RECORDS, side=6):
    torch.manual_seed(seed)
    return list(zip(torch.randn(count, 1, side, side), torch.randint(0, 5, (count,)), strict=True))


class Own:
    """A process' own records. It notes which it was asked for and does not have, and raises then."""

    def __init__(self, own):
        self._own, self.outside = own, []

    def __len__(self):
        return len(self._own)

    def __getitem__(self, index):
        if not 0 <= index < len(self._own):
            self.outside.append(index)
            raise IndexError(index)
        return self._own[index]


class AtOnce(Own):
    def __getitems__(self, indices):
        return [self[index] for index in indices]


class Collating(Own):
    def dpquant_batch(self, record_ids):
        images, labels = zip(*(self[index] for index in record_ids.tolist()), strict=True)
        return torch.stack(images), torch.stack(labels)


class Seeing(PrivateTraining):
    """Notes the ids and the sum of each step."""

    def _clipped_sum(self, pieces, key):
        pieces = list(pieces)
        found = super()._clipped_sum(pieces, key)
        ids = [one for piece in pieces for one in piece.record_ids[: piece.num_examples].tolist()]
        flat = torch.cat([one.double().flatten() for one in found.grads.values()])
        self.seen = [*getattr(self, "seen", []), (ids, flat)]
        return found


@dataclasses.dataclass
class Settings:
    partition: str = "range"
    noise: str = "gaussian"
    exact: bool = False
    policy: object = dataclasses.field(default_factory=dpquant.NonePolicy)


def start(group, data, settings):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8), nn.Dropout(0.2), nn.Linear(8, 5)
    )
    plan = dpquant.PrivacyPlan(
        noise_multiplier=1.2, delta=1e-5, max_grad_norm=0.7, sample_rate=BATCH / RECORDS, expected_batch_size=BATCH,
        steps=STEPS, noise=settings.noise,
        analysis=dpquant.AnalysisPlan(
            count=1, sample_rate=0.3, expected_batch_size=18, noise_multiplier=2.0, max_norm=0.5
        ),
    )  # fmt: skip

    def mechanism():
        key = SecretKey(KEY).of_first(group.from_first)
        return Mechanism.keyed(key, shared(group, lambda: Ledger(None, research=False)))

    return begun(
        model, data, plan=plan, policy=settings.policy, group=group, make_run=Seeing, loss_fn=loss,
        make_mechanism=mechanism, microbatch_size=4 if settings.noise == "gaussian" else 1, backend="simulate",
        exact_sums=settings.exact, partition=settings.partition, example=records(seed=1, count=3),
    )  # fmt: skip


def alone(**settings):
    return finish(start(Alone(), Own(records()), Settings(**settings)))


def parts(split, kind=Own):
    """The records of all processes, laid end to end those of one."""
    whole, ends = records(), [sum(split[: rank + 1]) for rank in range(len(split))]
    return [kind(whole[end - count : end]) for end, count in zip(ends, split, strict=True)]


def several(split, *, kind=Own, **settings):
    """The runs of all processes, and their data sets."""
    data = parts(split, kind)
    runs, made = each(len(split), lambda one: finish(start(one, data[one.rank], Settings(**settings))))
    for run in runs:
        if isinstance(run, Exception):
            raise run
    assert all(one == made[0] for one in made)
    return runs, data


def parameters(run):
    return torch.cat([p.detach().flatten() for p in run.model.parameters()])


def assert_they_compute_what_one_does(one, runs, data):
    assert all(not own.outside for own in data)
    for run in runs:
        assert torch.equal(parameters(run), parameters(runs[0]))
        assert run.events() == one.events() and run.scores == runs[0].scores
        assert run.state.policies == one.state.policies
    for number, (ids, total) in enumerate(one.seen):
        theirs = [run.seen[number] for run in runs]
        assert [one for ids, _ in theirs for one in ids] == ids, "the same records, each on the process that has it"
        added = torch.stack([one for _, one in theirs]).sum(0)
        assert (added - total).norm() <= 1e-5 * total.norm().clamp(min=1e-9)
    assert (parameters(runs[0]) - parameters(one)).norm() <= 1e-5 * parameters(one).norm()


@pytest.fixture(scope="module")
def whole():
    return alone()


@pytest.mark.always
@pytest.mark.parametrize("split", SPLITS)
def test_processes_with_records_of_their_own_compute_what_one_with_all_does(split, whole):
    assert_they_compute_what_one_does(whole, *several(split))


@pytest.mark.parametrize("kind", [AtOnce, Collating])
def test_however_the_records_are_read(kind, whole):
    assert_they_compute_what_one_does(whole, *several((23, 37), kind=kind))


def test_with_an_analysis_and_quantized_layers():
    """Sums of the several agree with the one's up to round-off alone, so codes are the same: ids draw the rounding."""
    policy = dpquant.DPQuantPolicy(fraction=0.7)
    one, (runs, data) = alone(policy=policy), several((23, 37), policy=policy)
    assert one.analyses_made == 1 and all(run.analyses_made == 1 for run in runs)
    assert_they_compute_what_one_does(one, runs, data)


def test_with_discrete_noise_they_have_the_bits_of_one():
    one, (runs, _) = alone(noise="discrete"), several((23, 37), noise="discrete")
    assert all(torch.equal(parameters(run), parameters(one)) for run in runs)


def from_its_own_first(partition, sampler, rate, **purpose):
    """Each draws as if its records were the first ones, so that two records share their draws."""
    drawn = sampler.draw(len(partition.ids), rate, **purpose)
    return drawn + partition.ids.start


def by_itself(partition, sampler, rate, *, attempt, **purpose):
    drawn = sampler.draw(partition.ids.stop, rate, attempt=attempt + 7 * partition.ids.start, **purpose)
    return drawn[drawn >= partition.ids.start]


def of_all(partition, sampler, rate, **purpose):
    return sampler.draw(partition.ids.stop, rate, **purpose)


def a_share_of_its_own(partition, record_ids, group, *, whole):
    return record_ids.tensor_split(group.size)[group.rank], slice(None)


def in_its_own_numbers(partition, record_ids):
    return record_ids


FAULTS = {
    "draws begin anew on each process": (Partition, "drawn", from_its_own_first),
    "each draws by itself": (Partition, "drawn", by_itself),
    "a process asks for the records of others": (Partition, "drawn", of_all),
    "what is a process' own is shared out again": (Partition, "cut", a_share_of_its_own),
    "ids are taken for the numbers of a data set": (Records, "_own", in_its_own_numbers),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_processes_that_do_not_are_seen(fault, whole, monkeypatch):
    monkeypatch.setattr(*fault)
    with pytest.raises((AssertionError, dpquant.DPQuantError)):
        assert_they_compute_what_one_does(whole, *several((23, 37), kind=Collating))


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_what_is_drawn_does_not_depend_on_the_number_of_processes(size):
    """Ids 0 .. 999 in ranges of any size: their union, in order, is what one process draws."""
    sampler, purpose = PoissonSampler(SecretKey(KEY)), {"stream": "train", "step": 3, "attempt": 4}
    counts = [1000 // size + (1000 % size if rank == 0 else 0) for rank in range(size)]
    found, _ = each(
        size, lambda group: Partition.of(counts[group.rank], "range", group).drawn(sampler, 0.1, **purpose).tolist()
    )
    assert [one for ids in found for one in ids] == sampler.draw(1000, 0.1, **purpose).tolist()
    assert size == 1 or any(found[0])


def refused(work, size=2):
    """The error that all processes raise."""

    def caught(group):
        with pytest.raises(dpquant.DPQuantError) as raised:
            work(group)
        return raised.value

    results, made = each(size, caught)
    assert len({(type(one), str(one)) for one in results}) == 1 and made[0] == made[1], results
    return results[0]


def test_other_forms_of_records_are_refused_on_all():
    def work(group):
        torch.manual_seed(0)
        own = records(side=6 + group.rank)
        plan = dpquant.PrivacyPlan(
            noise_multiplier=1.0, delta=1e-5, max_grad_norm=1.0, sample_rate=0.1, expected_batch_size=6, steps=1
        )
        model = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4, 5))
        begun(model, own, plan=plan, policy=dpquant.NonePolicy(), group=group, loss_fn=loss, partition="range")

    error = refused(work)
    assert isinstance(error, SettingError) and "another form of records on process 1" in str(error)


def test_where_no_process_has_a_record_all_refuse():
    error = refused(lambda group: start(group, Own([]), Settings()))
    assert isinstance(error, DataError) and "on one process at least" in str(error)


def test_a_process_without_records_needs_an_example():
    def work(group):
        own = records() if group.rank == 0 else []
        plan = dpquant.PrivacyPlan(
            noise_multiplier=1.0, delta=1e-5, max_grad_norm=1.0, sample_rate=0.1, expected_batch_size=6, steps=1
        )
        model = nn.Sequential(nn.Flatten(), nn.Linear(36, 5))
        begun(model, own, plan=plan, policy=dpquant.NonePolicy(), group=group, loss_fn=loss, partition="range")

    error = refused(work)
    assert isinstance(error, DataError) and "empty data set" in str(error)


def test_two_words_for_one_run_are_refused_on_all():
    error = refused(lambda group: Partition.of(9, ("even", "range")[group.rank], group))
    assert isinstance(error, SettingError) and "even and range" in str(error)


@pytest.mark.parametrize(
    ("settings", "says"),
    [({"exact": True}, "partition=even with exact_sums"), ({"partition": "rows"}, "one of even, range")],
)
def test_what_cannot_be_is_refused(settings, says):
    error = refused(lambda group: start(group, Own(records()), Settings(**settings)))
    assert isinstance(error, SettingError) and says in str(error)


def test_a_record_of_another_process_cannot_be_read():
    """Not even by a mistake: a negative number would be a Python list's last record."""
    partition = Partition(range(10, 20), by_range=True)
    own = Records(Collating(records(count=10)), None, torch.device("cpu"), None, partition=partition)
    assert own.microbatch(torch.tensor([10, 19]), 2, 0).num_examples == 2
    for ids in ([9], [20], [3, 12]):
        with pytest.raises(AssertionError, match="other processes"):
            own.microbatch(torch.tensor(ids), 2, 0)
    one_by_one = Records(Own(records(count=10)), None, torch.device("cpu"), None, partition=partition)
    with pytest.raises(ValueError, match="not in range"):
        one_by_one.microbatch(torch.tensor([9]), 1, 0)


def test_a_group_of_one_has_the_range_of_all():
    assert Partition.of(5, "range", Alone()) == Partition(range(5), by_range=True)
    assert Partition.of(5, "even", Alone()) == Partition(range(5))
