# SPDX-License-Identifier: Apache-2.0
"""T9, T13: a whole run with recorded mechanisms: every call is held against the plan, and what comes of it too.

Each planted fault is one that left all other tests green: noise or draws that repeat, a private number in the place of
a public one, a claim that leaves something out, an analysis that touches the run.
"""

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import dpquant
from dpquant.engine.batches import microbatches
from dpquant.engine.clip import ClippedSum, step_key
from dpquant.engine.passes import Objective
from dpquant.privacy.ledger import Ledger
from dpquant.privacy.mechanism import Mechanism
from dpquant.rounding import derive_key
from dpquant.training.impact import analysis_keys, impact_sum
from dpquant.training.private import PrivateTraining
from dpquant.training.records import Records
from mechanisms import Charged, begun, finish, with_doubles
from networks import loss

RECORDS, PUBLIC_RECORDS, BATCH, STEPS, ANALYSES = 90, 100, 20, 12, 2
RATE = BATCH / PUBLIC_RECORDS  # what is public differs from what is true
MICROBATCH, ANALYSIS_RATE, ANALYSIS_BATCH = 8, 0.3, 30


class Transcript:
    """Every call of a mechanism, in order, and every sum that noise is added to."""

    def __init__(self):
        self.calls = []
        self.modes = []  # of the model, whenever losses are computed

    def add(self, what, result, **keywords):
        kept = result.clone() if isinstance(result, torch.Tensor) else result  # noise is added to in place
        self.calls.append((what, keywords, kept))
        return result

    def of_mechanism(self, mechanism):
        return with_doubles(
            mechanism,
            draw=lambda honest, *a, **k: self.add("draw", honest(*a, **k), given=a, **k),
            gaussian=lambda honest, *a, **k: self.add("noise", honest(*a, **k), given=a, **k),
            charge=lambda honest, **k: self.add("charge", honest(**k), **k),
        )

    def of_runs(transcript):
        """A kind of run whose sums are written down."""

        class Recorded(PrivateTraining):
            def _clipped_sum(self, pieces, key):
                pieces, before = list(pieces), len(transcript.modes)
                total = super()._clipped_sum(pieces, key)
                return transcript.add("sum", total, key=key, modes=set(transcript.modes[before:]), **facts(pieces))

            def _impact_sum(self, pieces, names, keys):
                pieces, before = list(pieces), len(transcript.modes)
                total = super()._impact_sum(pieces, names, keys)
                modes = set(transcript.modes[before:])
                kept = dataclasses.replace(total, impacts=total.impacts.clone())  # noise is added to them in place
                transcript.add("impacts", kept, names=names, keys=keys, modes=modes, **facts(pieces))
                return total

        return Recorded

    def of_records(transcript, records):
        """The records, with each key written down by which they are read."""

        class Read(Through):
            def microbatches(self, record_ids, size, key, taken):
                transcript.add("read", None, key=key)
                return self.inner.microbatches(record_ids, size, key, taken)

        return Read(records)

    def of(self, what, **wanted):
        return [
            (keywords, result)
            for name, keywords, result in self.calls
            if name == what and all(keywords.get(key) == value for key, value in wanted.items())
        ]


class Through:
    """Records that a subclass changes a call of."""

    def __init__(self, inner):
        self.inner = inner

    def __len__(self):
        return len(self.inner)

    def __getattr__(self, name):
        return getattr(self.inner, name)


def facts(pieces):
    """Which records the microbatches hold, and their sizes."""
    ids = [id for piece in pieces for id in piece.record_ids[: piece.num_examples].tolist()]
    return {"ids": ids, "sizes": {len(piece.record_ids) for piece in pieces}}


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


def the_plan(kind=dpquant.PrivacyPlan):
    return kind(
        noise_multiplier=1.3, delta=1e-5, max_grad_norm=0.6, sample_rate=RATE, expected_batch_size=BATCH, steps=STEPS,
        analysis=dpquant.AnalysisPlan(
            count=ANALYSES, sample_rate=ANALYSIS_RATE, expected_batch_size=ANALYSIS_BATCH, noise_multiplier=2.5,
            max_norm=0.4,
        ),
    )  # fmt: skip


