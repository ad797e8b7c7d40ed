# SPDX-License-Identifier: Apache-2.0
"""A plan spends what it promises, checks every setting before data is touched, and says what it does not cover."""

import dataclasses
import json
import math
import re
import warnings

import dp_accounting
import numpy as np
import pytest
import torch

from dpquant.errors import SettingError
from dpquant.privacy.accounting import epsilon
from dpquant.privacy.analysis_plan import AnalysisPlan
from dpquant.privacy.events import Event
from dpquant.privacy.plan import PrivacyPlan, rounded_up

ANALYSIS = {"count": 3, "sample_rate": 0.05, "expected_batch_size": 100, "noise_multiplier": 2.0, "max_norm": 1.0}
SETTINGS = {
    "epsilon": 4.0,
    "delta": 1e-5,
    "max_grad_norm": 1.0,
    "sample_rate": 0.05,
    "expected_batch_size": 100,
    "steps": 100,
    "analysis": AnalysisPlan(**ANALYSIS),
}


def plan(**changes) -> PrivacyPlan:
    return PrivacyPlan(**{**SETTINGS, **changes})


def composed(events) -> float:
    """Epsilon as a reader of the events would compute it."""
    accountant = dp_accounting.pld.PLDAccountant(value_discretization_interval=1e-3)
    for e in events:
        release = dp_accounting.PoissonSampledDpEvent(e.sample_rate, dp_accounting.GaussianDpEvent(e.noise_multiplier))
        accountant.compose(dp_accounting.SelfComposedDpEvent(release, e.count))
    return float(accountant.get_epsilon(1e-5))


def assert_training_and_analysis_together_meet_the_target(a_plan: PrivacyPlan) -> None:
    counts = {event.kind: event.count for event in a_plan.events()}
    assert counts == {"train": 100, "analysis": 3}
    assert 3.99 <= composed(a_plan.events()) <= 4.0 + 1e-9
    assert a_plan.epsilon_spent() == pytest.approx(composed(a_plan.events()), abs=1e-6)
    assert a_plan.epsilon_spent() <= a_plan.epsilon == 4.0


def test_training_and_analysis_together_meet_the_target():
    assert_training_and_analysis_together_meet_the_target(plan())


def test_calibrating_for_training_alone_would_be_seen():
    costly = AnalysisPlan(**{**ANALYSIS, "noise_multiplier": 1.0})
    planted = plan(analysis=costly)
    object.__setattr__(planted, "noise_multiplier", plan(analysis=None).noise_multiplier)
    with pytest.raises(AssertionError):
        assert_training_and_analysis_together_meet_the_target(planted)


def test_forgetting_the_analysis_event_would_be_seen():
    with pytest.raises(AssertionError):
        assert_training_and_analysis_together_meet_the_target(plan(analysis=None))


def test_given_the_noise_epsilon_follows():
    given = plan(epsilon=None, noise_multiplier=1.3)
    assert given.noise_multiplier == 1.3
    assert given.epsilon == given.epsilon_spent() == pytest.approx(composed(given.events()), abs=1e-6)
    assert plan(epsilon=None, noise_multiplier=1e6, analysis=None).epsilon < 1e-2


def test_epsilon_grows_with_what_was_done():
    spent = [plan().epsilon_spent(steps=s, analyses=a) for s, a in ((0, 0), (0, 1), (1, 1), (50, 2), (100, 3))]
    assert spent[0] == 0
    assert spent == sorted(set(spent))
    assert spent[-1] == plan().epsilon_spent()
    ten_steps = dataclasses.replace(plan().events()[0], count=10)
    assert plan().epsilon_spent(steps=10, analyses=0) == epsilon([ten_steps], 1e-5)


def test_the_share_of_the_analysis_is_what_would_be_saved_without_it():
    a_plan = plan()
    expected = 1 - composed(a_plan.events()[:1]) / composed(a_plan.events())
    assert a_plan.analysis_share() == pytest.approx(expected, abs=1e-6)
    assert 0 < a_plan.analysis_share() < 0.03
    assert plan(analysis=None).analysis_share() == 0


def test_epochs_come_from_the_sample_rate():
    given = {"epsilon": None, "noise_multiplier": 2.0, "analysis": None}
    assert (plan().epoch_steps, plan().epochs) == (20, 5)
    assert (plan(**given, steps=101).epochs, plan(**given, steps=1).epochs) == (6, 1)
    assert plan(**given, sample_rate=0.9).epoch_steps == 1
    assert plan(**given, sample_rate=1024 / 60_000, steps=1172).epochs == 20


