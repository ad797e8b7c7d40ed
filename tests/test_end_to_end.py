# SPDX-License-Identifier: Apache-2.0
"""A whole run with recorded mechanisms: every call is held against the plan, and what comes of it too.

Each planted fault is one that left all other tests green: noise or draws that repeat, a private number in the place of
a public one, a claim that leaves something out, an analysis that touches the run.
"""

import random

import numpy as np
import pytest
import torch
from torch import nn

import dpquant
from dpquant.checks.isolation import keeps_apart
from dpquant.engine.clip import ClippedSum
from dpquant.privacy.ledger import Ledger
from dpquant.privacy.noise import NoiseSource
from dpquant.privacy.sampling import PoissonSampler
from dpquant.training import private as private_module
from dpquant.training import start as start_module
from dpquant.training.private import PrivateTraining
from dpquant.training.start import make_private
from networks import loss

RECORDS, PUBLIC_RECORDS, BATCH, STEPS, ANALYSES = 90, 100, 20, 12, 2
RATE = BATCH / PUBLIC_RECORDS  # what is public differs from what is true
MICROBATCH, ANALYSIS_RATE, ANALYSIS_BATCH = 8, 0.3, 30


class Transcript:
    """Every call of a mechanism, in order."""

    def __init__(self, monkeypatch):
        self.calls = []
        self.modes = []  # of the model, whenever losses are computed
        self._wrap(monkeypatch, Ledger, "charge", "charge")
        self._wrap(monkeypatch, PoissonSampler, "draw", "draw")
        self._wrap(monkeypatch, NoiseSource, "gaussian", "noise")
        self._wrap(monkeypatch, private_module, "clipped_sum_of", "sum")
        self._wrap(monkeypatch, private_module, "impact_sum_of", "impacts")

    def _wrap(self, monkeypatch, owner, name, what):
        honest = getattr(owner, name)

        def wrapped(*arguments, **keywords):
            if what in ("sum", "impacts"):
                pieces = list(arguments[2])
                arguments = (*arguments[:2], pieces, *arguments[3:])
                keywords_seen = {**keywords, "sizes": {len(piece.record_ids) for piece in pieces}}
                keywords_seen["ids"] = [id for p in pieces for id in p.record_ids[: p.num_examples].tolist()]
            else:
                keywords_seen = {**keywords, "given": arguments[1:]}
            result = honest(*arguments, **keywords)
            kept = result.clone() if isinstance(result, torch.Tensor) else result  # noise is added to in place
            self.calls.append((what, keywords_seen, kept))
            return result

        monkeypatch.setattr(owner, name, wrapped)

    def of(self, what, **wanted):
        return [
            (keywords, result)
            for name, keywords, result in self.calls
            if name == what and all(keywords.get(key) == value for key, value in wanted.items())
        ]


def network():
    torch.manual_seed(0)
    frozen = nn.Linear(16, 8)
    for parameter in frozen.parameters():
        parameter.requires_grad_(False)
    return nn.Sequential(nn.Conv2d(1, 4, 3, 2), nn.ReLU(), nn.Flatten(), frozen, nn.Dropout(0.3), nn.Linear(8, 5))


def data_set():
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(RECORDS, 1, 6, 6, generator=generator)
    return list(zip(images, torch.randint(0, 5, (RECORDS,), generator=generator), strict=True))


def the_plan():
    return dpquant.PrivacyPlan(
        noise_multiplier=1.3, delta=1e-5, max_grad_norm=0.6, sample_rate=RATE, expected_batch_size=BATCH, steps=STEPS,
        analysis=dpquant.AnalysisPlan(
            count=ANALYSES, sample_rate=ANALYSIS_RATE, expected_batch_size=ANALYSIS_BATCH, noise_multiplier=2.5,
            max_norm=0.4,
        ),
    )  # fmt: skip


def run_whole(monkeypatch, plant):
    """A recorded run, with a fault if one is planted after the recording began."""
    model = network()
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.05)
    transcript = Transcript(monkeypatch)

    def watched(model, batch):
        transcript.modes.append(model.training)
        return loss(model, batch)

    plant(monkeypatch)
    run = make_private(
        model, optimizer, data_set(), loss_fn=watched, plan=the_plan(), policy=dpquant.DPQuantPolicy(fraction=0.5),
        microbatch_size=MICROBATCH, mechanism_seed=11, seed=5,
    )  # fmt: skip
    transcript.calls.clear()
    steps = []
    for epoch in run.epochs():
        for batch in epoch:
            before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
            for parameter in run.model.parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.full_like(parameter, 1e6)  # somebody's leftovers
            run.step(batch)
            steps.append((before, {name: p.detach().clone() for name, p in run.model.named_parameters()}, batch))
    return run, transcript, steps


