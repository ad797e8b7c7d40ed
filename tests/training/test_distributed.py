# SPDX-License-Identifier: Apache-2.0
"""Several processes compute what one does, whatever one of them draws, reads or fails at. They are threads here."""

import dataclasses
import threading

import pytest
import torch
from torch import nn

import dpquant
from dpquant.errors import DataError, GroupError, LedgerError, SettingError
from dpquant.privacy.ledger import Ledger
from dpquant.privacy.mechanism import Mechanism
from dpquant.privacy.secret import SecretKey
from dpquant.training import exchange
from dpquant.training.agreement import on_first, together
from dpquant.training.distributed import Alone
from dpquant.training.exchange import Slices, cut, noisy_means
from dpquant.training.private import PrivateTraining
from dpquant.training.same import check_parameters
from dpquant.training.shared_ledger import shared
from groups import Thread, each
from mechanisms import begun, finish, with_doubles
from networks import loss

RECORDS, BATCH, STEPS, ANALYSES = 60, 15, 4, 1  # 4 steps an epoch
KEY = bytes(range(16))
IN_FULL, QUANTIZED = dpquant.NonePolicy(), dpquant.DPQuantPolicy(fraction=0.7)


class Seeing(PrivateTraining):
    """Notes what each step and analysis has read and added up."""

    def _clipped_sum(self, pieces, key):
        return self._noted(lambda pieces: super(Seeing, self)._clipped_sum(pieces, key), pieces, lambda one: one.grads)

    def _impact_sum(self, pieces, names, keys):
        of = super()._impact_sum
        return self._noted(lambda pieces: of(pieces, names, keys), pieces, lambda one: {"impacts": one.impacts})

    def _noted(self, work, pieces, sums):
        pieces = list(pieces)
        found = work(pieces)
        flat = torch.cat([one.double().flatten() for one in sums(found).values()])
        ids = [one for piece in pieces for one in piece.record_ids[: piece.num_examples].tolist()]
        self.seen = [*getattr(self, "seen", []), (ids, flat)]
        return found


@dataclasses.dataclass
class Settings:
    """Of a run; `change(mechanism, rank)` plants something."""

    policy: object = IN_FULL
    steps: int = STEPS
    noise: str = "gaussian"
    exact: bool = False
    records: int = RECORDS
    batch: float = BATCH
    factor: float = 1.0  # of the network's output
    change: object = staticmethod(lambda mechanism, rank: mechanism)
    opened: object = staticmethod(lambda: Ledger(None, research=False))
    data: object = staticmethod(lambda records, rank: records)
    asked: object = staticmethod(lambda rank: 4)  # microbatch size


def start(group, settings):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8), nn.Dropout(0.2), nn.Linear(8, 5)
    )
    count = settings.records
    records = list(zip(torch.randn(count, 1, 6, 6), torch.randint(0, 5, (count,)), strict=True))
    plan = dpquant.PrivacyPlan(
        noise_multiplier=1.2, delta=1e-5, max_grad_norm=0.7, sample_rate=settings.batch / count,
        expected_batch_size=settings.batch, steps=settings.steps,
        analysis=dpquant.AnalysisPlan(
            count=ANALYSES, sample_rate=0.3, expected_batch_size=18, noise_multiplier=2.0, max_norm=0.5
        ),
        noise=settings.noise,
    )  # fmt: skip

    def mechanism():
        honest = Mechanism.keyed(SecretKey(KEY).of_first(group.from_first), shared(group, settings.opened))
        return settings.change(honest, group.rank)

    return begun(
        model, settings.data(records, group.rank), plan=plan, policy=settings.policy, group=group, make_run=Seeing,
        loss_fn=lambda model, batch: loss(lambda x: settings.factor * model(x), batch), make_mechanism=mechanism,
        microbatch_size=settings.asked(group.rank) if settings.noise == "gaussian" else 1,
        backend="simulate", exact_sums=settings.exact,
    )  # fmt: skip


def alone(**settings):
    return finish(start(Alone(), Settings(**settings)))


def several(size, *, group=Thread, **settings):
    """The runs of all processes, and the exchanges of each; raises what the first that fails raises."""
    runs, made = each(size, lambda one: finish(start(one, Settings(**settings))), group=group)
    for run in runs:
        if isinstance(run, Exception):
            raise run
    return runs, made


def parameters(run):
    return torch.cat([p.detach().flatten() for p in run.model.parameters()])


