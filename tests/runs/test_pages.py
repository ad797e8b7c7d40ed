# SPDX-License-Identifier: Apache-2.0
"""A report says what the record says, whatever stands in it, loads nothing, and stays small."""

import dataclasses
import html
import json
import re
from pathlib import Path

import markupsafe
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpquant.privacy.meaning import Attack, Details, Meaning, Person
from dpquant.privacy.plan import rounded_up
from dpquant.runs.description import ModelDescription, Normalisation
from dpquant.runs.evaluated import UNPROTECTED, Bin, ClassResult, Evaluation, Protected, Ranking
from dpquant.runs.pages import charts
from dpquant.runs.pages.answers import ASSUMPTIONS, answers
from dpquant.runs.pages.comparison import comparison
from dpquant.runs.pages.facts import Check, Facts, Named
from dpquant.runs.pages.report import report
from dpquant.runs.pages.texts import TODO, model_card, registry_draft
from dpquant.runs.record import SCHEMA, EpochRecord, LayerRecord, RunRecord

ROOT = Path(__file__).parents[2]
FIXTURES = Path(__file__).parent / "fixtures"
RECORD = RunRecord.read(FIXTURES / f"record-{SCHEMA}.json")
MEANING = Meaning(
    attacks=tuple(
        Attack(false_positive_rate=rate, true_positive_rate=hit, from_epsilon_alone=1.0)
        for rate, hit in ((0.001, 0.0731), (0.01, 0.2214), (0.1, 0.5727))
    ),
    even_odds=0.7609,
    mu=1.839,
)
DETAILS = Details(
    persons=tuple(Person(records=k, epsilon=e) for k, e in ((1, 7.99999), (2, 19.28), (5, 68.3301), (10, 195.18))),
    epsilons={1e-4: 7.99999, 1e-5: 9.4023},
)


def facts(record=RECORD, **changes):
    given = {
        "name": "run", "record": record, "record_sha256": "ab" * 32,
        "events": None if record.ledger is None else record.ledger.events,
        "checks": [Check(what="epsilon", holds=True, detail="8")], "meaning": MEANING, "details": DETAILS,
        "description": None, "settings": "lr = 0.2\n", "redacted": False, **changes,
    }  # fmt: skip
    return Facts(**given)


def text_of(page):
    """The text of a page as a reader sees it."""
    body = re.sub(r"<(script|style)[^>]*>.*?</\1>", " ", page, flags=re.S)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", body)).split())


def assert_says_what_the_record_says(page, record):
    text = text_of(page)
    for number in (
        f"differential privacy with epsilon = {rounded_up(record.epsilon)} and delta = {record.delta:g}",
        f"test accuracy {100 * record.accuracy_test:.1f} %",
        f"sampling rate q {record.sample_rate:.6g}",
        f"noise over sensitivity {record.noise_multiplier:.6g}",
        f"clipping norm, the sensitivity {record.max_grad_norm:g}",
        f"second opinion (Renyi) {rounded_up(record.epsilon_rdp)}",
        f"Hash of the last line: {record.ledger.head}",
        f"model, SHA-256 {record.model_sha256}",
        f"run {record.provenance.run_id}",
        f"begun {record.provenance.started}",
        f"torch {record.torch}",
        "1 % 22.2 % 100.0 %",
        "10 % 57.3 %",
        "0.1 % 7.4 %",
        "at most 76.1 %",
        "mu = 1.84",
        "2 19.28 5 68.34 10 195.18",
        "1e-05 9.4023",
        "1,442",
        record.declared["curator"],
    ):
        assert number in text, number
    for epoch in record.per_epoch:
        assert f"{epoch.index + 1} {100 * epoch.accuracy_test:.1f} % {rounded_up(epoch.epsilon)}" in text
    for layer in record.layers:
        assert f"{layer.name} {layer.macs / 1e6:.3f} {layer.times_quantized}" in text


def test_a_report_says_what_the_record_says():
    assert_says_what_the_record_says(report(facts()), RECORD)


@pytest.mark.parametrize("change", [{"epsilon": 7.1}, {"accuracy_test": 0.8}, {"noise_multiplier": 0.7}])
def test_a_report_of_other_numbers_would_be_seen(change):
    with pytest.raises(AssertionError):
        assert_says_what_the_record_says(report(facts(dataclasses.replace(RECORD, **change))), RECORD)