def assert_the_plan_was_kept(run, transcript, steps):
    plan = run.plan
    trainable = [name for name, p in run.model.named_parameters() if p.requires_grad]
    # draws: at the public rate, over all records, each of another step or attempt
    draws = transcript.of("draw")
    assert [keywords["given"] for keywords, _ in draws if keywords["stream"] == "train"] == [(RECORDS, RATE)] * STEPS
    analyses = [keywords["given"] for keywords, _ in draws if keywords["stream"] == "analysis"]
    assert analyses == [(RECORDS, ANALYSIS_RATE)] * ANALYSES
    assert len({(k["stream"], k["step"], k["attempt"]) for k, _ in draws}) == STEPS + ANALYSES
    assert len({tuple(ids.tolist()) for _, ids in draws}) == STEPS + ANALYSES
    # sums: of the records drawn, in microbatches of a size that is no count of them, under one secret and other draws
    sums, impacts = transcript.of("sum"), transcript.of("impacts")
    drawn = [ids.tolist() for keywords, ids in draws if keywords["stream"] == "train"]
    assert [keywords["ids"] for keywords, _ in sums] == drawn and len(sums) == STEPS
    assert set.union(*(keywords["sizes"] for keywords, _ in sums)) == {MICROBATCH}
    assert set.union(*(keywords["sizes"] for keywords, _ in impacts)) == {run.execution.analysis_microbatch_size}
    assert {keywords["max_grad_norm"] for keywords, _ in sums} == {plan.max_grad_norm}
    assert {keywords["max_norm"] for keywords, _ in impacts} == {plan.analysis.max_norm}
    assert len({keywords["key"] for keywords, _ in sums}) == STEPS
    assert len({(keywords["seed"], keywords["step"]) for keywords, _ in impacts}) == ANALYSES
    assert not {5, 0, 11} & {keywords["seed"] for keywords, _ in impacts}  # neither seed is the key itself
    assert all(set(total.grads) == set(trainable) for _, total in sums)
    # noise: for each parameter of its own shape, of the plan's size, no two alike
    noises = transcript.of("noise")
    assert len(noises) == STEPS * len(trainable) + ANALYSES
    assert len({(k["stream"], k["step"], k["attempt"], k["name"]) for k, _ in noises}) == len(noises)
    firsts = [float(noise.flatten()[0]) for _, noise in noises]
    assert len(set(firsts)) == len(firsts)
    for keywords, noise in noises:
        shape, std = keywords["given"]
        training = keywords["stream"] == "train"
        wanted = plan.noise_multiplier * plan.max_grad_norm if training else 2.5 * plan.analysis.max_norm
        assert std == pytest.approx(wanted) and tuple(shape) == tuple(noise.shape)
    # the optimizer gets (sum + noise) / the public batch size, and nothing of what lay on the gradients before
    for (keywords, total), (before, after, batch) in zip(sums, steps, strict=True):
        assert keywords["ids"] == batch.record_ids.tolist()
        for name in trainable:
            (noise,) = [n for k, n in noises if (k["stream"], k["step"], k["name"]) == ("train", batch.step, name)]
            moved = (before[name] - after[name]) / 0.05
            torch.testing.assert_close(moved, (total.grads[name] + noise) / BATCH, rtol=1e-3, atol=1e-5)
        assert all(torch.equal(before[name], after[name]) for name in before if name not in trainable)
    # the ledger: every draw is charged as it was made, and marked as what it is; the statement says all of it
    charges = [keywords for keywords, _ in transcript.of("charge")]
    assert [c["sample_rate"] for c in charges if c["kind"] == "train"] == [RATE] * STEPS
    assert [c["noise_multiplier"] for c in charges if c["kind"] == "analysis"] == [2.5] * ANALYSES
    order = [name for name, *_ in transcript.calls if name in ("charge", "sum", "impacts")]
    assert len(charges) == STEPS + ANALYSES
    assert order[::2] == ["charge"] * len(charges) and "charge" not in order[1::2]  # each before its records are read
    assert all(charge.research for charge in run.events())
    assert run.epsilon_spent() == pytest.approx(plan.epsilon_spent()) and not run.secure
    assert f"{ANALYSES} analyses" in run.statement() and "NOT PRIVATE" in run.statement()
    assert all(np.isfinite(list(run.scores.values())))


def nothing(monkeypatch):
    """No fault."""


def the_same_noise_for_all_parameters(monkeypatch):
    recorded = NoiseSource.gaussian
    monkeypatch.setattr(NoiseSource, "gaussian", lambda self, *a, **k: recorded(self, *a, **{**k, "name": "w"}))