@dataclasses.dataclass
class Parts:
    """What a run is made of, for a fault to change.

    Attributes:
      mechanism, run: as they are written down; what is planted outside of them is written down, too.
    """

    mechanism: Mechanism
    run: type[PrivateTraining]
    plan: dpquant.PrivacyPlan
    records: Callable[[Records], Any] = lambda records: records


def run_whole(plant):
    """A recorded run, with a fault if one is planted."""
    transcript = Transcript()

    def watched(model, batch):
        transcript.modes.append(model.training)
        return loss(model, batch)

    parts = Parts(transcript.of_mechanism(Mechanism.repeatable(11, None)), transcript.of_runs(), the_plan())
    plant(parts)

    def make_run(setup, records, *rest):
        return parts.run(setup, parts.records(transcript.of_records(records)), *rest)

    run = begun(
        network(), data_set(), loss_fn=watched, plan=parts.plan, policy=dpquant.DPQuantPolicy(fraction=0.5), lr=0.05,
        mechanism=parts.mechanism, make_run=make_run, microbatch_size=MICROBATCH, seed=5, backend="simulate",
    )  # fmt: skip
    assert not transcript.calls
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
    assert [keywords["attempt"] for keywords, _ in draws] == list(range(1, STEPS + ANALYSES + 1))
    assert len({tuple(ids.tolist()) for _, ids in draws}) == STEPS + ANALYSES
    # sums: of the records drawn, in microbatches of a size that is no count of them, under one secret and other draws
    sums, impacts = transcript.of("sum"), transcript.of("impacts")
    drawn = [ids.tolist() for keywords, ids in draws if keywords["stream"] == "train"]
    assert [keywords["ids"] for keywords, _ in sums] == drawn and len(sums) == STEPS
    assert set.union(*(keywords["sizes"] for keywords, _ in sums)) == {MICROBATCH}
    assert set.union(*(keywords["sizes"] for keywords, _ in impacts)) == {run.execution.analysis_microbatch_size}
    assert {total.sensitivity for _, total in sums} == {plan.max_grad_norm}
    assert {total.sensitivity for _, total in impacts} == {plan.analysis.max_norm}
    assert len({keywords["key"] for keywords, _ in sums}) == STEPS
    secret = Mechanism.repeatable(11, None).record_key  # not the seeds that a person chose: 11, and 5 of the schedule
    assert [keywords["key"] for keywords, _ in sums] == [step_key(secret, step) for step in range(STEPS)]
    assert [keywords["keys"] for keywords, _ in impacts] == [analysis_keys(secret, step) for step in range(ANALYSES)]
    assert len({tuple(keywords["keys"]) for keywords, _ in impacts}) == ANALYSES
    reads = {keywords["key"] for keywords, _ in transcript.of("read")}
    assert reads == {step_key(secret, step) for step in range(STEPS)} | {
        derive_key(secret, "analysis", step) for step in range(ANALYSES)
    }
    # the model trains in sums, if there is anything to sum, and is evaluated in analyses
    assert set.union(*(keywords["modes"] for keywords, _ in sums)) == {True}
    assert set.union(*(keywords["modes"] for keywords, _ in impacts)) == {False}
    assert all(set(total.grads) == set(trainable) for _, total in sums)
    # noise: for each parameter of its own shape, of the plan's size, no two alike
    noises = transcript.of("noise")
    assert len(noises) == STEPS * len(trainable) + ANALYSES
    assert len({(k["stream"], k["step"], k["attempt"], k["name"]) for k, _ in noises}) == len(noises)
    firsts = [float(noise.flatten()[0]) for _, noise in noises]
    assert len(set(firsts)) == len(firsts)
    drawn_for = {(k["stream"], k["step"], k["attempt"]) for k, _ in draws}
    assert {(k["stream"], k["step"], k["attempt"]) for k, _ in noises} == drawn_for
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
    # the scores are the noised impacts over the public batch size, smoothed
    scores = {}
    for (keywords, total), (_, noise) in zip(impacts, transcript.of("noise", stream="analysis"), strict=True):
        noised = dict(zip(keywords["names"], ((total.impacts + noise) / ANALYSIS_BATCH).tolist(), strict=True))
        scores = {name: (scores[name] + one) / 2 if scores else one for name, one in noised.items()}
    assert run.scores == pytest.approx(scores)
    # the ledger: every draw is charged as it was made, and marked as what it is; the statement says all of it
    charges = [keywords for keywords, _ in transcript.of("charge")]
    assert [c["sample_rate"] for c in charges if c["kind"] == "train"] == [RATE] * STEPS
    assert [c["noise_multiplier"] for c in charges if c["kind"] == "analysis"] == [2.5] * ANALYSES
    order = [name for name, *_ in transcript.calls if name in ("charge", "sum", "impacts")]
    kinds = [keywords["kind"] for keywords, _ in transcript.of("charge")]
    assert kinds == [*["analysis", *["train"] * 5] * 2, "train", "train"]  # five steps an epoch, two analyses in three
    assert len(charges) == STEPS + ANALYSES
    assert order[::2] == ["charge"] * len(charges) and "charge" not in order[1::2]  # each before its records are read
    assert all(charge.research for charge in run.events())
    assert run.epsilon_spent() == pytest.approx(plan.epsilon_spent()) and not run.secure
    assert f"{ANALYSES} analyses" in run.statement() and "NOT PRIVATE" in run.statement()
    assert all(np.isfinite(list(run.scores.values())))