def test_a_report_says_what_was_noticed_and_an_alarm_once():
    last, best = RECORD.per_epoch[-1], dataclasses.replace(RECORD.per_epoch[0], accuracy_test=0.99)
    fallen = dataclasses.replace(RECORD, per_epoch=[best, dataclasses.replace(last, accuracy_test=0.8)])
    assert "Noticed" in text_of(report(facts(fallen))) and "Test accuracy fell by 19.0 points" in text_of(
        report(facts(fallen))
    )
    unsafe = text_of(report(facts(dataclasses.replace(RECORD, unsafe_metrics=True))))
    assert unsafe.count("Training accuracy was measured on private records and written down.") == 1


def assert_answers_all(page):
    """Every question stands on the page with a link to a section that is there."""
    rows = re.findall(r'<tr id="q(\d+)"><td[^>]*><a href="#([\w-]+)"', page)
    assert [int(number) for number, _ in rows] == list(range(1, 25))
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert {section for _, section in rows} <= set(ids) and len(ids) == len(set(ids))
    assert all(f"#{ref}" in page and ref in ids for ref in re.findall(r'href="#([^"]+)"', page))


def test_the_24_questions_are_answered_and_lead_somewhere():
    for record in (RECORD, RunRecord.read(FIXTURES / "record-1.json")):
        assert_answers_all(report(facts(record, events=None)))
        assert_answers_all(report(facts(record, meaning=None, details=None)))


def test_a_question_less_or_a_link_to_nowhere_would_be_seen():
    page = report(facts())
    for planted in (page.replace('id="q7"', 'id="q77"'), page.replace('id="uncovered"', 'id="x"')):
        with pytest.raises(AssertionError):
            assert_answers_all(planted)


@pytest.mark.parametrize("schema", range(1, SCHEMA + 1))
def test_a_record_of_every_schema_renders_for_ever(schema):
    record = RunRecord.read(FIXTURES / f"record-{schema}.json")
    text = text_of(report(facts(record)))
    assert rounded_up(record.epsilon) in text and ("not recorded by this version" in text) == (schema < 4)


def assert_loads_nothing(page):
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
    assert policy in page
    assert not re.search(r"(src|href|action|data|poster)\s*=\s*[\"'](?!#)", page.replace('data-value="', ""))
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest|https?://", page)


HOSTILE = "<img src=x onerror=alert(1)>\"'&</script><script>alert(2)</script>" + "x" * 200


def hostile():
    epochs = [dataclasses.replace(one, layers_quantized=[HOSTILE], scores={HOSTILE: 0.1}) for one in RECORD.per_epoch]
    layers = [dataclasses.replace(RECORD.layers[0], name=HOSTILE)]
    texts = dict.fromkeys(
        ("model", "dataset", "command", "policy", "format", "execution", "device", "backend"), HOSTILE
    )
    declared = dict.fromkeys(("curator", "justification", "tuning"), HOSTILE)
    record = dataclasses.replace(RECORD, per_epoch=epochs, layers=layers, declared=declared, **texts)
    description = ModelDescription(
        model=HOSTILE, width=1.0, fix=False, parameters=3, num_classes=1, class_names=[HOSTILE], input_shape=[3],
        image_size=None, normalisation=Normalisation(mean=0.5, std=0.5),
    )  # fmt: skip
    checks = [Check(what="epsilon", holds=False, detail=HOSTILE)]
    return facts(record, name=HOSTILE, description=description, checks=checks, settings=HOSTILE)


def assert_is_inert(page):
    assert "<img" not in page and "alert(2)</script>" not in page.replace("&lt;", "") and "<script>alert" not in page
    assert page.count("</script>") == page.count("<script")
    for block in re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', page, flags=re.S):
        json.loads(block)


def evaluation(classes=3, **changes):
    """An evaluation of a classification with as many classes."""
    counts = [
        [(7 * row + 3 * column) % 5 + 20 * (row == column) for column in range(classes)] for row in range(classes)
    ]
    named = [
        ClassResult(name=f"class {number}", support=sum(row), precision=0.8125, recall=row[number] / sum(row))
        for number, row in enumerate(counts)
    ]
    given = {
        "data": "digits", "task": "classification", "model_sha256": "ab" * 32, "statement": UNPROTECTED,
        "records": 1234, "unreadable": 2, "accuracy": 0.8765, "accuracy_low": 0.8543, "accuracy_high": 0.8999,
        "classes": named, "confusion": counts, **changes,
    }  # fmt: skip
    return Evaluation(**given)