def the_same_noise_in_all_analyses(monkeypatch):
    recorded = NoiseSource.gaussian

    def planted(self, *a, **k):
        return recorded(self, *a, **({**k, "step": 0, "attempt": 0} if k["stream"] == "analysis" else k))

    monkeypatch.setattr(NoiseSource, "gaussian", planted)


def the_same_records_in_all_steps(monkeypatch):
    recorded = PoissonSampler.draw
    monkeypatch.setattr(
        PoissonSampler, "draw", lambda self, *a, **k: recorded(self, *a, **{**k, "step": 0, "attempt": 0})
    )


def the_rate_of_the_true_number_of_records(monkeypatch):
    recorded = PoissonSampler.draw
    monkeypatch.setattr(PoissonSampler, "draw", lambda self, n, q, **k: recorded(self, n, BATCH / n, **k))


def noise_of_another_norm(monkeypatch):
    monkeypatch.setattr(dpquant.PrivacyPlan, "train_noise_std", lambda plan, sensitivity: plan.noise_multiplier)


def analysis_noise_of_training(monkeypatch):
    monkeypatch.setattr(
        dpquant.PrivacyPlan, "analysis_noise_std", lambda plan, sensitivity: plan.noise_multiplier * sensitivity
    )


def the_public_seed_rounds(monkeypatch):
    recorded = private_module.impact_sum_of
    monkeypatch.setattr(private_module, "impact_sum_of", lambda *a, **k: recorded(*a, **{**k, "seed": 5}))


def one_key_for_all_steps(monkeypatch):
    monkeypatch.setattr(private_module, "step_key", lambda seed, step: 77)


def divided_by_the_realised_size(monkeypatch):
    recorded = private_module.clipped_sum_of

    def planted(model, loss_fn, pieces, **k):
        pieces = list(pieces)
        count = sum(piece.num_examples for piece in pieces)
        total = recorded(model, loss_fn, pieces, **k)
        return ClippedSum({n: g * BATCH / max(count, 1) for n, g in total.grads.items()}, total.sensitivity)

    monkeypatch.setattr(private_module, "clipped_sum_of", planted)


def a_microbatch_of_the_realised_size(monkeypatch):
    honest = private_module.Records.microbatches
    monkeypatch.setattr(
        private_module.Records, "microbatches", lambda self, ids, size, key: honest(self, ids, max(len(ids), 1), key)
    )


def leftovers_are_added_to(monkeypatch):
    honest = PrivateTraining._descend

    def planted(self, batch):
        before = {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}
        step, self.optimizer.step = self.optimizer.step, lambda: None
        honest(self, batch)
        for name, parameter in self.model.named_parameters():
            if name in before:
                parameter.grad += before[name]
        self.optimizer.step = step
        step()

    monkeypatch.setattr(PrivateTraining, "_descend", planted)


def a_ledger_not_marked_as_research(monkeypatch):
    honest = start_module.Ledger
    monkeypatch.setattr(start_module, "Ledger", lambda path, research: honest(path, research=False))


def a_statement_without_the_analyses(monkeypatch):
    honest = PrivateTraining.events
    monkeypatch.setattr(PrivateTraining, "events", lambda self: [e for e in honest(self) if e.kind == "train"])


def an_uncharged_analysis(monkeypatch):
    recorded = Ledger.charge
    monkeypatch.setattr(Ledger, "charge", lambda self, **k: None if k["kind"] == "analysis" else recorded(self, **k))


def a_sum_of_frozen_parameters_too(monkeypatch):
    recorded = private_module.clipped_sum_of

    def planted(model, loss_fn, pieces, **k):
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        return recorded(model, loss_fn, pieces, **k)

    monkeypatch.setattr(private_module, "clipped_sum_of", planted)


FAULTS = [
    the_same_noise_for_all_parameters, the_same_noise_in_all_analyses, the_same_records_in_all_steps,
    the_rate_of_the_true_number_of_records, noise_of_another_norm, analysis_noise_of_training, the_public_seed_rounds,
    one_key_for_all_steps, divided_by_the_realised_size, a_microbatch_of_the_realised_size, leftovers_are_added_to,
    a_ledger_not_marked_as_research, a_statement_without_the_analyses, an_uncharged_analysis,
    a_sum_of_frozen_parameters_too,
]  # fmt: skip


def test_a_run_keeps_its_plan_call_by_call(monkeypatch):
    assert_the_plan_was_kept(*run_whole(monkeypatch, nothing))


@pytest.mark.parametrize("plant", FAULTS, ids=lambda plant: plant.__name__)
def test_a_run_that_does_not_is_seen(monkeypatch, plant):
    with pytest.raises(AssertionError):
        assert_the_plan_was_kept(*run_whole(monkeypatch, plant))


