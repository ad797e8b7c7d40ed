# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch import nn

import dpquant
from dpquant.backends.registry import reason_for
from dpquant.engine.layers import current_precisions
from dpquant.engine.passes import Objective
from dpquant.errors import FormatError, SettingError
from dpquant.formats import FULL_PRECISION, precision
from dpquant.training.execution import (
    Execution,
    ExecutionRequest,
    backend_reason,
    choose_execution,
    layers_to_exclude,
)
from dpquant.training.filling import of_analysis
from dpquant.training.tuning import ANALYSIS_MICROBATCH, HERE, Instruments
from networks import loss

FOUR = dict.fromkeys("abcd", 1.0)


ANALYSIS = dpquant.AnalysisPlan(count=1, sample_rate=0.1, expected_batch_size=8, noise_multiplier=1.0, max_norm=1.0)


def plan_of(analysis=None, steps=10):
    return dpquant.PrivacyPlan(
        noise_multiplier=1.0, delta=1e-5, max_grad_norm=1.0, sample_rate=0.1, expected_batch_size=8, steps=steps,
        analysis=analysis,
    )  # fmt: skip


def decided(
    policy,
    *,
    format="luq-fp4",
    rest="full",
    backend="simulate",
    prepared=None,
    analysis=None,
    memory=None,
    by=HERE,
    steps=10,
    groups=1,
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
        plan=plan_of(analysis, steps),
        request=ExecutionRequest(
            chosen=precision(format),
            rest=precision(rest),
            backend=backend,
            microbatch_size=None if memory else 8,
            memory=memory,
            groups=groups,
        ),
        by=by,
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


CODES = "the recipe's codes are not int8"


def assert_the_reason_is_that_of_every_precision_in_use(reason_for):
    layer, policy = dpquant.prepare(nn.Linear(16, 8), backend="simulate"), dpquant.StaticPolicy(names=("2",))
    for chosen, rest in (("fp8", "full"), ("luq-fp4", "fp8")):
        request = ExecutionRequest(chosen=precision(chosen), rest=precision(rest))
        assert backend_reason(layer, policy, request, reason_for=reason_for) == CODES


def test_the_reason_is_that_of_every_precision_in_use():
    assert_the_reason_is_that_of_every_precision_in_use(reason_for)
    policy = dpquant.StaticPolicy(names=("2",))
    assert decided(policy, backend="auto", prepared="simulate", rest="fp8").reason == CODES
    assert decided(dpquant.NonePolicy(), backend="auto", prepared="simulate", format="fp8").reason == ""


def test_a_reason_that_looks_at_the_chosen_layers_alone_would_be_seen():
    with pytest.raises(AssertionError):
        assert_the_reason_is_that_of_every_precision_in_use(
            lambda backend, used, device: reason_for(backend, used[:1], device)
        )


def test_only_auto_measures_gains():
    assert decided(dpquant.RotatePolicy(fraction=0.5), backend="simulate").gains == {}
    auto = decided(dpquant.RotatePolicy(fraction=0.5), backend="auto", steps=10_000)
    assert auto.gains.keys() == ({"1", "2"} if auto.backend == "int8" else set())


class Analyses:
    """Keeps which analyses were tried; each of their examples takes 10 MB more."""

    def __init__(self):
        self.tried = []
        self.peak = 0.0
        self.by = Instruments(
            timed=lambda works: dict.fromkeys(works, 1.0),
            memory_mib=lambda: (0.0, self.peak * 1024),
            reset_peak=lambda: (0.0, True),
            clipped_sum=lambda *_, **__: None,
            impact_sum=self.take,
        )

    def take(self, objective, pieces, *, names, score, **_):
        self.tried.append((names, score))
        self.peak = sum(piece.num_examples for piece in pieces) / 100


def test_microbatches_of_analyses_are_measured_where_memory_is_bounded_and_there_are_any():
    by_impact, analyses = dpquant.DPQuantPolicy(fraction=0.5), Analyses()
    bounded = decided(by_impact, analysis=ANALYSIS, memory=0.25, by=analyses.by)
    assert bounded.analysis_microbatch_size == of_analysis(16, 8, groups=1, device="cpu") < 16
    assert analyses.tried == [(["1"], ANALYSIS.score)] * 3  # of 4, 8 and 16 examples
    for policy, analysis, memory in (
        (by_impact, ANALYSIS, None),
        (by_impact, None, 0.25),
        (dpquant.RotatePolicy(fraction=0.5), ANALYSIS, 0.25),
    ):
        untried = Analyses()
        execution = decided(policy, analysis=analysis, memory=memory, by=untried.by)
        most = ANALYSIS_MICROBATCH if analysis is None else of_analysis(ANALYSIS_MICROBATCH, 8, groups=1, device="cpu")
        assert execution.analysis_microbatch_size == most and untried.tried == []


def test_records_in_groups_are_analysed_with_fewer_at_a_time():
    one, four = (decided(dpquant.DPQuantPolicy(fraction=0.5), analysis=ANALYSIS, groups=groups) for groups in (1, 4))
    assert four.analysis_microbatch_size < one.analysis_microbatch_size
