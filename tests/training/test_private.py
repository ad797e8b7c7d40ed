# SPDX-License-Identifier: Apache-2.0
"""The run as a whole: what is charged is what happens (counted by doubles of the mechanism), in the right order."""

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset, TensorDataset

import dpquant
from dpquant.errors import BudgetError, DataError, LedgerError, ModelError, SettingError
from dpquant.privacy import accounting
from dpquant.privacy.events import merged
from dpquant.privacy.ledger import Ledger
from dpquant.privacy.mechanism import Mechanism
from dpquant.training.private import PrivateTraining
from dpquant.training.start import make_private
from mechanisms import begun, finish, with_doubles
from networks import loss

RECORDS, BATCH, STEPS = 200, 20, 25  # 10 steps an epoch: two whole epochs and half of a third


def data_set():
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(
        torch.randn(RECORDS, 1, 6, 6, generator=generator), torch.randint(0, 5, (RECORDS,), generator=generator)
    )


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 8), nn.Linear(8, 5)
    )


def plan_of(kind=dpquant.PrivacyPlan, **changes):
    analysis = dpquant.AnalysisPlan(
        count=3, sample_rate=0.3, expected_batch_size=60, noise_multiplier=3.0, max_norm=0.5
    )
    settings = {
        "noise_multiplier": 1.5, "delta": 1e-5, "max_grad_norm": 0.7, "sample_rate": BATCH / RECORDS,
        "expected_batch_size": BATCH, "steps": STEPS, "analysis": analysis, **changes,
    }  # fmt: skip
    return kind(**settings)


def start(train_set=None, model=None, optimizer=torch.optim.SGD, plan=None, **settings):
    model = network() if model is None else model
    train_set = data_set() if train_set is None else train_set
    arguments = {"policy": dpquant.DPQuantPolicy(fraction=0.5), "loss_fn": loss, **settings}
    return make_private(model, optimizer(model.parameters(), lr=0.1), train_set, plan=plan or plan_of(), **arguments)


def start_with(records=None, plan=None, make_run=PrivateTraining, policy=None, **doubles):
    """A run with doubles of its mechanism."""
    return begun(
        network(), data_set() if records is None else records, loss_fn=loss, plan=plan or plan_of(),
        policy=policy or dpquant.DPQuantPolicy(fraction=0.5), make_run=make_run,
        mechanism=with_doubles(Mechanism.secret(None), **doubles),
    )  # fmt: skip


def watched(plan=None, events=None):
    """A run that was finished, and each call of sampler, noise, sums and ledger in order."""
    calls = []

    def told(call, result):
        calls.append(call)
        return result

    class Watched(PrivateTraining):
        def _clipped_sum(self, pieces, key):
            total = super()._clipped_sum(pieces, key)
            return told(("sum", "train", total.sensitivity), total)

        def _impact_sum(self, pieces, names, keys):
            total = super()._impact_sum(pieces, names, keys)
            return told(("sum", "analysis", total.sensitivity), total)

    run = start_with(
        plan=plan, make_run=Watched, events=events,
        charge=lambda honest, **k: told(("charge", k["kind"]), honest(**k)),
        draw=lambda honest, *a, **k: told(("draw", k["stream"], a[1]), honest(*a, **k)),
        gaussian=lambda honest, *a, **k: told(("noise", k["stream"], a[1], k["name"]), honest(*a, **k)),
    )  # fmt: skip
    return finish(run), calls


def assert_ledger_tells_what_happened(run, calls, num_parameters=8):
    """For each kind: as many draws, sums and vectors of noise as charges, at the charged rate and noise."""
    charged = {event.kind: event for event in run.events()}
    assert set(charged) == {kind for what, kind, *_ in calls if what == "sum"}
    for kind, event in charged.items():
        draws, sums, noises, charges = (
            [call for call in calls if call[:2] == (what, kind)] for what in ("draw", "sum", "noise", "charge")
        )
        assert len(draws) == len(sums) == event.count == len(charges)
        assert {draw[2] for draw in draws} == {event.sample_rate}
        assert len(noises) == event.count * (num_parameters if kind == "train" else 1)
        assert all(noise[2] / sums[0][2] == pytest.approx(event.noise_multiplier) for noise in noises)


def test_the_ledger_tells_what_happened():
    run, calls = watched()
    assert_ledger_tells_what_happened(run, calls)
    assert {e.kind: e.count for e in run.events()} == {"train": STEPS, "analysis": 3}
    assert run.epsilon_spent() == pytest.approx(run.plan.epsilon)