@pytest.mark.parametrize(("count", "expected"), [(0, ()), (1, (0,)), (2, (0, 2)), (3, (0, 1, 3)), (5, (0, 1, 2, 3, 4))])
def test_analyses_are_spread_evenly_and_the_first_precedes_every_step(count, expected):
    a_plan = plan(analysis=AnalysisPlan(**{**ANALYSIS, "count": count}))
    assert a_plan.analysis_epochs() == expected
    assert sum(e.count for e in a_plan.events() if e.kind == "analysis") == count


def test_noise_is_the_multiplier_times_the_sensitivity():
    assert plan().train_noise_std(0.5) == 0.5 * plan().noise_multiplier
    assert plan().analysis_noise_std(0.5) == 1.0
    with pytest.raises(SettingError, match="analysis=None"):
        plan(analysis=None).analysis_noise_std(1.0)


BAD = [
    *[("epsilon", value) for value in (-1.0, 0.0, math.nan, math.inf, True, "4", 1001)],
    *[("delta", value) for value in (0.0, 1.0, -1e-5, math.nan, 1e-20, False)],
    *[("max_grad_norm", value) for value in (0.0, -1.0, math.nan, math.inf, True, None)],
    *[("sample_rate", value) for value in (0.0, 1.5, -0.1, math.nan, True)],
    *[("expected_batch_size", value) for value in (0, -1, math.nan, math.inf, True, 10**400)],
    *[("steps", value) for value in (0, -1, 10.0, math.nan, True, 10**400, torch.tensor([100]))],
]
BAD_ANALYSIS = [
    *[("count", value) for value in (-1, 1.5, True)],
    *[("sample_rate", value) for value in (0.0, 2.0, math.nan)],
    *[("expected_batch_size", value) for value in (0, math.inf)],
    *[("noise_multiplier", value) for value in (0.0, -2.0, math.nan, 1e308)],
    *[("max_norm", value) for value in (0.0, math.nan)],
    *[("repeats", value) for value in (0, 1.0)],
]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_settings_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(SettingError, match=rf"Expected {name} .*got {name}="):
        plan(**{name: value})


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf, 1e308, True])
def test_noise_out_of_range_is_refused(value):
    with pytest.raises(SettingError, match=r"Expected noise_multiplier "):
        plan(epsilon=None, noise_multiplier=value)


@pytest.mark.parametrize(("name", "value"), BAD_ANALYSIS)
def test_settings_of_the_analysis_are_refused_by_name(name, value):
    with pytest.raises(SettingError, match=rf"Expected analysis\.{name} "):
        AnalysisPlan(**{**ANALYSIS, name: value})


def test_epsilon_and_noise_exclude_each_other():
    for changes in ({"noise_multiplier": 1.0}, {"epsilon": None}):
        with pytest.raises(SettingError, match="exactly one of epsilon and noise_multiplier"):
            plan(**changes)


def test_an_epsilon_below_the_price_of_the_analysis_is_refused_before_anything_runs():
    with pytest.raises(SettingError, match=r"Expected epsilon > 0\.249.*analysis alone costs; got epsilon=0.01"):
        plan(epsilon=0.01)
    assert plan(epsilon=0.01, analysis=None).epsilon_spent() <= 0.01


def test_more_analyses_than_epochs_and_other_things_than_plans_are_refused():
    with pytest.raises(SettingError, match=r"analysis\.count <= 5.*analysis\.count=6"):
        plan(analysis=AnalysisPlan(**{**ANALYSIS, "count": 6}))
    with pytest.raises(SettingError, match="AnalysisPlan or None; got a dict"):
        plan(analysis=ANALYSIS)
    with pytest.raises(SettingError, match="analyses=1"):
        plan(analysis=None).epsilon_spent(analyses=1)


def test_a_large_delta_is_warned_about_and_a_usual_one_is_not():
    with pytest.warns(UserWarning, match=r"delta=0\.02 is large.*far below 1 / records"):
        plan(delta=0.02)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan()


def test_an_unknown_score_is_refused():
    with pytest.raises(SettingError, match=r"analysis.score to be one of loss, gradient; got score='norm'"):
        AnalysisPlan(**{**ANALYSIS, "score": "norm"})


def test_numbers_of_numpy_and_torch_are_numbers():
    a_plan = plan(
        epsilon=np.float64(4.0),
        delta=torch.tensor(1e-5, dtype=torch.float64),
        steps=np.int64(100),
        sample_rate=np.array(0.05),
    )
    assert a_plan == plan()
    assert [type(getattr(a_plan, name)) for name in ("epsilon", "delta", "steps", "sample_rate")] == [
        float,
        float,
        int,
        float,
    ]


def test_plans_are_values_and_cannot_be_changed():
    assert plan() == plan() and hash(plan()) == hash(plan()) and plan() != plan(steps=99)
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan().steps = 10
    assert dataclasses.replace(plan(), noise_multiplier=None, steps=99) == plan(steps=99)


