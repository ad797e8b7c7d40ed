# SPDX-License-Identifier: Apache-2.0
"""What examples promise beyond running, which tests/test_page_blocks.py tries: a year's budget is a limit."""

import re
import runpy
import sys
from pathlib import Path

import pytest

import dpquant

RETRAIN = Path(__file__).parents[1] / "examples" / "retraining" / "retrain.py"
GIVEN = {"epsilon": 3.0, "delta": 1e-3, "records": 400, "batch_size": 100}
PLAN = dpquant.PrivacyPlan.for_epochs(epochs=4, analysis=False, **GIVEN)  # two retrainings of two epochs


def charge(year, name, steps, noise=PLAN.noise_multiplier, kind="train"):
    ledger = dpquant.Ledger(year / name / "ledger.jsonl")
    ledger.charge(kind=kind, sample_rate=PLAN.sample_rate, noise_multiplier=noise, count=steps)
    ledger.close()


def retrain(year, monkeypatch) -> tuple[int, list[list[str]]]:
    """Call the script; return its exit code and the commands that it would run."""
    called: list[list[str]] = []
    options = [text for name, value in GIVEN.items() for text in (f"--{name.replace('_', '-')}", f"{value:g}")]
    monkeypatch.setattr(
        sys, "argv", ["retrain.py", str(year), *options, "--retrainings", "2", "--epochs", "2", "--", "--lr", "1"]
    )

    def train(command: list[str]) -> int:
        called.append(command)
        charge(year, Path(command[command.index("--out") + 1]).name, PLAN.steps // 2)
        return 0

    return runpy.run_path(str(RETRAIN))["main"](train), called


def test_a_year_of_two_retrainings_refuses_the_third(tmp_path, monkeypatch, capsys):
    for number in (1, 2):
        code, [command] = retrain(tmp_path, monkeypatch)
        assert code == 0 and command[:4] == ["dpquant", "train", "--lr", "1"]
        assert command[command.index("--noise-multiplier") + 1] == repr(PLAN.noise_multiplier)
        spent = float(re.search(r"spent epsilon ([\d.]+) of 3 ", capsys.readouterr().out).group(1))
        assert 0 <= spent - PLAN.epsilon_spent(steps=number * PLAN.steps // 2) < 1e-4  # rounded up
    assert retrain(tmp_path, monkeypatch) == (3, [])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["01", "02"]


def test_what_a_killed_run_charged_counts(tmp_path, monkeypatch):
    charge(tmp_path, "01", PLAN.steps // 2 + 1)
    assert retrain(tmp_path, monkeypatch) == (3, [])


@pytest.mark.parametrize("other", [{"noise": PLAN.noise_multiplier * 2}, {"kind": "analysis"}])
def test_a_ledger_of_another_plan_is_refused(other, tmp_path, monkeypatch):
    charge(tmp_path, "01", 1, **other)
    with pytest.raises(SystemExit, match="another one"):
        retrain(tmp_path, monkeypatch)
