# SPDX-License-Identifier: Apache-2.0
import json

import pytest

from doubles import Stops
from dpquant.app.cli import run
from dpquant.app.compare import charged_in, compare, half_width
from dpquant.errors import LedgerError, SettingError
from dpquant.privacy.accounting import epsilon
from dpquant.privacy.events import Event
from dpquant.privacy.ledger import Ledger
from dpquant.runs.settings import TrainSettings, plan_of
from dpquant.runs.train import train

SMALL = {"policy": "dpquant", "epochs": 1, "microbatch_size": 32, "backend": "simulate"}


def settings(**given):
    return TrainSettings.chosen({**SMALL, **given})


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "compare"
    return out, compare(settings(), ["none", "rotate"], 2, out)


def test_every_policy_is_run_at_every_seed(compared):
    out, comparison = compared
    assert {path.name for path in out.iterdir()} == {
        "none-0", "none-1", "rotate-0", "rotate-1", "compare.json", "compare.svg"
    }  # fmt: skip
    assert {name: len(row.accuracies) for name, row in comparison.rows.items()} == {"none": 2, "rotate": 2}
    none, rotated = comparison.rows["none"], comparison.rows["rotate"]
    assert none.quantized_fraction_macs == 0 < rotated.four_bit_fraction_macs
    assert none.epsilon <= 8 and rotated.half_width == half_width(rotated.accuracies)
    written = json.loads((out / "compare.json").read_text())["rows"]["none"]
    assert written["mean"] == none.mean
    assert none.seconds > 0 and "seconds" not in written, "times are not for release"
    assert (out / "compare.svg").read_text().startswith("<svg")


def test_all_runs_together_cost_more_than_one_and_no_more_than_their_sum(compared):
    _, comparison = compared
    each = [row.epsilon for row in comparison.rows.values() for _ in row.accuracies]
    assert max(each) < comparison.epsilon_together <= sum(each)


def test_without_the_operators_times_there_is_no_column_of_them(compared):
    out, comparison = compared
    timings = out / "none-0" / "timings.json"
    text = timings.read_text()
    timings.unlink()
    rows = compare(settings(), ["none", "rotate"], 2, out).rows
    timings.write_text(text)
    assert rows["none"].seconds is None and rows["rotate"].seconds == comparison.rows["rotate"].seconds


def test_what_is_done_is_not_repeated_and_other_settings_are_refused(compared):
    def refused(*arguments, **options):
        pytest.fail("trained again")

    out, comparison = compared
    assert compare(settings(), ["none", "rotate"], 2, out, train=refused).rows == comparison.rows
    with pytest.raises(SettingError, match="of others"):
        compare(settings(lr=0.3), ["none"], 1, out, train=refused)
    with pytest.raises(pytest.fail.Exception):
        compare(settings(), ["all"], 1, out, train=refused)


def test_the_interval_is_students():
    # three values, two degrees of freedom: 4.303 standard errors
    assert half_width([1.0, 2.0, 3.0]) == pytest.approx(4.3027 / 3**0.5, rel=1e-4)
    assert half_width([1.0]) is None


