# SPDX-License-Identifier: Apache-2.0
"""The one number that every view of a run shows, for each kind of task: pages, terminals, programs and the card."""

import dataclasses
import io
import json
import math

import pytest
from rich.console import Console
from tests.runs.test_alerts import WELL, epochs

from dpquant.app.terminal import line, to_json, view
from dpquant.runs.alerts import alerts
from dpquant.runs.pages.watch import parts
from dpquant.runs.record import EpochRecord
from dpquant.runs.score import score_so_far

RARE = [{"accuracy": 0.98, "balanced_accuracy": 0.6, "average_precision": value} for value in (0.25, 0.5, 0.375)]
ERRORS = [{"mean_absolute_error": value} for value in (3.5, 2.25, 2.5)]
PLAIN = [{"accuracy": value, "balanced_accuracy": 0.1} for value in (0.5, 0.75, 0.625)]


def measured(metrics):
    return [
        dataclasses.replace(one, accuracy_test=found.get("accuracy"), metrics_test=found)
        for one, found in zip(epochs(*[None] * len(metrics)), metrics, strict=True)
    ]


def everywhere(status):
    """Return what each view of a run shows of it."""
    screen = Console(width=120, record=True, file=io.StringIO())
    screen.print(view(status, alerts(status)))
    return {"page": "".join(parts(status, alerts(status)).values()), "view": screen.export_text(), "line": line(status)}


@pytest.mark.parametrize(
    ("metrics", "shown", "not_shown"),
    [
        (RARE, "average precision", "98.0"),
        (ERRORS, "mean absolute error", "accuracy"),
        (PLAIN, "accuracy", "average precision"),
    ],
)
def test_every_view_shows_what_tells_most(metrics, shown, not_shown):
    status = dataclasses.replace(WELL, per_epoch=measured(metrics))
    for name, text in everywhere(status).items():
        assert shown in text.replace("Test ", "test ") and not_shown not in text, name


def test_less_of_an_error_is_better_and_nothing_of_it_falls():
    score = score_so_far(measured(ERRORS))
    assert score is not None and score.is_error and (score.best, score.best_epoch, score.last) == (2.25, 1, 2.5)
    assert alerts(dataclasses.replace(WELL, per_epoch=measured(ERRORS))) == []


def test_an_average_precision_that_fell_is_noticed_whatever_the_accuracy():
    (alert,) = alerts(dataclasses.replace(WELL, per_epoch=measured(RARE)))
    assert alert.kind == "fell" and "average precision fell by 12.5 points, from 0.5 in epoch 2 to 0.375" in alert.text


def test_programs_get_all_metrics_of_the_last_epoch():
    status = dataclasses.replace(WELL, per_epoch=measured([{"mean_absolute_error": math.nan, "other": 1.0}]))
    told = json.loads(to_json(status, []))
    assert told["accuracy_test"] is None and told["metrics_test"] == {"mean_absolute_error": None, "other": 1.0}
    assert json.loads(to_json(dataclasses.replace(WELL, per_epoch=[]), []))["metrics_test"] is None


@pytest.mark.parametrize("found", [[], epochs(None), epochs(math.nan), measured([{"mean_absolute_error": math.inf}])])
def test_nothing_finite_is_no_score(found):
    assert score_so_far(found) is None
    assert "<b>\u2013</b><span>test</span>" in parts(dataclasses.replace(WELL, per_epoch=found), [])["figures"]


def test_an_epoch_without_a_value_leaves_the_others_in_their_places():
    score = score_so_far([*epochs(0.5, None, 0.75)])
    assert score is not None and score.values == {0: 0.5, 2: 0.75}
    rows = parts(dataclasses.replace(WELL, per_epoch=epochs(0.5, None, 0.75)), [])["numbers"]
    assert [("50.0 %" in row, "75.0 %" in row) for row in rows.split("<tr>")[-3:]] == [
        (False, True), (False, False), (True, False),
    ]  # fmt: skip


def test_old_records_have_an_accuracy_alone():
    old = EpochRecord(
        index=0, epsilon=None, accuracy_test=0.5, layers_quantized=None, nonprivate_accuracy_train=None, scores=None,
        metrics_test=None,
    )  # fmt: skip
    assert score_so_far([old]) is not None
