# SPDX-License-Identifier: Apache-2.0
"""`dpquant ledger` states what the ledgers say, of each run and of all together, and refuses one that was changed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dpquant.app.cli import run
from dpquant.app.spent import account, charged_by
from dpquant.errors import SettingError
from dpquant.privacy.accounting import epsilon
from dpquant.privacy.events import Budget, Event
from dpquant.privacy.ledger import Ledger

TRAIN = {"kind": "train", "sample_rate": 0.05, "noise_multiplier": 1.1}
ANALYSIS = {"kind": "analysis", "sample_rate": 0.01, "noise_multiplier": 2.0}
BUDGET = Budget(epsilon=8.0, delta=1e-5, events=(Event(**ANALYSIS, count=2), Event(**TRAIN, count=40)))
FORMAT_1 = Path(__file__).parents[1] / "privacy" / "fixtures" / "ledger-1.jsonl"


@pytest.fixture
def first(tmp_path):
    """A run of three attempts: 30 steps and an analysis were charged."""
    folder = tmp_path / "first"
    for begin in (Ledger, Ledger.resumed):
        ledger = begin(folder / "ledger.jsonl", budget=BUDGET)
        ledger.charge(**TRAIN, count=15)
        ledger.close()
    ledger = Ledger.resumed(folder / "ledger.jsonl", budget=BUDGET)
    ledger.charge(**ANALYSIS)
    ledger.close()
    return folder


@pytest.fixture
def second(tmp_path):
    """Another run, with other noise, marked as research."""
    ledger = Ledger(tmp_path / "second" / "ledger.jsonl", budget=None, research=True)
    ledger.charge(**{**TRAIN, "noise_multiplier": 0.9}, count=5)
    ledger.close()
    return tmp_path / "second"


def printed(capsys, *arguments):
    code = run(["ledger", *map(str, arguments), "--json"])
    captured = capsys.readouterr()
    assert code == 0 and captured.err == "", captured.err
    return json.loads(captured.out)


def test_a_runs_account_is_its_ledgers(capsys, first):
    found = printed(capsys, first)
    head = json.loads((first / "ledger.jsonl").read_text().splitlines()[-1])["hash"]
    events = [Event(**TRAIN, count=30), Event(**ANALYSIS)]
    wanted = {
        "epsilon": epsilon(events, 1e-5), "delta": 1e-5, "steps": 30, "analyses": 1, "attempts": 3, "research": False,
        "head": head,
    }  # fmt: skip
    assert {name: found[name] for name in wanted} == wanted
    (only,) = found["runs"]
    assert only["planned_epsilon"] == 8.0 and only["torn_bytes"] == 0 and only["format"] == 2
    assert printed(capsys, first / "ledger.jsonl") == found
    assert printed(capsys, first, "--delta", "1e-6")["epsilon"] == epsilon(events, 1e-6) > wanted["epsilon"]


def assert_all_events_are_composed(compose, *folders):
    found = epsilon(compose([folder / "ledger.jsonl" for folder in folders]), 1e-5)
    each = [Event(**TRAIN, count=30), Event(**ANALYSIS), Event(**{**TRAIN, "noise_multiplier": 0.9}, count=5)]
    assert found == epsilon(each, 1e-5)


def test_runs_on_the_same_data_are_composed(capsys, first, second):
    assert_all_events_are_composed(charged_by, first, second)
    found = printed(capsys, first, second, "--delta", "1e-5")
    assert found["epsilon"] > max(one["epsilon"] for one in found["runs"]) > 0
    assert (found["steps"], found["attempts"], found["research"], found["head"]) == (35, 4, True, None)
    assert [one["research"] for one in found["runs"]] == [False, True]


def test_a_composition_that_takes_the_largest_would_be_seen(first, second):
    def largest(ledgers):
        return max((Ledger.read(ledger) for ledger in ledgers), key=lambda events: epsilon(events, 1e-5))

    with pytest.raises(AssertionError):
        assert_all_events_are_composed(largest, first, second)


def test_what_is_printed_names_what_a_reader_needs(capsys, first, second):
    with (first / "ledger.jsonl").open("a") as file:
        file.write('{"seq": 9')
    assert run(["ledger", str(first), str(second), "--delta", "1e-5"]) == 0
    shown = capsys.readouterr().out
    for words in ("attempts", "30 steps", "8.0000 planned", "torn", "9 bytes", "NOT PRIVATE", "All runs together"):
        assert words in shown, words
    assert Ledger.verify(first / "ledger.jsonl").head in shown


@pytest.mark.parametrize("line", [0, 2, 4])
def test_a_ledger_that_was_changed_is_one_line_and_exit_code_1(capsys, first, second, line):
    path = first / "ledger.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:line] + lines[line + 1 :]))
    for arguments in ([first], [first, "--json"], [second, first, "--delta", "1e-5"]):
        assert run(["ledger", *map(str, arguments)]) == 1
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.count("\n") == 1 and f"line {line + 1} of" in captured.err


def test_bad_input_is_exit_code_2(capsys, first, tmp_path):
    for arguments in ([tmp_path / "missing"], [tmp_path], [first, first / "ledger.jsonl"], [FORMAT_1], []):
        assert run(["ledger", *map(str, arguments)]) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.count("\n") == 1


def test_a_ledger_of_format_1_has_an_epsilon_at_a_delta(capsys):
    found = printed(capsys, FORMAT_1, "--delta", "1e-5")
    assert found["epsilon"] == epsilon([Event(**TRAIN, count=4), Event(**ANALYSIS, count=2)], 1e-5)
    assert found["runs"][0]["format"] == 1 and found["runs"][0]["planned_epsilon"] is None


def test_deltas_that_differ_need_one(first, second, tmp_path):
    Ledger(tmp_path / "third", budget=Budget(epsilon=1.0, delta=1e-6, events=BUDGET.events)).close()
    for runs in ([first, second], [first, tmp_path / "third"]):
        with pytest.raises(SettingError, match="Give --delta"):
            account(runs)


def test_an_epsilon_without_noise_is_null(capsys, tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.charge(**{**TRAIN, "noise_multiplier": 0.0})
    assert printed(capsys, tmp_path, "--delta", "1e-5")["epsilon"] is None


def test_the_verb_loads_no_torch(first):
    code = f"""if True:
        import sys
        from dpquant.app.cli import run
        assert run(['ledger', {str(first)!r}]) == 0
        sys.exit('torch' in sys.modules)"""
    assert subprocess.run([sys.executable, "-c", code], check=False, stdout=subprocess.DEVNULL).returncode == 0