def test_a_forgotten_analysis_event_is_caught():
    run, calls = watched(events=lambda events: [event for event in events if event.kind == "train"])
    with pytest.raises(AssertionError):
        assert_ledger_tells_what_happened(run, calls)


class NoiseForAnotherNorm(dpquant.PrivacyPlan):
    def train_noise_std(self, sensitivity):
        return self.noise_multiplier


def test_noise_for_another_norm_is_caught():
    run, calls = watched(plan_of(NoiseForAnotherNorm))
    with pytest.raises(AssertionError):
        assert_ledger_tells_what_happened(run, calls)


class Recorder(Dataset):
    """Writes down every access."""

    def __init__(self, log):
        self.log, self.inner = log, data_set()

    def __len__(self):
        return len(self.inner)

    def __getitem__(self, index):
        self.log.append("read")
        return self.inner[index]


def assert_charged_first(log):
    """Between two charges there may be reads, but none comes before the first."""
    assert "read" in log and "charge" in log and log.index("charge") < log.index("read")


def test_the_ledger_is_charged_before_a_record_is_read():
    log = []
    for policy in (dpquant.DPQuantPolicy(fraction=0.5), dpquant.NonePolicy()):
        run = start_with(
            Recorder(log), policy=policy, charge=lambda honest, **event: (honest(**event), log.append("charge"))[0]
        )
        log.clear()  # the first record's shape was looked at
        epoch = next(run.epochs())
        if policy.needs_scores:
            assert_charged_first(log)
            log.clear()
        batch = next(iter(epoch))
        assert "read" not in log
        run.step(batch)
        assert_charged_first(log)


def test_charging_after_reading_is_caught():
    with pytest.raises(AssertionError):
        assert_charged_first(["read", "charge"])


def full(honest, **event):
    raise dpquant.LedgerError("disk full")


def test_a_charge_that_fails_stops_the_step_before_any_data():
    log = []
    run = start_with(Recorder(log), policy=dpquant.NonePolicy(), charge=full)
    batch = next(iter(next(run.epochs())))
    log.clear()
    before = [p.clone() for p in run.model.parameters()]
    with pytest.raises(dpquant.LedgerError):
        run.step(batch)
    assert not log and all(torch.equal(a, b) for a, b in zip(before, run.model.parameters(), strict=True))


def moved_by_noise(run):
    """The first step's move in units of lr * noise std / expected batch size."""
    before = torch.cat([p.detach().flatten().clone() for p in run.model.parameters()])
    run.step(next(iter(next(run.epochs()))))
    after = torch.cat([p.detach().flatten() for p in run.model.parameters()])
    return (before - after) * BATCH / (0.1 * 1.5 * 0.7)


def test_an_empty_batch_is_a_step_like_any_other():
    run = start_with(policy=dpquant.NonePolicy(), draw=lambda *a, **k: torch.zeros(0, dtype=torch.int64))
    noise = moved_by_noise(run)
    assert run.steps_taken == 1 and run.events()[0].count == 1
    assert abs(noise.square().mean().item() - 1) < 4.9 * (2 / len(noise)) ** 0.5


@pytest.mark.parametrize("draw", ["one", "all"])
def test_the_sum_is_divided_by_the_planned_batch_size_whatever_was_drawn(draw):
    ids = torch.arange(1 if draw == "one" else RECORDS)
    run = start_with(
        policy=dpquant.NonePolicy(),
        draw=lambda *a, **k: ids,
        gaussian=lambda honest, shape, std, **k: torch.zeros(tuple(shape)),
    )
    expected = dpquant.clipped_sum(
        dpquant.prepare(network()), loss, data_set()[ids], max_grad_norm=0.7, record_ids=ids, step=0, seed=0
    )  # in full precision the draws do not matter
    run.step(next(iter(next(run.epochs()))))
    for name, parameter in run.model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected.grads[name] / BATCH)


def test_layers_that_are_not_chosen_run_in_the_rest_during_an_epoch():
    run = start(policy=dpquant.RotatePolicy(fraction=0.5), format="luq", rest="full/luq-fp4/luq-fp4")
    for epoch in run.epochs():
        for batch in epoch:
            names = {name: layer.precision.name for name, layer in dpquant.quantizable_layers(run.model).items()}
            assert names == {name: "luq" if name in epoch.policy else "full/luq-fp4/luq-fp4" for name in run.macs}
            run.step(batch)
        assert not any(layer.quantized for layer in dpquant.quantizable_layers(run.model).values())