def test_the_table_holds_the_budget():
    rows = dict(plan().table())
    assert rows["steps"] == "100 (5 epochs of 20)"
    assert rows["noise multiplier"] == f"{plan().noise_multiplier:.4f}"
    assert float(rows["epsilon (PLD)"]) == 4.0 < float(rows["epsilon (RDP, as a check)"]) < 5.0
    assert rows["delta"] == "1e-05"
    assert rows["analyses"] == "3" and rows["analysis share of epsilon"].endswith("%")
    assert "analyses" not in dict(plan(analysis=None).table())


def assert_statement_says_it_all(text: str) -> None:
    for words in (
        "epsilon = 4.0000",
        "delta = 1e-05",
        "added or removed",
        "unit of protection is one record",
        "Poisson",
        "dp_accounting 0.",
        "grid of 0.001",
        "Renyi",
        "need not be the true ones",
        "shapes and types of a record",
        "list of classes",
        "The true number of records is not public",
        "`seed`) only initialises",
        "Sampling, noise, rounding, dropout and random augmentation follow from a secret key",
        "hyper-parameter tuning",
        "pre-processing",
        "floating-point",
        "timing",
        "knows all other records",
        "every intermediate state",
        "In risk: an attacker",
        "test set",
        "AES-128",
    ):
        assert words in text, words
    assert "data set's size" not in text, "that size is private"


def test_the_statement_names_what_is_promised_and_what_is_not():
    assert_statement_says_it_all(plan().statement())
    assert "100 training steps" in plan().statement() and "3 analyses" in plan().statement()


@pytest.mark.parametrize(
    ("words", "planted"),
    [
        ("delta = 1e-05", ""),
        ("the list of classes", "the data set's size and its list of classes"),
        ("follow from a secret key", "follow from `seed`"),
    ],
)
def test_a_statement_that_says_less_or_gives_away_the_size_would_be_seen(words, planted):
    assert words in plan().statement()
    with pytest.raises(AssertionError):
        assert_statement_says_it_all(plan().statement().replace(words, planted))


# Another rate, other noise and another number of steps than the plan's: what a ledger may hold.
CHARGED = [
    Event(kind="train", sample_rate=0.02, noise_multiplier=0.9, count=7),
    Event(kind="analysis", sample_rate=0.03, noise_multiplier=3.0, count=2),
]


def test_a_plan_for_persons_with_several_records_says_so():
    person = plan(records_per_person=3)
    assert person.epsilon_per_person() > 2 * person.epsilon == 2 * plan().epsilon
    assert f"up to 3 records, all of them added or removed: epsilon = {rounded_up(person.epsilon_per_person(), 2)}" in (
        person.statement()
    )
    assert "a person with more than 3 records" in person.statement()
    assert "several records of one person" in plan().statement() and "up to" not in plan().statement()
    assert person.meaning_table()[-1] == (
        "epsilon of a person with up to 3 records", rounded_up(person.epsilon_per_person(), 2)
    )  # fmt: skip
    with pytest.raises(SettingError, match="records_per_person to be a whole number"):
        plan(records_per_person=0)


def test_of_several_processes_the_statement_says_what_is_trusted():
    """The machines and the network between them; not of one process, which has none."""
    several, apart = plan().statement(processes=3), plan().statement(processes=3, records_apart=True)
    for text in (several, apart):
        assert_statement_says_it_all(text)
        assert "had 3 processes" in text and "the network between them are trusted" in text
    assert "read records of its own" in apart and "records of its own" not in several
    assert "trusted" not in plan().statement() and "processes" not in plan().statement(records_apart=True)


def assert_statement_is_about(events, text: str) -> None:
    stated = float(re.search(r"epsilon = ([\d.]+) and", text)[1])
    spent = epsilon(events, 1e-5)
    assert spent <= stated <= spent + 1e-4
    for event, what in zip(events, ("training steps", "analyses"), strict=True):
        assert f"{event.count} {what}" in text
        assert f"noise multiplier {event.noise_multiplier:.4f}, sample rate {event.sample_rate:g}" in text


def test_the_statement_is_about_the_events_it_is_given_and_rounds_up():
    assert_statement_is_about(CHARGED, plan().statement(events=CHARGED))
    assert_statement_is_about(plan().events(), plan().statement())
    assert "epsilon = 0.0000" in plan().statement(events=[]) and "nothing was released" in plan().statement(events=[])
    assert "2 analyses, noise" in plan(analysis=None).statement(events=CHARGED)


@pytest.mark.parametrize(
    "change", [{"noise_multiplier": 0.91}, {"sample_rate": 0.021}, {"count": 8}], ids=["noise", "rate", "count"]
)
def test_a_statement_about_other_events_would_be_seen(change):
    planted = [dataclasses.replace(CHARGED[0], **change), CHARGED[1]]
    with pytest.raises(AssertionError):
        assert_statement_is_about(CHARGED, plan().statement(events=planted))