def nothing(parts):
    """No fault."""


def the_same_noise_for_all_parameters(parts):
    parts.mechanism = with_doubles(
        parts.mechanism, gaussian=lambda recorded, *a, **k: recorded(*a, **{**k, "name": "w"})
    )


def the_same_noise_in_all_analyses(parts):
    def planted(recorded, *a, **k):
        return recorded(*a, **({**k, "step": 0, "attempt": 0} if k["stream"] == "analysis" else k))

    parts.mechanism = with_doubles(parts.mechanism, gaussian=planted)


def the_same_records_in_all_steps(parts):
    parts.mechanism = with_doubles(
        parts.mechanism, draw=lambda recorded, *a, **k: recorded(*a, **{**k, "step": 0, "attempt": 0})
    )


def the_rate_of_the_true_number_of_records(parts):
    parts.mechanism = with_doubles(parts.mechanism, draw=lambda recorded, n, q, **k: recorded(n, BATCH / n, **k))


class NoiseOfAnotherNorm(dpquant.PrivacyPlan):
    def train_noise_std(self, sensitivity):
        return self.noise_multiplier


class AnalysisNoiseOfTraining(dpquant.PrivacyPlan):
    def analysis_noise_std(self, sensitivity):
        return self.noise_multiplier * sensitivity


def noise_of_another_norm(parts):
    parts.plan = the_plan(NoiseOfAnotherNorm)


def analysis_noise_of_training(parts):
    parts.plan = the_plan(AnalysisNoiseOfTraining)


def the_public_seed_rounds(parts):
    class Planted(parts.run):
        def _impact_sum(self, pieces, names, keys):
            return super()._impact_sum(pieces, names, analysis_keys(5, self.analyses_made - 1))

    parts.run = Planted


def one_key_for_all_steps(parts):
    class Planted(parts.run):
        def _key_of(self, step):
            return 77

    parts.run = Planted


def divided_by_the_realised_size(parts):
    class Planted(parts.run):
        def _clipped_sum(self, pieces, key):
            pieces = list(pieces)
            count = sum(piece.num_examples for piece in pieces)
            total = super()._clipped_sum(pieces, key)
            return ClippedSum({n: g * BATCH / max(count, 1) for n, g in total.grads.items()}, total.sensitivity)

    parts.run = Planted


def a_microbatch_of_the_realised_size(parts):
    class Planted(Through):
        def microbatches(self, record_ids, size, key, taken):
            return self.inner.microbatches(record_ids, max(len(record_ids), 1), key, taken)

    parts.records = Planted