RANKING = Ranking(
    average_precision=0.6123, roc_auc=0.9345, recall_at_1_percent_fpr=0.4321, calibration_error=0.0456,
    calibration=[Bin(count=77, predicted=0.125, observed=0.25)],
)  # fmt: skip
PROTECTED = Protected(
    accuracy=0.8125, epsilon=0.5, records=1600, half_width=0.0042, releases=3, epsilon_together=1.5
)  # fmt: skip
EVALUATIONS = {
    "three classes": (evaluation(), ("87.65 %", "85.43 % to 89.99 %", "1,234", "2 cannot be read", "class 2 81.2 %")),
    "two classes": (evaluation(2, ranking=RANKING), ("0.6123", "0.9345", "0.4321", "0.0456", "12.5 % 25.0 % 77")),
    "numbers": (
        Evaluation(
            data="t", task="regression", model_sha256="", statement=UNPROTECTED, records=9, unreadable=0,
            errors={"mean_absolute_error": 12.345},
        ),
        ("mean absolute error 12.35", "9 records"),
    ),
    "a release": (
        Evaluation(data="t", task="classification", model_sha256="", statement="a promise", protected=PROTECTED),
        ("81.2 %", "1,600", "Epsilon = 0.5000", "3 releases together: epsilon = 1.5000", "0.42 %", "a promise"),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("found", "said"), EVALUATIONS.values(), ids=EVALUATIONS)
def test_an_evaluation_stands_under_its_heading(found, said):
    page = report(facts(evaluation=found))
    text = text_of(page.split('id="evaluation"')[1])
    assert all(words in text for words in said), [words for words in said if words not in text]
    assert (UNPROTECTED in text_of(page)) == (found.protected is None)
    assert 'id="evaluation"' not in report(facts())
    assert_loads_nothing(page)
    assert_answers_all(page)


def test_an_evaluation_of_many_classes_is_small_and_hostile_names_do_nothing():
    assert len(report(facts(large(), evaluation=evaluation(100))).encode()) <= 300_000
    found = evaluation()
    named = [dataclasses.replace(one, name=HOSTILE) for one in found.classes]
    page = report(facts(evaluation=dataclasses.replace(found, classes=named, data=HOSTILE, statement=HOSTILE)))
    assert_is_inert(page)
    assert_loads_nothing(page.replace(html.escape(HOSTILE), "").replace(str(charts.escape(HOSTILE)), ""))


def test_the_report_of_a_regression_shows_its_error_for_an_accuracy():
    epochs = [
        dataclasses.replace(one, accuracy_test=None, metrics_test={"mean_absolute_error": 3.25 - one.index})
        for one in RECORD.per_epoch[:2]
    ]
    record = dataclasses.replace(
        RECORD, per_epoch=epochs, accuracy_test=None, metrics_test={"mean_absolute_error": 2.25}
    )
    text = text_of(report(facts(record)))
    assert "test mean absolute error 2.25" in text and "1 3.25" in text
    assert "metrics:\n- mean_absolute_error\n" in model_card(facts(record))
    assert "2.25" in model_card(facts(record)) and "2.25" in registry_draft(facts(record))
    assert "2.25 (test mean absolute error)" in text_of(comparison([facts(record), facts()], together=""))


def test_a_run_that_lost_epochs_has_a_report_of_the_others():
    """A resumed run may begin with a later epoch: those before were charged and lost."""
    one = dataclasses.replace(RECORD.per_epoch[-1], index=3, accuracy_test=0.5)
    last = dataclasses.replace(one, index=5, accuracy_test=RECORD.accuracy_test)
    record = dataclasses.replace(RECORD, per_epoch=[one, last])
    text = text_of(report(facts(record)))
    assert "4 50.0 %" in text and f"6 {100 * RECORD.accuracy_test:.1f} %" in text
    assert "50.0 %" in comparison([facts(record), facts()], together="") and model_card(facts(record))


def test_the_report_of_rare_positives_shows_the_average_precision_for_an_accuracy():
    """A model that always says no has the accuracy, which the first page would have somebody sign."""
    shares = {one.index: {"accuracy": 0.98, "average_precision": 0.125 + one.index / 8} for one in RECORD.per_epoch}
    epochs = [dataclasses.replace(one, metrics_test=shares[one.index]) for one in RECORD.per_epoch]
    last = shares[epochs[-1].index]
    page = report(facts(dataclasses.replace(RECORD, per_epoch=epochs, metrics_test=last)))
    assert "test average precision" in page and f"{last['average_precision']:.4g}" in page
    assert "test accuracy" not in text_of(page).partition("Signed")[0]
    card = model_card(facts(dataclasses.replace(RECORD, per_epoch=epochs, metrics_test=last)))
    assert "metrics:\n- average_precision\n" in card


def test_hostile_texts_are_shown_and_do_nothing():
    for page in (report(hostile()), comparison([hostile(), facts()], together=HOSTILE)):
        assert_loads_nothing(page.replace(html.escape(HOSTILE), "").replace(str(charts.escape(HOSTILE)), ""))
        assert_is_inert(page)
        assert "<img src=x" in html.unescape(page)
    assert not re.search(r"(?<!\\)<", model_card(hostile()).split("```")[0])


def test_a_text_that_is_not_escaped_would_be_seen():
    page = report(facts())
    with pytest.raises(AssertionError):
        assert_is_inert(page.replace("</h1>", f"{HOSTILE}</h1>", 1))
    with pytest.raises(AssertionError):
        assert_loads_nothing(page.replace("</h1>", '<a href="https://example.org">x</a></h1>', 1))


def test_the_page_of_a_run_and_of_several_load_nothing():
    assert_loads_nothing(report(facts()))
    assert_loads_nothing(comparison([facts(), facts()], together="epsilon = 12"))


def large():
    """The record of DenseNet121 over 100 epochs: 121 layers, an analysis in every epoch."""
    names = [f"features.denseblock{i // 30}.denselayer{i}.conv{i % 2 + 1}" for i in range(121)]
    per_epoch = [
        EpochRecord(
            index=index,
            epsilon=8.0 * (index + 1) / 100,
            accuracy_test=0.5,
            layers_quantized=[name for number, name in enumerate(names) if (7 * number + 13 * index) % 4],
            nonprivate_accuracy_train=None,
            scores={name: (31 * number * (index + 3) % 97) / 97 for number, name in enumerate(names)},
            metrics_test=None,
        )
        for index in range(100)
    ]
    layers = [LayerRecord(name=n, macs=1e8, times_quantized=75, last_score=0.25, gain=1.5) for n in names]
    return dataclasses.replace(RECORD, per_epoch=per_epoch, layers=layers, epochs=100, accuracy_test=0.5)


def test_the_report_of_a_large_network_is_at_most_300_kb():
    assert len(report(facts(large())).encode()) <= 300_000


def test_the_same_facts_give_the_same_bytes():
    assert report(facts()) == report(facts())


finite = st.floats(0, 1e6) | st.just(1e-300)
words = st.text(max_size=30)


@settings(max_examples=10, deadline=None)
@given(
    names=st.lists(words, min_size=1, max_size=4, unique=True),
    numbers=st.lists(finite, min_size=4, max_size=4),
    accuracies=st.lists(st.floats(0, 1), min_size=1, max_size=5),
    text=words,
)
def test_any_record_renders(names, numbers, accuracies, text):
    epsilon, delta, macs, score = numbers
    per_epoch = [
        EpochRecord(
            index=index, epsilon=epsilon, accuracy_test=value, layers_quantized=names[: index % 3],
            nonprivate_accuracy_train=None, scores={names[0]: score - 1} if index % 2 == 0 else None,
            metrics_test={"accuracy": value},
        )
        for index, value in enumerate(accuracies)
    ]  # fmt: skip
    layers = [LayerRecord(name=name, macs=macs, times_quantized=1, last_score=None, gain=None) for name in names]
    changed = {"epsilon": epsilon, "delta": delta, "layers": layers, "per_epoch": per_epoch}
    page = report(
        facts(dataclasses.replace(RECORD, **changed, model=text, statement=text, accuracy_test=accuracies[-1]))
    )
    assert_is_inert(page)
    assert str(markupsafe.escape(text.strip()[:1])) in page


ALARMS = {
    "a seed": ({"statement": "NOT PRIVATE: " + RECORD.statement}, "known seed"),
    "a model that mixes records": ({"statement": "DOES NOT HOLD: " + RECORD.statement}, "does not hold"),
    "training accuracy": ({"unsafe_metrics": True}, "Training accuracy was measured"),
    "no epsilon": ({"epsilon": float("inf")}, "Epsilon is infinite"),
    "a delta above one in the records": ({"delta": 0.01}, "larger than 1 / records"),
}


@pytest.mark.parametrize(("change", "said"), ALARMS.values(), ids=ALARMS)
def test_what_makes_the_guarantee_void_or_weak_stands_on_top(change, said):
    found = facts(dataclasses.replace(RECORD, **change))
    page = report(found)
    assert said in text_of(page.split('id="promise"')[0])
    assert ("Nothing is promised" in page) == found.void
    assert found.void == (said in ("known seed", "does not hold", "Epsilon is infinite"))
    assert facts().alarms() == [] and 'class="alarm"' not in report(facts())


def test_checks_that_do_not_hold_stand_on_top():
    page = report(facts(checks=[Check(what="epsilon", holds=False, detail="halved")]))
    assert "1 of 1 checks do not hold" in text_of(page.split('id="promise"')[0]) and "is said to limit" in page


def test_what_is_not_declared_does_not_vanish_and_what_is_redacted_says_so():
    assert text_of(report(facts())).count("not declared") >= 7
    assert "left out" in report(facts(redacted=True, settings=None))


def test_the_tests_that_assumptions_name_are_there():
    assert all((ROOT / where).is_file() for _, where in ASSUMPTIONS)


def test_a_comparison_names_every_run_and_the_sum():
    second = dataclasses.replace(RECORD, policy="none", accuracy_test=0.5)
    text = text_of(comparison([facts(), facts(second, name="other")], together="epsilon = 12.5 together"))
    assert "2 runs compared" in text and "other" in text and "epsilon = 12.5 together" in text and "50.00 %" in text


def test_the_registry_draft_is_yaml_with_what_is_known():
    yaml = pytest.importorskip("yaml")
    for one in (facts(), hostile(), facts(RunRecord.read(FIXTURES / "record-1.json"), meaning=None)):
        draft = yaml.safe_load(registry_draft(one))["deployment"]
        parameters = draft["privacy_loss"]["privacy_parameters"]
        assert parameters == {"epsilon": float(rounded_up(one.record.epsilon)), "delta": one.record.delta}
        assert draft["administrative"]["tier"] == 3 and draft["administrative"]["registry_authors"] == [TODO]
        assert draft["implementation"]["additional_information"] == one.record.statement
    declared = yaml.safe_load(registry_draft(facts()))["deployment"]["basic"]["data_curators"][0]
    assert declared["data_curator_name"] == RECORD.declared["curator"]


def test_the_model_card_holds_the_statement_and_its_tag():
    card = model_card(facts())
    assert "- differential-privacy" in card and RECORD.statement.strip() in card and rounded_up(RECORD.epsilon) in card


def test_levels_are_shares_of_all_impacts_and_last_until_the_next_analysis():
    levels = charts.levels_of([{"a": 0.0, "b": 1.0, "c": 0.5}, None, {"a": 0.25, "b": float("nan"), "c": 0.75}])
    assert levels[0] == levels[1] and levels[0]["a"] == 1 and levels[0]["b"] == 5 and "b" not in levels[2]
    assert charts.cells(["a", "b"], [frozenset("a"), frozenset("b")], [{}, {"b": 3}]) == ["q0", "03"]


def test_the_report_says_what_several_processes_have_to_trust():
    """As the statement does; of one process there is nothing to say."""
    words = "their machines and the network between them are trusted"
    several = dataclasses.replace(RECORD, statement=f"{RECORD.statement}\nThe run had 2 processes: {words}.")
    for record, times in ((RECORD, 0), (several, 2)):
        assert text_of(report(facts(record))).count(words) == times, "in the statement and in an answer"


def test_answers_do_not_ask_for_numbers_that_a_record_does_not_have():
    for schema in range(1, SCHEMA + 1):
        assert len(answers(facts(RunRecord.read(FIXTURES / f"record-{schema}.json"), events=None))) == 24


@given(st.floats(1e-6, 1.0), st.floats(1e-6, 1.0))
def test_what_an_attacker_reaches_is_never_rounded_down(false_positive_rate, true_positive_rate):
    attack = Attack(
        false_positive_rate=false_positive_rate, true_positive_rate=true_positive_rate, from_epsilon_alone=1.0
    )
    named = Named.of(attack)
    assert true_positive_rate <= named.rightly / 1000 <= true_positive_rate + 0.001 + 1e-12
    share = true_positive_rate / (true_positive_rate + false_positive_rate)
    assert share - 1e-12 <= named.right / 100 <= share + 0.01 + 1e-12
