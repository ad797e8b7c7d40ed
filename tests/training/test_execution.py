# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch import nn

import dpquant
from dpquant.engine.layers import current_precisions
from dpquant.engine.passes import Objective
from dpquant.errors import FormatError, SettingError
from dpquant.formats import FULL_PRECISION, precision
from dpquant.training import execution as execution_module
from dpquant.training.execution import Execution, ExecutionRequest, choose_execution, layers_to_exclude
from dpquant.training.tuning import ANALYSIS_MICROBATCH
from networks import loss

FOUR = dict.fromkeys("abcd", 1.0)


ANALYSIS = dpquant.AnalysisPlan(count=1, sample_rate=0.1, expected_batch_size=8, noise_multiplier=1.0, max_norm=1.0)


def plan_of(analysis=None):
    return dpquant.PrivacyPlan(
        noise_multiplier=1.0, delta=1e-5, max_grad_norm=1.0, sample_rate=0.1, expected_batch_size=8, steps=10,
        analysis=analysis,
    )  # fmt: skip


def decided(
    policy,
    *,
    format="luq-fp4",
    rest="full",
    backend="simulate",
    prepared=None,
    microbatch_size=8,
    analysis=None,
    memory=None,
):
    torch.manual_seed(0)
    model = dpquant.prepare(
        nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Linear(8, 5)), format=format, backend=prepared or backend
    )
    execution = choose_execution(
        Objective(model, loss),
        (torch.randn(2, 1, 4, 4), torch.arange(2)),
        policy=policy,
        macs={"1": 128.0, "2": 40.0},
        plan=plan_of(analysis),
        request=ExecutionRequest(
            chosen=precision(format),
            rest=precision(rest),
            backend=backend,
            microbatch_size=None if memory else microbatch_size,
            memory=memory,
        ),
    )
    assert current_precisions(model) == {}
    return execution


def test_layers_that_gain_nothing_are_spared_where_the_policy_has_others_to_choose_from():
    policy = dpquant.RotatePolicy(fraction=0.5)
    assert layers_to_exclude(policy, FOUR, {"a": 0.9, "b": 1.1, "c": 2.0, "d": 1.5}) == ("a",)
    no_choice_left = {"a": 0.9, "b": 0.9, "c": 2.0, "d": 1.5}
    assert layers_to_exclude(policy, FOUR, no_choice_left) == ()
    assert layers_to_exclude(policy, FOUR, {}) == ()
    assert layers_to_exclude(dpquant.AllPolicy(), FOUR, {"a": 0.9}) == ()
    assert layers_to_exclude(dpquant.StaticPolicy(names=("a", "b")), FOUR, {"a": 0.9}) == ()


def test_layers_that_are_not_chosen_get_the_rest():
    execution = decided(dpquant.StaticPolicy(names=("2",)), rest="full/luq-fp4/luq-fp4")
    names = execution.precisions(["1", "2"], ["2"])
    assert names == {"1": precision("full/luq-fp4/luq-fp4"), "2": precision("luq-fp4")}
    assert decided(dpquant.NonePolicy()).precisions(["1"], []) == {"1": FULL_PRECISION}


@pytest.mark.parametrize("option", ["format", "rest"])
def test_a_precision_that_the_backend_cannot_run_is_refused(option):
    with pytest.raises(FormatError, match="int8"):
        decided(dpquant.StaticPolicy(names=("2",)), backend="int8", **{option: "fp8"})


def test_a_policy_that_names_unknown_layers_is_refused():
    with pytest.raises(SettingError, match="'body'"):
        decided(dpquant.StaticPolicy(names=("body",)))


def test_it_says_what_runs_how_and_why():
    assert str(decided(dpquant.AllPolicy())) == "backend simulate: asked for; 8 examples a backward pass"
    assert str(decided(dpquant.NonePolicy())) == "8 examples a backward pass"
    slow = Execution(
        chosen=precision("int8"), rest=FULL_PRECISION, microbatch_size=8, analysis_microbatch_size=8,
        gains={"a": 0.5, "b": 2.0}, excluded_layers=("a",), backend="int8", reason="exact on this processor",
    )  # fmt: skip
    assert str(slow).endswith("never quantized, as that takes longer: a (2.0 times)")


def test_the_reason_is_that_of_every_precision_in_use(monkeypatch):
    policy, codes = dpquant.StaticPolicy(names=("2",)), "the recipe's codes are not int8"
    assert decided(policy, backend="auto", prepared="simulate", format="fp8").reason == codes
    assert decided(policy, backend="auto", prepared="simulate", rest="fp8").reason == codes
    assert decided(dpquant.NonePolicy(), backend="auto", prepared="simulate", format="fp8").reason == ""
    honest = execution_module.reason_for  # one that looks at the chosen layers alone would be seen
    monkeypatch.setattr(execution_module, "reason_for", lambda backend, used, device: honest(backend, used[:1], device))
    assert decided(policy, backend="auto", prepared="simulate", rest="fp8").reason != codes


def test_only_auto_measures_gains():
    assert decided(dpquant.RotatePolicy(fraction=0.5), backend="simulate").gains == {}
    auto = decided(dpquant.RotatePolicy(fraction=0.5), backend="auto")
    assert auto.gains.keys() == ({"1", "2"} if auto.backend == "int8" else set())


def test_microbatches_of_analyses_are_measured_where_memory_is_bounded_and_there_are_any(monkeypatch):
    asked = []

    def largest(model, loss_fn, synthetic, names, *, score, memory):
        asked.append((names, score, memory))
        return 16

    monkeypatch.setattr(execution_module, "largest_analysis_size", largest)
    by_impact = dpquant.DPQuantPolicy(fraction=0.5)
    bounded = decided(by_impact, analysis=ANALYSIS, memory=1e3)
    assert bounded.analysis_microbatch_size == 16 and asked == [(["1"], ANALYSIS.score, 1e3)]
    for policy, analysis, memory in (
        (by_impact, ANALYSIS, None),
        (by_impact, None, 1e3),
        (dpquant.RotatePolicy(fraction=0.5), ANALYSIS, 1e3),
    ):
        assert decided(policy, analysis=analysis, memory=memory).analysis_microbatch_size == ANALYSIS_MICROBATCH
    assert len(asked) == 1