def state_of(run):
    """All that an analysis may not touch."""
    return {
        "parameters": {name: p.detach().clone() for name, p in run.model.named_parameters()},
        "gradients": {name: p.grad for name, p in run.model.named_parameters()},
        "modes": [module.training for module in run.model.modules()],
        "precisions": [layer.precision for layer in dpquant.quantizable_layers(run.model).values()],
        "streams": (torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())),
        "optimizer": run.optimizer.state_dict()["state"],
    }


def same(one, other):
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def analysed():
    model = network()
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.05)
    run = make_private(
        model, optimizer, data_set(), loss_fn=loss, plan=the_plan(), policy=dpquant.DPQuantPolicy(fraction=0.5),
        microbatch_size=MICROBATCH,
    )  # fmt: skip
    before = state_of(run)
    epochs = run.epochs()
    next(epochs)
    return before, state_of(run), run


def test_an_analysis_touches_nothing_but_the_scores():
    before, after, run = analysed()
    assert same(before, after) and run.analyses_made == 1 and run.scores


def in_training_mode(run):
    run.model.eval()


def with_the_global_stream(run):
    torch.rand(1)


def with_a_step(run):
    with torch.no_grad():
        next(iter(run.model.parameters())).add_(1e-6)


@pytest.mark.parametrize("touch", [in_training_mode, with_the_global_stream, with_a_step])
def test_an_analysis_that_touches_the_run_is_seen(touch, monkeypatch):
    honest = PrivateTraining._score
    monkeypatch.setattr(PrivateTraining, "_score", lambda self, *a: (honest(self, *a), touch(self))[0])
    before, after, _ = analysed()
    assert not same(before, after)


def test_an_impact_that_is_not_finite_counts_nothing():
    """A record whose loss is NaN adds zero to the impacts' sum, not NaN."""
    model = dpquant.prepare(network())
    images, labels = torch.randn(4, 1, 6, 6), torch.zeros(4).long()
    images[2] = float("nan")
    arguments = {"names": ["0", "5"], "max_norm": 1.0, "step": 0, "seed": 3, "score": "gradient"}
    whole = dpquant.training.impact.impact_sum(model, loss, (images, labels), record_ids=torch.arange(4), **arguments)
    kept = torch.tensor([0, 1, 3])
    rest = dpquant.training.impact.impact_sum(model, loss, (images[kept], labels[kept]), record_ids=kept, **arguments)
    assert whole.impacts.isfinite().all() and rest.impacts.abs().sum() > 0
    torch.testing.assert_close(whole.impacts, rest.impacts)


class Coupled(nn.Module):
    """Keeps examples apart on small values, and mixes them where values are as large as the private ones."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x):
        shared = torch.where(x.abs() > 1e4, x, 0.0).mean(0)
        return self.layer(x / 1e4 + shared / 1e4)


def large_records():
    generator = torch.Generator().manual_seed(2)
    return list(zip(2e4 * torch.randn(40, 6, generator=generator), torch.randint(0, 3, (40,)), strict=True))


def coupled_run(records):
    torch.manual_seed(0)
    model = Coupled()
    plan = dpquant.PrivacyPlan(
        noise_multiplier=1.0, delta=1e-5, max_grad_norm=1.0, sample_rate=0.5, expected_batch_size=20, steps=4
    )
    return make_private(
        model, torch.optim.SGD(model.parameters(), lr=0.1), records, loss_fn=loss, plan=plan,
        policy=dpquant.NonePolicy(), microbatch_size=8,
    )  # fmt: skip


def first_step(run):
    run.step(next(iter(next(run.epochs()))))


def test_a_coupling_that_only_real_records_show_stops_the_run_in_its_first_epoch():
    run = coupled_run(large_records())
    with pytest.raises(dpquant.ModelError, match="DOES NOT HOLD"):
        first_step(run)
    assert "DOES NOT HOLD" in run.statement()
    with pytest.raises(dpquant.ModelError, match="DOES NOT HOLD"):
        next(run.epochs())


def test_without_the_probe_it_would_not_be_seen(monkeypatch):
    monkeypatch.setattr(private_module, "keeps_apart", lambda *a, **k: keeps_apart(*a, **k) or True)
    first_step(coupled_run(large_records()))


def test_records_without_large_values_are_kept_apart():
    small = [(x / 1e5, y) for x, y in large_records()]
    run = coupled_run(small)
    for epoch in run.epochs():
        for batch in epoch:
            run.step(batch)
    assert run.steps_taken == 4 and "DOES NOT HOLD" not in run.statement()