def test_layers_rotate_and_the_model_is_in_full_precision_between_epochs():
    run = start()
    for epoch in run.epochs():
        for batch in epoch:
            assert dpquant.quantizable_layers(run.model)[epoch.policy[0]].quantized
            run.step(batch)
        assert not any(layer.quantized for layer in dpquant.quantizable_layers(run.model).values())
    assert [len(names) for names in run.policies()] == [2, 2, 2] and run.steps_taken == STEPS
    assert set(run.macs) == {"0", "2", "5", "6"} and set(run.scores) == run.macs.keys() - set(
        run.execution.excluded_layers
    )
    assert run.macs["0"] == 4 * 4 * 4 * 9 and run.macs["6"] == 40


def test_any_optimizer_and_scheduler_work():
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.5)
    run = make_private(
        model, optimizer, data_set(), loss_fn=loss, plan=plan_of(steps=10, analysis=None), policy=dpquant.NonePolicy()
    )
    for epoch in run.epochs():
        for batch in epoch:
            run.step(batch)
            schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.25


def test_dp_adam_is_adam_fed_the_noised_gradient():
    model, twin = network(), network()
    by_hand = torch.optim.Adam(twin.parameters(), lr=0.01)
    run = start(model=model, optimizer=lambda p, lr: torch.optim.Adam(p, lr=0.01), policy=dpquant.NonePolicy())
    for batch in next(run.epochs()):
        run.step(batch)
        for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            assert ours.grad is not None
            theirs.grad = ours.grad.clone()
        by_hand.step()
    assert run.steps_taken == 10
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_only_the_batch_just_drawn_can_be_used_and_only_once():
    run = start(policy=dpquant.NonePolicy())
    batches = iter(next(run.epochs()))
    first = next(batches)
    run.step(first)
    for other in (first, (torch.zeros(2, 1, 6, 6), torch.zeros(2).long())):
        with pytest.raises(SettingError, match="just drawn"):
            run.step(other)
    second = next(batches)
    assert not torch.equal(first.record_ids, second.record_ids)
    with pytest.raises(SettingError, match="just drawn"):  # while another one waits
        run.step(first)


def test_steps_beyond_the_plan_and_epochs_without_a_step_are_refused():
    run = finish(start(policy=dpquant.NonePolicy()))
    with pytest.raises(BudgetError, match="one more"):
        run.step(None)
    with pytest.raises(BudgetError, match="take a step"):
        for _ in start(policy=dpquant.NonePolicy()).epochs():
            pass


def test_an_epoch_is_iterated_once():
    epoch = next(start(policy=dpquant.NonePolicy()).epochs())
    next(iter(epoch))
    with pytest.raises(SettingError, match="iterated once"):
        iter(epoch)


def skip_first(run):
    """Draws two batches and steps with the second."""
    batches = iter(next(run.epochs()))
    next(batches)
    run.step(next(batches))


def leave_epoch_early(run):
    """Steps once, draws again, and goes on to the next epoch."""
    epochs = run.epochs()
    batches = iter(next(epochs))
    run.step(next(batches))
    next(batches)
    next(epochs)


@pytest.mark.parametrize("skip", [skip_first, leave_epoch_early])
def test_a_batch_that_is_drawn_and_skipped_is_refused(skip):
    with pytest.raises(SettingError, match="skipped"):
        skip(start(policy=dpquant.NonePolicy()))


def parameters_after(**settings):
    return torch.cat([p.flatten() for p in finish(start(**settings)).model.parameters()])


def test_two_runs_differ_unless_the_mechanism_is_seeded_which_is_said():
    few = {"plan": plan_of(steps=5, analysis=None), "policy": dpquant.RotatePolicy(fraction=0.5)}
    assert not torch.equal(parameters_after(**few), parameters_after(**few))
    seeded = parameters_after(mechanism_seed=3, **few)
    assert torch.equal(seeded, parameters_after(mechanism_seed=3, **few))
    torch.testing.assert_close(
        seeded, parameters_after(mechanism_seed=3, microbatch_size=7, **few), rtol=1e-3, atol=1e-4
    )
    run = start(mechanism_seed=3)
    assert not run.secure and "NOT PRIVATE" in run.statement() and "NOT PRIVATE" not in start().statement()