def leftovers_are_added_to(parts):
    class Planted(parts.run):
        def _descend(self, batch):
            before = {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}
            step, self.optimizer.step = self.optimizer.step, lambda: None
            super()._descend(batch)
            for name, parameter in self.model.named_parameters():
                if name in before:
                    parameter.grad += before[name]
            self.optimizer.step = step
            step()

    parts.run = Planted


class SaysResearch(Charged):
    """A ledger that claims to mark its charges, and does not."""

    research = True


def a_ledger_not_marked_as_research(parts):
    recorded = parts.mechanism.ledger
    ledger = SaysResearch(Ledger(research=False), recorded.change)
    parts.mechanism = dataclasses.replace(parts.mechanism, ledger=ledger)


def a_statement_without_the_analyses(parts):
    class Planted(parts.run):
        def events(self):
            return [event for event in super().events() if event.kind == "train"]

    parts.run = Planted


def an_uncharged_analysis(parts):
    parts.mechanism = with_doubles(
        parts.mechanism, charge=lambda recorded, **k: None if k["kind"] == "analysis" else recorded(**k)
    )


def a_sum_of_frozen_parameters_too(parts):
    class Planted(parts.run):
        def _clipped_sum(self, pieces, key):
            for parameter in self.model.parameters():
                parameter.requires_grad_(True)
            return super()._clipped_sum(pieces, key)

    parts.run = Planted


FAULTS = [
    the_same_noise_for_all_parameters, the_same_noise_in_all_analyses, the_same_records_in_all_steps,
    the_rate_of_the_true_number_of_records, noise_of_another_norm, analysis_noise_of_training, the_public_seed_rounds,
    one_key_for_all_steps, divided_by_the_realised_size, a_microbatch_of_the_realised_size, leftovers_are_added_to,
    a_ledger_not_marked_as_research, a_statement_without_the_analyses, an_uncharged_analysis,
    a_sum_of_frozen_parameters_too,
]  # fmt: skip


def test_a_run_keeps_its_plan_call_by_call():
    assert_the_plan_was_kept(*run_whole(nothing))


@pytest.mark.parametrize("plant", FAULTS, ids=lambda plant: plant.__name__)
def test_a_run_that_does_not_is_seen(plant):
    with pytest.raises((AssertionError, dpquant.ModelError)):  # the run itself may see it
        assert_the_plan_was_kept(*run_whole(plant))


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


