# SPDX-License-Identifier: Apache-2.0
"""Which state of a run gives which alert: one row each, with a neighbour that gives none."""

import dataclasses
from pathlib import Path

import pytest

from dpquant.runs.alerts import alerts, duration
from dpquant.runs.provenance import AnalysisRecord, PlanRecord
from dpquant.runs.record import EpochRecord, RunRecord
from dpquant.runs.status import Pace, RunStatus

FIXTURES = Path(__file__).parent / "fixtures"
ANALYSIS = AnalysisRecord(
    count=10, sample_rate=0.01, expected_batch_size=16.0, noise_multiplier=1.0, max_norm=1.0, repeats=1,
    score="gradient",
)  # fmt: skip
PLAN = PlanRecord(
    epsilon=8.0, delta=1e-4, noise_multiplier=1.0, max_grad_norm=1.0, sample_rate=0.1, expected_batch_size=256.0,
    steps=200, epochs=10, noise="gaussian", records_per_person=None, analysis=None,
)  # fmt: skip
WELL = RunStatus(
    name="runs/one", phase="running", model="cnn", dataset="digits", policy="dpquant", format="luq-fp4", plan=PLAN,
    step=100, charged=101, epsilon=5.0, classes=10, records=1442, layers=["a", "b"], gains={"a": 2.0},
    pace=Pace(silent=1.0),
)  # fmt: skip


def epochs(*accuracies, scores=None, layers=()):
    return [
        EpochRecord(
            index=index, epsilon=1.0 + index, accuracy_test=value, layers_quantized=list(layers),
            nonprivate_accuracy_train=None, scores=scores, metrics_test=None,
        )
        for index, value in enumerate(accuracies)
    ]  # fmt: skip


ANALYSED = {"plan": dataclasses.replace(PLAN, analysis=ANALYSIS)}
ROWS = {
    "stopped": (
        {"phase": "stopped", "charged": 57, "epsilon": 3.1},
        {"phase": "running", "charged": 57, "epsilon": 3.1},
        "charged 57 of 200 steps, epsilon 3.10. It is continued by: dpquant resume",
    ),
    "silent": (
        {"phase": "silent", "pace": Pace(silent=125.0)},
        {"phase": "running", "pace": Pace(silent=125.0)},
        "No sign of life for 2 min 5 s",
    ),
    "diverged": ({"phase": "diverged", "trouble": "Expected finite"}, {"phase": "finished"}, "Expected finite"),
    "unreadable": ({"trouble": "Expected line 3"}, {"trouble": ""}, "Expected line 3"),
    "unsafe_metrics": ({"unsafe_metrics": True}, {"unsafe_metrics": False}, "Epsilon does not cover it"),
    "delta": ({"records": 100_000}, {"records": None}, "larger than 1 / records"),
    "budget": (
        {"step": 150, "charged": 190, "epsilon": 7.5},
        {"step": 189, "charged": 190, "epsilon": 7.9},
        "94% of epsilon are spent with 50 of 200 steps left: 40 were charged and lost",
    ),
    "chance": (
        {"step": 41, "per_epoch": epochs(0.09, 0.11)},
        {"step": 39, "per_epoch": epochs(0.09, 0.11)},
        "Accuracy is at chance: 11.0% of 10 classes",
    ),
    "fell": (
        {"per_epoch": epochs(0.5, 0.9, 0.84)},
        {"per_epoch": epochs(0.5, 0.9, 0.86)},
        "fell by 6.0 points, from 90.0% in epoch 2 to 84.0%",
    ),
    "ranking": (
        {**ANALYSED, "per_epoch": epochs(0.5, scores={"a": 0.01, "b": 0.03})},
        {**ANALYSED, "per_epoch": epochs(0.5, scores={"a": 0.01, "b": 0.53})},
        "The ranking is noise",
    ),
    "slow": (
        {"per_epoch": epochs(0.5, layers=["a"]), "gains": {"a": 0.8, "b": 0.1}},
        {"per_epoch": epochs(0.5, layers=["a"]), "gains": {"a": 1.3, "b": 0.1}},
        "a (0.8 times as fast)",
    ),
}


def test_a_run_that_goes_well_gives_no_alert():
    assert alerts(WELL) == []
    assert alerts(RunStatus(name="x", phase="waiting")) == [] == alerts(RunStatus(name="x", phase="starting"))


@pytest.mark.parametrize(("kind", "row"), ROWS.items(), ids=ROWS)
def test_a_state_gives_its_alert_and_its_neighbour_none(kind, row):
    given, neighbour, words = row
    (alert,) = alerts(dataclasses.replace(WELL, **given))
    assert alert.kind == kind and words in alert.text, alert.text
    assert alert.grave == (kind in ("stopped", "silent", "diverged", "unreadable", "unsafe_metrics", "delta"))
    assert alert.is_advice == (kind in ("ranking", "slow"))
    assert alerts(dataclasses.replace(WELL, **neighbour)) == []


def test_the_gravest_come_first():
    status = dataclasses.replace(WELL, per_epoch=epochs(0.9, 0.1), step=150, unsafe_metrics=True)
    assert [one.grave for one in alerts(status)] == [True, False, False]


def test_a_regression_rare_positives_and_an_unknown_number_of_classes_have_no_chance():
    for change in ({"classes": None}, {"per_epoch": epochs(None, None)}):
        status = dataclasses.replace(WELL, **{"step": 150, "per_epoch": epochs(0.05), **change})
        assert alerts(status) == []
    record = RunRecord.read(FIXTURES / "record-4.json")
    rare = dataclasses.replace(record, metrics_test={"accuracy": 0.06, "average_precision": 0.5})
    assert RunStatus.of(rare, name="x", classes=2).classes is None
    assert RunStatus.of(record, name="x", classes=10).classes == 10


def test_the_noise_of_the_ranking_falls_with_the_number_of_analyses():
    one = dataclasses.replace(WELL, **ANALYSED, per_epoch=epochs(0.5, scores={"a": 0.1}))
    many = dataclasses.replace(one, per_epoch=epochs(*[0.5] * 9, scores={"a": 0.1}))
    assert one.score_noise == pytest.approx(1 / 16)
    assert many.score_noise == pytest.approx((1 / 3) ** 0.5 / 16, rel=1e-3)  # weight / (2 - weight)
    assert WELL.score_noise is None


@pytest.mark.parametrize("schema", [1, 2, 3, 4])
def test_a_record_of_every_schema_has_a_state(schema):
    record = RunRecord.read(FIXTURES / f"record-{schema}.json")
    status = RunStatus.of(record, name="old", classes=None)
    assert status.phase == "finished" and isinstance(alerts(status), list)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0 s"), (59, "59 s"), (60, "1 min 0 s"), (754, "12 min"), (3600, "1 h 0 min"), (200_000, "2 d 7 h")],
)
def test_a_duration_has_its_two_largest_units(seconds, words):
    assert duration(seconds) == words
