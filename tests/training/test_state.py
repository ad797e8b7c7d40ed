# SPDX-License-Identifier: Apache-2.0
"""What a run stands at is a value: it is written and read back as it was, and only a step makes another one."""

import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dpquant
from dpquant.errors import DataError
from dpquant.formats import FULL_PRECISION, RECIPES, NumberFormat, Recipe, RoleFormat, Rounding, precision
from dpquant.privacy.entries import NO_HASH
from dpquant.privacy.mechanism import Mechanism
from dpquant.training.execution import Execution
from dpquant.training.state import RunState
from mechanisms import begun
from networks import loss

HALF = RoleFormat(
    format=NumberFormat(name="int3", exponent_bits=0, mantissa_bits=2, min_exponent=2, max_code=3),
    rounding=Rounding.NEAREST,
    clip=0.1 + 0.2,
)
OWN = Recipe(name="luq-fp4", weight=HALF, activation=HALF, gradient=HALF)  # not what the name says elsewhere
PRECISIONS = [FULL_PRECISION, *map(precision, RECIPES), precision("full/luq/int4@2.5#,int4@4+,e3m0~"), precision(OWN)]

counts = st.integers(0, 10**6)
names = st.text(max_size=8)
numbers = st.floats(allow_nan=False)
answers = st.recursive(
    st.none() | st.booleans() | st.integers() | numbers | names,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=4,
)
executions = st.builds(
    Execution,
    chosen=st.sampled_from(PRECISIONS),
    rest=st.sampled_from(PRECISIONS),
    microbatch_size=counts,
    analysis_microbatch_size=counts,
    gains=st.dictionaries(names, numbers, max_size=3),
    excluded_layers=st.lists(names, max_size=3).map(tuple),
    backend=names,
    reason=names,
)
states = st.builds(
    RunState,
    execution=executions,
    steps_taken=counts,
    analyses_made=counts,
    draws=counts,
    scores=st.dictionaries(names, numbers, max_size=3),
    policies=st.lists(st.lists(names, max_size=3).map(tuple), max_size=3).map(tuple),
    ledger_head=names,
    choices=st.dictionaries(names, answers, max_size=3),
    broken=names,
)
SOME = RunState(
    execution=Execution(
        chosen=precision(OWN), rest=FULL_PRECISION, microbatch_size=8, analysis_microbatch_size=4, gains={"a": 1.5},
        excluded_layers=("b",), backend="int8", reason="",
    ),
    steps_taken=3, steps_lost=1, analyses_made=1, draws=5, epoch=2, scores={"a": 0.1},
    policies=(("a", "c"), ()), ledger_head="f" * 64,
    choices={"question": 64}, processes=3, broken="why",
)  # fmt: skip


def assert_written_as_it_is(state, written=RunState.to_json):
    assert RunState.from_json(written(state)) == state


@settings(max_examples=200, deadline=None, derandomize=True)
@given(states)
def test_a_state_reads_back_as_it_was_written(state):
    assert_written_as_it_is(state)


FIELDS = [field.name for field in dataclasses.fields(RunState)]


@pytest.mark.parametrize("field", [name for name in FIELDS if name != "execution"])
def test_a_field_that_is_not_kept_would_be_seen(field):
    fresh = getattr(RunState(execution=SOME.execution), field)

    def forgetful(state):
        return dataclasses.replace(state, **{field: fresh}).to_json()

    assert_written_as_it_is(SOME)
    with pytest.raises(AssertionError):
        assert_written_as_it_is(SOME, forgetful)


@pytest.mark.parametrize("field", [name for name in FIELDS if name != "processes"])
def test_a_state_without_a_field_is_refused(field):
    read = json.loads(SOME.to_json())
    with pytest.raises(DataError, match="other fields"):
        RunState.from_json(json.dumps({name: value for name, value in read.items() if name != field}))


def test_a_state_of_an_earlier_version_was_of_one_process():
    read = json.loads(SOME.to_json())
    del read["processes"]
    assert RunState.from_json(json.dumps(read)) == dataclasses.replace(SOME, processes=1)


def test_a_recipe_that_is_written_by_its_name_alone_would_be_seen():
    def by_name(state):
        execution = dataclasses.replace(state.execution, chosen=precision(state.execution.chosen.name))
        return dataclasses.replace(state, execution=execution).to_json()

    with pytest.raises(AssertionError):
        assert_written_as_it_is(SOME, by_name)


@pytest.mark.parametrize(
    "text", ["", "3", "[]", "{}", '{"format": 1}', SOME.to_json().replace('"format": 1', '"format": 2', 1),
             SOME.to_json().replace('"draws"', '"drawn"'), SOME.to_json().replace('"nearest"', '"up"'),
             SOME.to_json()[:-9]],
)  # fmt: skip
def test_what_is_no_state_is_refused(text):
    with pytest.raises(DataError, match="state of a run, format 1"):
        RunState.from_json(text)


# The state of a run.

RECORDS, STEPS = 40, 8  # 4 steps an epoch


def a_run():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    records = list(zip(torch.randn(RECORDS, 6), torch.randint(0, 3, (RECORDS,)), strict=True))
    analysis = dpquant.AnalysisPlan(
        count=2, sample_rate=0.5, expected_batch_size=20, noise_multiplier=2.0, max_norm=0.5
    )
    plan = dpquant.PrivacyPlan(
        noise_multiplier=1.0, delta=1e-5, max_grad_norm=1.0, sample_rate=0.25, expected_batch_size=10, steps=STEPS,
        analysis=analysis,
    )  # fmt: skip
    mechanism = Mechanism.secret(None)
    run = begun(
        model, records, loss_fn=loss, plan=plan, policy=dpquant.DPQuantPolicy(fraction=0.5), mechanism=mechanism,
        microbatch_size=8, backend="simulate",
    )  # fmt: skip
    return run, mechanism


def test_a_state_says_where_its_run_stands_and_stays_as_it_is():
    run, mechanism = a_run()
    new = run.state
    assert new == RunState(execution=run.execution, choices=run.choices.made) and new.ledger_head == NO_HASH
    stood = []
    for epoch in run.epochs():
        for batch in epoch:
            run.step(batch)
            stood.append(run.state)
    assert new == RunState(execution=run.execution, choices=new.choices)
    assert [state.steps_taken for state in stood] == list(range(1, STEPS + 1))
    assert [state.draws for state in stood] == [2, 3, 4, 5, 7, 8, 9, 10]  # an analysis draws, too
    assert [state.analyses_made for state in stood] == [1] * 4 + [2] * 4
    assert len({state.ledger_head for state in stood}) == STEPS
    last = stood[-1]
    assert last.ledger_head == mechanism.ledger.head and last.choices == run.choices.made
    assert list(last.policies) == run.policies() and dict(last.scores) == run.scores and len(last.scores) == 2
    assert (last.steps_taken, last.analyses_made) == (run.steps_taken, run.analyses_made)
    assert_written_as_it_is(last)


def test_no_key_is_in_a_state():
    run, mechanism = a_run()
    next(run.epochs())
    assert str(mechanism.record_key) not in run.state.to_json()