def test_a_statement_about_the_plan_in_place_of_the_ledger_would_be_seen():
    with pytest.raises(AssertionError):
        assert_statement_is_about(CHARGED, plan().statement())


def assert_rounds_up(written) -> None:
    for value in (0.0, 1e-9, 1.23450001, 1.2345, 7.99995, 8.0):
        assert value <= float(written(value)) <= value + 1e-4
        assert re.fullmatch(r"\d+\.\d{4}", written(value))


def test_a_printed_epsilon_is_never_less_than_the_number():
    assert_rounds_up(rounded_up)
    assert rounded_up(1.231, 2) == "1.24" and rounded_up(math.inf) == "infinity"


def test_rounding_to_the_nearest_would_be_seen():
    with pytest.raises(AssertionError):
        assert_rounds_up(lambda value: f"{value:.4f}")


def assert_json_has_typed_numbers(text: str, a_plan: PrivacyPlan) -> None:
    read = json.loads(text)
    assert set(read) == {
        "epsilon", "delta", "noise_multiplier", "sample_rate", "expected_batch_size", "steps", "epochs",
        "max_grad_norm", "analysis", "analysis_share", "noise", "records_per_person", "epsilon_per_person", "meaning",
    }  # fmt: skip
    assert read.pop("analysis") == dataclasses.asdict(a_plan.analysis)
    assert read.pop("noise") == a_plan.noise
    meaning = read.pop("meaning")
    assert meaning["mu"] == a_plan.meaning().mu and len(meaning["attacks"]) == 3
    assert read.pop("epsilon_per_person") is a_plan.epsilon_per_person() is read.pop("records_per_person") is None
    assert {type(value) for value in read.values()} == {float, int}
    assert read.pop("epsilon") == a_plan.epsilon_spent() and read.pop("analysis_share") == a_plan.analysis_share()
    assert read == {name: getattr(a_plan, name) for name in read}


def test_the_json_holds_numbers():
    assert_json_has_typed_numbers(plan().to_json(), plan())
    assert json.loads(plan(analysis=None).to_json())["analysis"] is None


@pytest.mark.parametrize(
    ("number", "planted"), [('"delta": 1e-05', '"delta": "1e-05"'), ('"steps": 100', '"steps": 99')]
)
def test_json_with_words_or_with_other_numbers_would_be_seen(number, planted):
    assert number in plan().to_json()
    with pytest.raises(AssertionError):
        assert_json_has_typed_numbers(plan().to_json().replace(number, planted), plan())


class Boundless(PrivacyPlan):
    def epsilon_spent(self, **counts):
        return math.inf

    def events(self):
        return [dataclasses.replace(event, noise_multiplier=0.0) for event in super().events()]


def test_a_number_that_is_not_finite_is_null_in_json():
    read = json.loads(Boundless(**SETTINGS).to_json(), parse_constant=pytest.fail)
    assert read["epsilon"] is None and read["analysis_share"] is None


def test_seeded_randomness_is_called_not_private():
    assert plan().statement(secure=False).startswith("NOT PRIVATE")
    assert "NOT PRIVATE" not in plan().statement()


# A plan by epochs, as one has it in mind.


def test_a_plan_by_epochs_is_the_one_that_its_numbers_make():
    found = PrivacyPlan.for_epochs(records=60_000, batch_size=1024, epochs=20, epsilon=8.0, delta=1e-5)
    written = PrivacyPlan(
        epsilon=8.0, delta=1e-5, max_grad_norm=1.0, sample_rate=1024 / 60_000, expected_batch_size=1024, steps=1180,
        analysis=AnalysisPlan(
            count=20, sample_rate=64 / 60_000, expected_batch_size=64, noise_multiplier=1.0, max_norm=1.0
        ),
    )  # fmt: skip
    assert found == written and found.epochs == 20
    without = PrivacyPlan.for_epochs(
        records=60_000, batch_size=1024, epochs=20, epsilon=8.0, delta=1e-5, analysis=False
    )
    assert without.analysis is None and without.noise_multiplier < found.noise_multiplier


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"records": 0}, "records"),
        ({"records": 1e3}, "records"),
        ({"records": 100}, "batch_size of at most 100"),
        ({"batch_size": 0}, "expected_batch_size"),
        ({"epochs": 0}, "epochs"),
        ({"epochs": 2.5}, "epochs"),
        ({"epsilon": -1.0}, "epsilon"),
    ],
)
def test_a_plan_by_epochs_refuses_what_makes_none(given, words):
    usual = {"records": 60_000, "batch_size": 1024, "epochs": 2, "epsilon": 8.0, "delta": 1e-5}
    with pytest.raises(SettingError, match=words):
        PrivacyPlan.for_epochs(**{**usual, **given})
