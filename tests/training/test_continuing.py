# SPDX-License-Identifier: Apache-2.0
"""A run that continues is the run that it was: no bit else where it can be repeated, no budget more where it cannot."""

import dataclasses
import shutil

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import dpquant
from dpquant.errors import BudgetError, DataError, LedgerError, SettingError
from dpquant.privacy.ledger import Ledger
from dpquant.training.checkpoint import Checkpoint
from dpquant.training.continuing import continued
from dpquant.training.start import make_private
from dpquant.training.state import RunState
from networks import loss

RECORDS, STEPS = 60, 10  # five steps an epoch


def data_set():
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(
        torch.randn(RECORDS, 1, 5, 5, generator=generator), torch.randint(0, 3, (RECORDS,), generator=generator)
    )


def network(width=8):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, width), nn.Linear(width, 3))


def plan_of(**changes):
    analysis = dpquant.AnalysisPlan(
        count=2, sample_rate=0.3, expected_batch_size=18, noise_multiplier=3.0, max_norm=0.5
    )
    settings = {
        "noise_multiplier": 1.5, "delta": 1e-5, "max_grad_norm": 0.7, "sample_rate": 0.2,
        "expected_batch_size": 12, "steps": STEPS, "analysis": analysis, **changes,
    }  # fmt: skip
    return dpquant.PrivacyPlan(**settings)


class Run:
    """A run with its scheduler, as a user writes it."""

    def __init__(self, ledger, *, seed=7, width=8, plan=None, optimizer=torch.optim.Adam, resume=False):
        model = network(width)
        self.optimizer = optimizer(model.parameters(), lr=0.1)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, step_size=3)
        self.private = make_private(
            model, self.optimizer, data_set(), plan=plan or plan_of(), policy=dpquant.DPQuantPolicy(fraction=0.5),
            loss_fn=loss, backend="simulate", microbatch_size=4, mechanism_seed=seed, ledger=ledger, resume=resume,
        )  # fmt: skip

    def steps(self, until=STEPS):
        for epoch in self.private.epochs():
            for batch in epoch:
                self.private.step(batch)
                self.scheduler.step()
                if self.private.steps_taken == until:
                    return self
        return self

    def save(self, path):
        self.private.save(path, scheduler=self.scheduler)

    def load(self, path):
        self.private.load(path, scheduler=self.scheduler)
        return self

    def everything(self):
        """All that the run has released, and what decides on its future."""
        model = [p.detach().clone() for p in self.private.model.parameters()]
        moments = [v for state in self.optimizer.state_dict()["state"].values() for v in state.values()]
        state = self.private.state
        return [*model, *moments], (state.scores, state.policies, state.steps_taken, self.scheduler.get_last_lr())


def same(a, b) -> bool:
    (tensors, facts), (others, other_facts) = a.everything(), b.everything()
    return facts == other_facts and len(tensors) == len(others) and all(map(torch.equal, tensors, others))


def killed_and_continued(folder, at, *, checkpoint, seed=7, again=7):
    """A run that is killed after `at` steps, with a checkpoint after `checkpoint`, and then continues to its end."""
    first = Run(folder / "ledger.jsonl", seed=seed).steps(checkpoint)
    first.save(folder / "checkpoint")
    if at > checkpoint:
        first.steps(at)
    shutil.copy(folder / "ledger.jsonl", folder / "killed.jsonl")  # as SIGKILL leaves it: nothing is given back
    return Run(folder / "killed.jsonl", seed=again, resume=True).load(folder / "checkpoint").steps()


@pytest.mark.always
@pytest.mark.parametrize(("at", "checkpoint"), [(4, 4), (5, 5), (6, 4), (8, 3)])
def test_a_repeatable_run_continues_with_the_same_bits(at, checkpoint, tmp_path):
    whole = Run(tmp_path / "whole.jsonl").steps()
    assert same(whole, killed_and_continued(tmp_path, at, checkpoint=checkpoint))


def test_a_part_that_is_not_restored_would_be_seen(tmp_path):
    """Without the optimizer's moments the parameters end elsewhere."""
    whole = Run(tmp_path / "whole.jsonl").steps()
    first = Run(tmp_path / "ledger.jsonl").steps(4)
    first.save(tmp_path / "checkpoint")
    first.private.close()
    saved = Checkpoint.read(tmp_path / "checkpoint")
    forgetful = {**saved.parts, "optimizer": {**saved.parts["optimizer"], "state": {}}}
    dataclasses.replace(saved, parts=forgetful).write(tmp_path / "forgetful")
    assert not same(whole, Run(tmp_path / "ledger.jsonl", resume=True).load(tmp_path / "forgetful").steps())


# A private run: fresh key, charges stay, the budget holds


@pytest.mark.parametrize(("at", "checkpoint"), [(4, 4), (7, 3), (9, 4), (10, 4)])
def test_a_private_run_spends_its_plan_and_no_more(at, checkpoint, tmp_path):
    run = killed_and_continued(tmp_path, at, checkpoint=checkpoint, seed=None, again=None).private
    state, ledger = run.state, Ledger.verify(tmp_path / "killed.jsonl")
    assert ledger.charged("train") == STEPS == state.steps_taken
    assert state.steps_lost >= at - checkpoint  # and what was charged ahead
    assert ledger.charged("analysis") <= 2
    assert run.epsilon_spent() <= run.plan.epsilon + 1e-9
    assert ledger.attempts == 2