def test_the_ledger_file_holds_the_run(tmp_path):
    run = finish(start(ledger=tmp_path / "new" / "ledger.jsonl"))
    assert sum(c.count for c in Ledger.read(tmp_path / "new" / "ledger.jsonl")) == STEPS + 3
    assert len(run.events()) == 2


def leasing(path):
    """A run that charges four steps a line, as one of many more steps may."""
    ledger = Ledger(path, budget=plan_of().budget())
    ledger.lease = 4
    return begun(
        network(), data_set(), loss_fn=loss, plan=plan_of(), policy=dpquant.DPQuantPolicy(fraction=0.5),
        mechanism=Mechanism.secret(ledger),
    )  # fmt: skip


def steps_in(path):
    return Ledger.verify(path).charged("train")


def leave_the_loop(run, path):
    for epoch in run.epochs():
        for batch in epoch:
            run.step(batch)
            assert steps_in(path) == 4  # what a crash would leave
            return


def close_the_run(run, path):
    epochs = run.epochs()
    run.step(next(iter(next(epochs))))
    assert steps_in(path) == 4
    run.close()
    with pytest.raises(LedgerError, match="closed"):
        run.step(next(iter(next(run.epochs()))))


@pytest.mark.parametrize("end", [leave_the_loop, close_the_run])
def test_steps_that_were_charged_ahead_and_not_taken_are_given_back(end, tmp_path):
    run = leasing(tmp_path / "ledger")
    end(run, tmp_path / "ledger")
    assert steps_in(tmp_path / "ledger") == run.steps_taken == 1
    assert run.epsilon_spent() == accounting.epsilon(Ledger.read(tmp_path / "ledger"), 1e-5)


def test_a_run_takes_its_steps_from_leases_and_ends_with_what_was_planned(tmp_path):
    run = leasing(tmp_path / "ledger")
    for epoch in run.epochs():
        for batch in epoch:
            run.step(batch)
            assert run.steps_taken == sum(e.count for e in run.events() if e.kind == "train")
            assert run.steps_taken <= steps_in(tmp_path / "ledger") <= STEPS
    assert merged(run.events()) == Ledger.read(tmp_path / "ledger")
    assert {event.kind: event.count for event in run.events()} == {"train": STEPS, "analysis": 3}


def test_a_run_that_continues_stops_at_what_its_ledger_allows(tmp_path):
    """Steps that a crash wasted are not taken again: the run ends where its plan is charged."""
    first = leasing(tmp_path / "ledger")
    first.step(next(iter(next(first.epochs()))))
    first._mechanism.ledger._file.close()  # as the system does for a process that was killed
    ledger = Ledger.resumed(tmp_path / "ledger", budget=plan_of().budget())
    wasted = steps_in(tmp_path / "ledger")
    second = begun(
        network(), data_set(), loss_fn=loss, plan=plan_of(), policy=dpquant.NonePolicy(),
        mechanism=Mechanism.secret(ledger),
    )  # fmt: skip
    assert second.state.steps_lost == second.steps_taken == wasted > 0
    finish(second)
    assert steps_in(tmp_path / "ledger") == STEPS
    assert second.epsilon_spent() <= plan_of().epsilon_spent()


class Endless(IterableDataset):
    def __iter__(self):
        return iter(())


def with_batch_norm():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 5))


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"model": with_batch_norm()}, ModelError, "1 .BatchNorm2d"),
        ({"train_set": Endless()}, DataError, "map-style"),
        ({"train_set": TensorDataset(torch.zeros(0, 1))}, DataError, "empty"),
        ({"plan": plan_of(analysis=None)}, SettingError, "analysis"),
        ({"microbatch_size": 0}, SettingError, "microbatch_size"),
        ({"policy": dpquant.StaticPolicy(names=["9"])}, SettingError, "'9'"),
        ({"loss_fn": lambda m, b: loss(m, b).mean()}, SettingError, "one loss per example"),
        ({"optimizer": lambda p, lr: torch.optim.LBFGS(p)}, SettingError, "LBFGS"),
        ({"optimizer": lambda p, lr: torch.optim.SGD([torch.zeros(1, requires_grad=True)])}, SettingError, "own param"),
        ({"optimizer": lambda p, lr: torch.optim.SGD(list(p)[:2])}, SettingError, "lacks 2.weight"),
        ({"optimizer": lambda p, lr: None}, SettingError, "got None"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_any_work(settings, error, words, tmp_path):
    with pytest.raises(error, match=words):
        start(ledger=tmp_path / "ledger.jsonl", **settings)
    assert not list(tmp_path.iterdir())