def assert_several_compute_what_one_does(one, runs):
    """Processes agree bit for bit and share one process' batches; their sums are its own, up to round-off."""
    for run in runs:
        assert torch.equal(parameters(run), parameters(runs[0]))
        assert run.events() == one.events() and run.scores == runs[0].scores
        for name in ("steps_taken", "analyses_made", "draws", "policies", "execution"):
            assert getattr(run.state, name) == getattr(one.state, name), name
    for number, (ids, total) in enumerate(one.seen):
        shares = [run.seen[number] for run in runs]
        assert sorted(one for ids, _ in shares for one in ids) == sorted(ids)
        assert max(len(ids) for ids, _ in shares) - min(len(ids) for ids, _ in shares) <= 1
        added = torch.stack([one for _, one in shares]).sum(0)
        assert (added - total).norm() <= 1e-5 * total.norm().clamp(min=1e-9)
    assert (parameters(runs[0]) - parameters(one)).norm() <= 1e-5 * parameters(one).norm()


@pytest.fixture(scope="module")
def in_full():
    return alone()


@pytest.mark.always
@pytest.mark.parametrize("size", [2, 3])
def test_several_processes_compute_what_one_does(size, in_full):
    runs, made = several(size)
    assert_several_compute_what_one_does(in_full, runs)
    assert all(one == made[0] for one in made)


def planted(**doubles):
    """What `with_doubles` takes, for the processes after the first."""
    return lambda mechanism, rank: with_doubles(mechanism, **doubles) if rank else mechanism


def with_another_attempt(honest, *a, **k):
    return honest(*a, **{**k, "attempt": 100 + k["attempt"]})


class NotAdded(Thread):
    def exchanged(self, flat):
        rows = super().exchanged(flat)
        return torch.cat([rows[:1], torch.zeros_like(rows[1:])])


class MeanOfRanks(Thread):
    def exchanged(self, flat):
        return super().exchanged(flat) / self.size


class WrongSlice(Thread):
    """Both processes take slice 0, so that slice 1 is nobody's."""

    def exchanged(self, flat):
        return torch.stack([one.view(self.size, -1)[0] for one in self._swapped("exchange", flat.clone())])