def test_a_private_run_that_continues_draws_anew(tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    first = Run(folders[0] / "ledger.jsonl", seed=None).steps(4)
    first.save(folders[0] / "checkpoint")
    first.private.close()
    shutil.copytree(*folders)
    runs = [Run(one / "ledger.jsonl", seed=None, resume=True).load(one / "checkpoint").steps() for one in folders]
    assert not same(*runs)


def test_lost_steps_are_not_taken_again(tmp_path):
    """What a forgetful resume would do: the ledger refuses it before data is touched."""
    run = Run(tmp_path / "ledger.jsonl", seed=None).steps(7)
    run.private.close()
    second = Run(tmp_path / "ledger.jsonl", seed=None, resume=True)
    assert second.private.steps_taken == 7 and second.private.state.steps_lost == 7
    second.private._advance(steps_taken=3)  # as if the steps after a checkpoint had not been charged
    with pytest.raises(BudgetError):
        second.steps()
    assert Ledger.verify(tmp_path / "ledger.jsonl").charged("train") == STEPS


def test_a_ledger_in_use_is_not_continued_by_accident(tmp_path):
    run = Run(tmp_path / "ledger.jsonl").steps(2)
    run.private.close()
    with pytest.raises(LedgerError, match="holds charges"):
        Run(tmp_path / "ledger.jsonl")


# What does not belong together


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a ledger and a checkpoint after four steps."""
    folder = tmp_path_factory.mktemp("saved")
    run = Run(folder / "ledger.jsonl").steps(4)
    run.save(folder / "checkpoint")
    run.private.close()
    return folder


def continuing_with(saved, tmp_path, **changes):
    folder = tmp_path / "copy"
    shutil.copytree(saved, folder)
    return Run(folder / "ledger.jsonl", resume=True, **changes), folder / "checkpoint"


def test_another_model_is_refused(saved, tmp_path):
    run, checkpoint = continuing_with(saved, tmp_path, width=9)
    with pytest.raises(DataError, match=r"Expected values of this model, in which 3\.weight"):
        run.load(checkpoint)


def test_another_optimizer_is_refused(saved, tmp_path):
    run, checkpoint = continuing_with(saved, tmp_path)
    run.private._steps.optimizer = torch.optim.SGD([next(run.private.model.parameters())], lr=0.1)
    with pytest.raises(DataError, match="Expected optimizer to take over"):
        run.load(checkpoint)


def test_another_plan_is_refused(saved, tmp_path):
    with pytest.raises(LedgerError, match="plan"):
        continuing_with(saved, tmp_path, plan=plan_of(noise_multiplier=1.4))


def test_a_checkpoint_of_another_plan_is_refused(saved, tmp_path):
    run, checkpoint = continuing_with(saved, tmp_path)
    read = Checkpoint.read(checkpoint)
    other = plan_of(noise_multiplier=1.4).to_json()
    dataclasses.replace(read, facts={**read.facts, "plan": other}).write(tmp_path / "other")
    with pytest.raises(SettingError, match="Expected the plan of the checkpoint"):
        run.load(tmp_path / "other")


@dataclasses.dataclass
class Holds:
    """A ledger that holds so many charges."""

    train: int
    analysis: int

    def charged(self, kind):
        return getattr(self, kind)


def test_a_run_continues_at_what_is_charged_and_from_no_ledger_that_holds_less(saved):
    at = RunState.from_json(Checkpoint.read(saved / "checkpoint").facts["state"])
    assert (at.steps_taken, at.analyses_made, at.draws) == (4, 1, 5)
    after = continued(at, Holds(7, 2), at.execution, repeatable=False)
    assert (after.steps_taken, after.steps_lost, after.analyses_made, after.draws) == (7, 3, 2, 8)
    assert continued(at, Holds(7, 2), at.execution, repeatable=True) == at
    for less in (Holds(3, 1), Holds(4, 0)):
        with pytest.raises(LedgerError, match="older copy"):
            continued(at, less, at.execution, repeatable=False)


def test_an_analysis_that_was_charged_before_any_step_is_not_made_again(tmp_path):
    first = Run(tmp_path / "ledger.jsonl", seed=None)
    next(first.private.epochs())  # the analysis; then the process ends
    first.private._mechanism.ledger._file.close()
    second = Run(tmp_path / "ledger.jsonl", seed=None, resume=True)
    assert (second.private.analyses_made, second.private.steps_taken) == (1, 0)


def test_an_older_ledger_is_refused(saved, tmp_path):
    run = Run(tmp_path / "ledger.jsonl").steps(2)
    run.private.close()
    with pytest.raises(LedgerError, match="older copy"):
        Run(tmp_path / "ledger.jsonl", resume=True).load(saved / "checkpoint")


def test_what_was_saved_must_be_loaded(saved, tmp_path):
    run, checkpoint = continuing_with(saved, tmp_path)
    with pytest.raises(SettingError, match="what was saved, model, optimizer, scheduler"):
        run.private.load(checkpoint)
    with pytest.raises(SettingError, match="other names than model"):
        run.private.load(checkpoint, model=run.scheduler)


def test_a_run_that_has_drawn_a_batch_loads_nothing(saved, tmp_path):
    run, checkpoint = continuing_with(saved, tmp_path)
    run.load(checkpoint).steps(5)
    with pytest.raises(SettingError, match="before the run's first batch"):
        run.load(checkpoint)


def test_a_checkpoint_holds_no_key_and_no_record(saved):
    names = {path.name for path in (saved / "checkpoint").iterdir()}
    assert names == {"MANIFEST.json", "state.json", "model.safetensors", "optimizer.safetensors"}
    text = (saved / "checkpoint" / "state.json").read_text() + (saved / "checkpoint" / "MANIFEST.json").read_text()
    assert "secret" not in text and "key" not in text.replace("monkey", "")