def analysed(make_run=PrivateTraining):
    run = begun(
        network(), data_set(), loss_fn=loss, plan=the_plan(), policy=dpquant.DPQuantPolicy(fraction=0.5),
        make_run=make_run, microbatch_size=MICROBATCH,
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
def test_an_analysis_that_touches_the_run_is_seen(touch):
    class Touching(PrivateTraining):
        def _score(self, batch):
            super()._score(batch)
            touch(self)

    before, after, _ = analysed(Touching)
    assert not same(before, after)


def test_an_impact_that_is_not_finite_counts_nothing():
    """A record whose loss is NaN adds zero to the impacts' sum, not NaN."""
    model = dpquant.prepare(network())
    images, labels = torch.randn(4, 1, 6, 6), torch.zeros(4).long()
    images[2] = float("nan")
    arguments = {"names": ["0", "5"], "max_norm": 1.0, "keys": [3], "score": "gradient"}
    whole, rest = (
        impact_sum(Objective(model, loss), microbatches((images[ids], labels[ids]), ids, 4), **arguments)
        for ids in (torch.arange(4), torch.tensor([0, 1, 3]))
    )
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


def coupled_run(records, make_run=PrivateTraining):
    torch.manual_seed(0)
    plan = dpquant.PrivacyPlan(
        noise_multiplier=1.0, delta=1e-5, max_grad_norm=1.0, sample_rate=0.5, expected_batch_size=20, steps=4
    )
    return begun(
        Coupled(), records, loss_fn=loss, plan=plan, policy=dpquant.NonePolicy(), make_run=make_run, microbatch_size=8
    )


def first_step(run):
    run.step(next(iter(next(run.epochs()))))


def test_a_coupling_that_only_real_records_show_stops_the_run_in_its_first_epoch():
    run = coupled_run(large_records())
    with pytest.raises(dpquant.ModelError, match="DOES NOT HOLD"):
        first_step(run)
    assert "DOES NOT HOLD" in run.statement()
    with pytest.raises(dpquant.ModelError, match="DOES NOT HOLD"):
        next(run.epochs())


class Unprobed(PrivateTraining):
    def _probe(self, batch, key):
        pass


def test_without_the_probe_it_would_not_be_seen():
    first_step(coupled_run(large_records(), Unprobed))


def test_records_without_large_values_are_kept_apart():
    run = finish(coupled_run([(x / 1e5, y) for x, y in large_records()]))
    assert run.steps_taken == 4 and "DOES NOT HOLD" not in run.statement()


class Louder(PrivateTraining):
    """Sums of another sensitivity than the one for which noise is drawn."""

    def _clipped_sum(self, pieces, key):
        total = super()._clipped_sum(pieces, key)
        return dataclasses.replace(total, sensitivity=2 * total.sensitivity)


def small_run(make_run=PrivateTraining, loss_fn=loss, **settings):
    return begun(
        network(), data_set(), loss_fn=loss_fn, plan=the_plan(), policy=dpquant.NonePolicy(), make_run=make_run,
        **{"microbatch_size": MICROBATCH, **settings},
    )  # fmt: skip


def test_a_sum_of_another_sensitivity_is_not_noised():
    run = small_run(Louder)
    with pytest.raises(dpquant.ModelError, match="Expected sums of sensitivity C"):
        first_step(run)
    assert all(parameter.grad is None for parameter in run.model.parameters())


class Raises(PrivateTraining):
    def _clipped_sum(self, pieces, key):
        raise ValueError(f"secret: {next(iter(pieces)).data[0].flatten()[:3]}")


def test_an_error_in_a_step_carries_nothing_of_a_record():
    with pytest.raises(dpquant.ModelError, match="withheld") as error:
        first_step(small_run(Raises))
    assert "secret" not in str(error.value)
    assert error.value.__cause__ is None and error.value.__context__ is None


def test_the_statement_is_about_what_was_charged():
    run = small_run()
    first_step(run)
    assert "1 training steps" in run.statement() and "12 training steps" not in run.statement()


MARK = 7777.25


def marked_records():
    return [(torch.full_like(image, MARK), label) for image, label in data_set()]


def assert_reads_no_value_before_a_charge(records=marked_records):
    """No value of a private record reaches the model before a step is charged; then they do."""
    seen = []

    def watched(model, batch):
        seen.append(bool((batch[0] == MARK).any()))
        return loss(model, batch)

    run = begun(
        network(), records(), loss_fn=watched, plan=the_plan(), policy=dpquant.DPQuantPolicy(fraction=0.5)
    )  # its microbatch size is measured
    assert seen and not any(seen)
    first_step(run)
    assert any(seen)


def test_no_value_of_a_private_record_is_used_before_a_charge():
    assert_reads_no_value_before_a_charge()


def test_examples_of_another_form_than_the_records_are_refused_before_a_charge():
    model = network()
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    examples = [(image, label, torch.randn(2)) for image, label in data_set()[:3]]
    with pytest.raises(dpquant.DataError, match="Expected example to hold records as the data set does"):
        dpquant.make_private(
            model, optimizer, data_set(), loss_fn=loss, plan=the_plan(), policy=dpquant.NonePolicy(), example=examples
        )


class CoupledAtSize(nn.Module):
    """Mixes examples in batches of the run's own size alone."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(36, 5)

    def forward(self, x):
        x = x.flatten(1)
        return self.layer(x + x.mean(0) if len(x) == MICROBATCH else x)


def test_a_coupling_at_the_runs_own_size_is_refused_before_a_charge():
    arguments = {"loss_fn": loss, "plan": the_plan(), "policy": dpquant.NonePolicy()}
    with pytest.raises(dpquant.ModelError, match="batch"):
        begun(CoupledAtSize(), data_set(), **arguments, microbatch_size=MICROBATCH)
    assert begun(CoupledAtSize(), data_set(), **arguments, microbatch_size=MICROBATCH + 1).steps_taken == 0