@pytest.mark.parametrize(
    ("policies", "seeds", "words"), [([], 1, "policy"), (["none"], 0, "seeds"), (["best"], 1, "best")]
)
def test_bad_arguments_are_refused_before_anything_is_run(tmp_path, policies, seeds, words):
    with pytest.raises(SettingError, match=words):
        compare(settings(), policies, seeds, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_verb_prints_a_row_a_policy_and_what_all_cost(tmp_path, capsys):
    options = ["--epochs", "1", "--microbatch-size", "32", "--backend", "simulate", "--out", str(tmp_path / "out")]
    assert run(["compare", "--policies", "none, all", "--seeds", "1", *options]) == 0
    printed = capsys.readouterr().out
    assert all(words in printed for words in ("none", "all", "whoever sees all runs"))
    assert run(["compare", "--policies", "none,all", "--seeds", "1", "--json", *options]) == 0
    assert set(json.loads(capsys.readouterr().out)["rows"]) == {"none", "all"}


# A run that was interrupted is repeated, and what it charged counts.


def interrupted_after(steps):
    """A `train` that the user stops after so many steps."""
    return lambda settings, out, sinks, **options: train(settings, out, sinks=[*sinks, Stops(steps)], **options)


def together(steps):
    """Epsilon of so many steps in all, whichever runs took them."""
    plan = plan_of(settings(policy="none"))
    charged = Event(kind="train", sample_rate=plan.sample_rate, noise_multiplier=plan.noise_multiplier, count=steps)
    return epsilon([charged], plan.delta)


def assert_counts_what_every_run_has_charged(charged_in, out, *, steps):
    assert epsilon(charged_in(out, ["none-0"]), settings().delta) == together(steps)


@pytest.fixture(scope="module")
def taken_up(tmp_path_factory):
    """A comparison of a single run that was interrupted twice before: (its directory, it, what was said)."""
    out, said = tmp_path_factory.mktemp("runs") / "taken-up", []
    for steps in (2, 3):
        with pytest.raises(KeyboardInterrupt):
            compare(settings(), ["none"], 1, out, watch=said.append, train=interrupted_after(steps))
    return out, compare(settings(), ["none"], 1, out, watch=said.append), said


def test_an_interrupted_run_is_moved_aside_and_made_anew(taken_up):
    out, comparison, said = taken_up
    assert {path.name for path in out.iterdir()} == {
        "none-0", "none-0.interrupted-1", "none-0.interrupted-2", "compare.json", "compare.svg"
    }  # fmt: skip
    assert len(comparison.rows["none"].accuracies) == 1
    assert [sum(c.count for c in Ledger.read(out / f"none-0.interrupted-{n}" / "ledger.jsonl")) for n in (1, 2)] == [
        2,
        3,
    ]
    assert said[0] == "none, seed 0" and len(said) == 3
    for number, line in enumerate(said[1:], 1):
        assert "what it charged counts" in line and f"none-0.interrupted-{number}" in line


def test_what_an_interrupted_run_charged_counts(taken_up):
    out, comparison, _ = taken_up
    assert_counts_what_every_run_has_charged(charged_in, out, steps=2 + 3 + 6)
    assert comparison.epsilon_together == together(2 + 3 + 6)
    assert json.loads((out / "compare.json").read_text())["epsilon_together"] == comparison.epsilon_together
    assert comparison.rows["none"].epsilon < comparison.epsilon_together


def finished_runs_only(out, finished):
    return [c for name in finished for c in Ledger.read(out / name / "ledger.jsonl")]


def what_is_planned(out, finished):
    return plan_of(settings(policy="none")).events()


@pytest.mark.parametrize("planted", [finished_runs_only, what_is_planned])
def test_charges_of_an_interrupted_run_that_are_forgotten_would_be_seen(planted, taken_up):
    out, _, _ = taken_up
    with pytest.raises(AssertionError):
        assert_counts_what_every_run_has_charged(planted, out, steps=2 + 3 + 6)


def test_a_ledger_that_cannot_be_read_ends_the_comparison(taken_up):
    out, _, _ = taken_up
    for name in ("none-0", "none-0.interrupted-1"):
        ledger = out / name / "ledger.jsonl"
        text = ledger.read_text()
        ledger.write_text(text.replace('"kind": "train", "sample_rate": 0.', '"kind": "train", "sample_rate": 1.', 1))
        assert ledger.read_text() != text
        with pytest.raises(LedgerError, match="does not agree with itself"):
            compare(settings(), ["none"], 1, out)
        ledger.write_text(text)


def test_a_finished_run_without_its_ledger_ends_the_comparison(taken_up):
    out, _, _ = taken_up
    ledger = out / "none-0" / "ledger.jsonl"
    ledger.rename(out / "none-0" / "hidden")
    with pytest.raises(LedgerError, match="readable ledger"):
        compare(settings(), ["none"], 1, out)
    (out / "none-0" / "hidden").rename(ledger)