FAULTS = {
    "the number of processes enters the sampling": {
        "change": lambda mechanism, rank: with_doubles(
            mechanism, draw=lambda honest, n, rate, **k: honest(n, rate / 2, **k)
        )
    },
    "each draws by itself": {"change": planted(draw=with_another_attempt)},
    "each has noise of its own": {"change": planted(gaussian=with_another_attempt)},
    "only the first has noise": {"change": planted(gaussian=lambda honest, *a, **k: 0 * honest(*a, **k))},
    "noise is that of half the clipping norm": {
        "change": planted(gaussian=lambda honest, shape, std, **k: honest(shape, std / 2, **k))
    },
    "the noise of a part is that of another part": {
        "change": planted(
            gaussian=lambda honest, *a, part=None, **k: honest(
                *a, **k, **({} if part is None else {"part": slice(0, part.stop - part.start)})
            )
        )
    },
    "records draw by another key": {
        "change": lambda mechanism, rank: dataclasses.replace(mechanism, record_key=mechanism.record_key + rank)
    },
    "each step is charged twice": {
        "change": lambda mechanism, rank: with_doubles(
            mechanism, charge=lambda honest, **event: [honest(**event) for _ in range(2)]
        )
    },
    "sums are not added": {"group": NotAdded},
    "sums are averaged": {"group": MeanOfRanks},
    "two take the same slice": {"group": WrongSlice},
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_processes_that_do_not_are_seen(fault, in_full):
    runs, _ = several(2, **fault)
    with pytest.raises(AssertionError):
        assert_several_compute_what_one_does(in_full, runs)


@pytest.mark.parametrize("size", [2, 3, 7])
def test_with_exact_sums_any_number_has_the_bits_of_one(size):
    one = alone(policy=QUANTIZED, exact=True)
    runs, _ = several(size, policy=QUANTIZED, exact=True)
    for run in runs:
        assert torch.equal(parameters(run), parameters(one)) and run.scores == one.scores
    assert "exact" in str(one.execution)


def test_without_exact_sums_bits_differ(in_full):
    """The control: a sum of floats shows into how many parts it was cut, so that equality above says something."""
    runs, _ = several(3, steps=STEPS)
    assert not torch.equal(parameters(runs[0]), parameters(in_full))


def test_with_discrete_noise_several_have_the_bits_of_one():
    one, (runs, _) = alone(noise="discrete", steps=2), several(3, noise="discrete", steps=2)
    assert all(torch.equal(parameters(run), parameters(one)) for run in runs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_sums_of_more_values_than_are_added_up_at_a_time_are_those_of_each(dtype):
    generator, length = torch.Generator().manual_seed(0), 3 * (2 * exchange._CACHED + 7)
    sums = torch.randint(-(2**20), 2**20, (3, length), generator=generator).to(dtype)

    def work(group):
        return dict(noisy_means(group, {"w": sums[group.rank]}, lambda name, part, total: total, dtype))["w"]

    results, _ = each(3, work)
    assert all(torch.equal(found, sums.sum(0)) for found in results)


def moved(**settings):
    """How far the parameters move without gradients, in units of one process' noise."""
    first = parameters(start(Alone(), Settings()))
    runs, _ = several(3, factor=1e-4, **settings)
    return (parameters(runs[0]) - first).square().mean().sqrt() / (0.1 * 1.2 * 0.7 / BATCH * STEPS**0.5)


def test_noise_is_one_unit_whatever_the_number_of_processes():
    one = parameters(alone(factor=1e-4, exact=True))
    runs, _ = several(3, factor=1e-4, exact=True)
    assert all(torch.equal(parameters(run), one) for run in runs)
    assert moved() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(
    "change",
    [
        lambda mechanism, rank: with_doubles(mechanism, gaussian=lambda honest, *a, **k: 3**0.5 * honest(*a, **k)),
        lambda mechanism, rank: with_doubles(mechanism, gaussian=lambda honest, *a, **k: 0 * honest(*a, **k)),
    ],
    ids=["on every process", "on none"],
)
def test_another_unit_of_noise_is_seen(change):
    assert moved(change=change) != pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("exact", [False, True])
def test_a_process_without_records_takes_part_with_zeros(exact):
    few = {"records": 6, "batch": 1.0, "steps": 6, "exact": exact}
    one, (runs, made) = alone(**few), several(3, **few)
    assert any(not ids for ids, _ in runs[2].seen), "no empty share was drawn"
    assert all(exchanges == made[0] for exchanges in made)
    assert (parameters(runs[0]) - parameters(one)).norm() <= 1e-5 * parameters(one).norm()


class Skipping(Thread):
    """Takes no part in an exchange to which it has nothing to give."""

    def exchanged(self, flat):
        if not flat.any():
            return flat.view(self.size, -1)
        return super().exchanged(flat)


def test_a_process_that_skips_an_exchange_is_seen():
    """It would let the others wait for ever; here the next exchange is of another kind, or does not fit."""
    with pytest.raises(Exception, match=r".+"):
        _, made = several(3, group=Skipping, records=6, batch=1.0, steps=6)
        assert all(exchanges == made[0] for exchanges in made)


class Read:
    """Records that note that they were read."""

    def __init__(self, records, log):
        self._records, self._log = records, log

    def __len__(self):
        return len(self._records)

    def __getitem__(self, index):
        self._log.append(index)
        return self._records[index]


class Failing(Ledger):
    """A ledger on a disk that is full after one line."""

    left = 1

    def charge(self, **event):
        self.left -= 1
        if self.left < 0:
            raise LedgerError("Expected the charge on disk; got a full one.")
        super().charge(**event)


def test_where_the_ledger_fails_no_process_reads_a_record():
    """The first charge succeeds, so that records are read then: the log would show a later one."""
    logs = [[], [], []]

    def work(group):
        run = start(group, Settings(opened=Failing, data=lambda records, rank: Read(records, logs[rank])))
        steps = iter(next(iter(run.epochs())))
        run.step(next(steps))
        before = [len(log) for log in logs]
        batch = next(steps)
        with pytest.raises(LedgerError, match="full one"):
            run.step(batch)
        return before

    results, _ = each(3, work)
    assert all(before == [len(log) for log in logs] for before in results), results
    assert all(len(log) > 3 for log in logs)  # of which three are read for their shapes


def test_a_failure_on_one_process_is_one_on_all():
    started = threading.Event()

    class Unreadable(Read):
        def __getitem__(self, index):
            if self._log and started.is_set():  # after the first step, in which a record is compared with itself
                raise MemoryError
            return super().__getitem__(index)

    def data(records, rank):
        return Unreadable(records, []) if rank == 1 else records

    def work(group):
        run = start(group, Settings(data=data))
        batches = (batch for epoch in run.epochs() for batch in epoch)
        run.step(next(batches))
        started.set()
        with pytest.raises(dpquant.DPQuantError) as raised:
            run.step(next(batches))
        return isinstance(raised.value, GroupError)  # which would be a process that is gone

    results, _ = each(3, work)
    assert results == [False] * 3


def test_what_one_process_raises_all_raise():
    def work(group):
        def fails():
            if group.rank == 1:
                raise DataError("Expected a file; got none.")
            return "done"

        with pytest.raises(DataError, match="Expected a file"):
            together(group, fails)
        return together(group, lambda: "done")

    assert each(3, work)[0] == ["done"] * 3


def test_of_a_foreign_exception_its_type_alone_is_told():
    def work(group):
        def fails():
            if group.rank == 0:
                raise KeyError("a record")

        with pytest.raises((KeyError, dpquant.ModelError)) as raised:
            on_first(group, fails)
        return str(raised.value)

    results, _ = each(2, work)
    assert "KeyError on process 0" in results[1] and "a record" not in results[1]


def test_the_first_ones_execution_and_choices_hold_for_all():
    """The second would choose another microbatch size."""
    runs, _ = several(2, steps=1, asked=lambda rank: 4 - 2 * rank)
    assert runs[0].execution == runs[1].execution and runs[1].execution.microbatch_size == 4
    assert runs[0].choices.made.items() >= runs[1].choices.made.items()


def test_processes_that_were_started_on_different_runs_are_refused():
    def work(group):
        with pytest.raises(SettingError, match="another number of records on process 1"):
            start(group, Settings(data=lambda records, rank: records[: RECORDS - rank]))
        return True

    assert each(2, work)[0] == [True, True]


def test_parameters_that_differ_end_the_run():
    def work(group):
        model = nn.Linear(3, 3)
        with torch.no_grad():
            model.weight.fill_(1.0)
            model.bias.fill_(1.0)
        check_parameters(group, model)
        if group.rank == 1:
            model.bias.data[0] = torch.nextafter(model.bias.data[0], torch.tensor(2.0))
        with pytest.raises(GroupError, match="others on process 1"):
            check_parameters(group, model)
        return True

    assert each(3, work)[0] == [True] * 3


def test_a_process_whose_parameters_are_changed_stops_all():
    def work(group):
        run = start(group, Settings())
        with pytest.raises(GroupError, match="others on process 1"):
            for epoch in run.epochs():
                for batch in epoch:
                    run.step(batch)
                    if group.rank == 1:
                        next(run.model.parameters()).data.mul_(2)
        return run.steps_taken

    assert each(2, work)[0] == [STEPS] * 2


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1024])
def test_slices_cover_every_value_once(size):
    tensors = {"a": torch.zeros(3, 5), "b": torch.zeros(()), "empty": torch.zeros(0), "c": torch.zeros(8)}
    counts = {name: torch.zeros(one.numel()) for name, one in tensors.items()}
    for rank in range(size):
        for name, part in Slices.of(tensors, Thread(rank, size, None)).parts().items():
            assert part.stop <= len(counts[name])
            counts[name][part] += 1
    assert all(bool((one == 1).all()) for one in counts.values())


@pytest.mark.parametrize("whole", [False, True])
def test_every_record_is_in_one_share(whole):
    ids, found = torch.arange(23), []
    for rank in range(7):
        mine, taken = cut(ids, Thread(rank, 7, None), whole=whole)
        found += [one for piece in list(mine.split(2))[taken] for one in piece.tolist()]
    assert sorted(found) == ids.tolist()


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_process_whose_slice_is_empty_sends_what_the_others_send(count):
    """Two values on three processes: a process that has none cannot see of which type they are."""

    def work(group):
        sums = {"w": torch.ones(count, dtype=torch.float64)}
        return dict(noisy_means(group, sums, lambda name, part, total: total, torch.float64))["w"]

    for one in each(3, work)[0]:
        assert torch.equal(one, torch.full((count,), 3.0, dtype=torch.float64))


def test_a_sum_does_not_depend_on_which_row_comes_first():
    """It is added up in the order of the processes, in float64: 2^25 + 1 - 2^25 is lost in float32."""
    values = [2.0**25, 1.0, -(2.0**25)]

    def work(group):
        sums = {"w": torch.full((4,), values[group.rank])}
        return dict(noisy_means(group, sums, lambda name, part, total: total, torch.float32))["w"]

    for one in each(3, work)[0]:
        assert torch.equal(one, torch.ones(4))


def test_one_process_alone_has_nobody_to_ask():
    ids, group = torch.arange(5), Alone()
    assert (group.rank, group.size) == (0, 1)
    assert torch.equal(cut(ids, group, whole=False)[0], ids)
    assert group.from_first(b"x") == b"x" and group.from_all(b"x") == [b"x"]
    assert torch.equal(group.gathered(group.exchanged(ids)[0]), ids)
