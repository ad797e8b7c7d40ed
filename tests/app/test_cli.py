# SPDX-License-Identifier: Apache-2.0
import contextlib
import io
import json
import os
import re
import subprocess
import sys

import pytest

from doubles import interrupted
from dpquant.app.cli import SPINS, run, sleep_soon
from dpquant.privacy.accounting import epsilon
from dpquant.privacy.events import Event
from dpquant.privacy.ledger import Ledger


def test_plan_prints_the_budget_and_reads_no_data(capsys, tmp_path):
    options = ["--data", "image-folder:/nowhere", "--records", "9000", "--epsilon", "3", "--policy", "dpquant"]
    assert run(["train", *options, "--out", str(tmp_path / "run")]) == 2, "data that is not there would be read"
    assert "/nowhere" in capsys.readouterr().err
    assert run(["plan", *options]) == 0
    printed = capsys.readouterr().out
    assert "noise multiplier" in printed and "analysis share" in printed and "3.0000" in printed


def test_plan_refuses_a_draft_and_takes_a_spec_that_is_not_here(capsys, tmp_path):
    spec = tmp_path / "spec.toml"
    options = ["plan", "--data", "table:/nowhere.csv", "--label-column", "y", "--spec", str(spec), "--records", "480"]
    assert run(options) == 0, "a plan is made where neither records nor spec are"
    text = 'task = "classification"\nclasses = ["a", "b"]\n[columns.x]\nkind = "number"\nrange = [0, 1]\n'
    spec.write_text(text)
    assert run(options) == 0
    for wrong, seen in ((f"draft = true\n{text}", "draft"), (text.replace("number", "numbr"), "numbr")):
        spec.write_text(wrong)
        assert run(options) == 2 and seen in capsys.readouterr().err


def test_plan_ends_with_the_command_that_trains(capsys):
    options = ["--data", "image-folder:my photos", "--records", "480", "--fix"]
    assert run(["plan", *options]) == 0
    printed = capsys.readouterr().out
    right = "dpquant train --data 'image-folder:my photos' --fix --records 480"
    assert printed.splitlines()[-1] == f"Train with it: {right}"
    assert "from 480 records" in printed and "general" in printed


def test_plan_as_json_can_be_read_by_a_program(capsys):
    assert run(["plan", "--json", "--policy", "dpquant"]) == 0
    read = json.loads(capsys.readouterr().out)
    assert (read["delta"], read["steps"], read["epochs"], read["analysis"]["score"]) == (1e-4, 240, 40, "gradient")
    assert 7.9 < read["epsilon"] <= 8 and 0 < read["analysis_share"] < 1


def test_the_help_of_plan_documents_its_json(capsys):
    assert run(["plan", "--json", "--policy", "none"]) == 0
    names = json.loads(capsys.readouterr().out)
    assert run(["plan", "--help"]) == 0
    help = capsys.readouterr().out
    assert all(name in help for name in names)


def test_plan_predicts_a_step_of_many_workers_and_says_from_what(capsys, monkeypatch):
    monkeypatch.setenv("DPQUANT_CACHE", "off")
    assert run(["plan", "--world-size", "6", "--bandwidth", "1"]) == 0
    printed = capsys.readouterr().out
    assert "A model, not a measurement" in printed and "assumed" in printed and "1,024" in printed
    assert printed.splitlines()[-1] == "Train with it: torchrun --standalone --nproc-per-node 6 -m dpquant train"
    assert run(["plan", "--world-size", "6", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["scaling"]
    assert (found["world_size"], found["network"]["bandwidth"]) == (6, 10.0)
    assert [one["workers"] for one in found["workers"]] == [1, 2, 4, 6, 8, 16, 64, 256, 1024]
    assert run(["plan", "--help"]) == 0
    help = capsys.readouterr().out
    assert all(name in help for part in (found, found["times"], found["network"], found["workers"][0]) for name in part)


def test_plan_of_many_workers_loads_no_torch():
    told = (
        "import sys; from dpquant.app.cli import run; run(['plan', '--world-size', '8']); print('torch' in sys.modules)"
    )
    printed = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True).stdout
    assert printed.splitlines()[-1] == "False"


@pytest.mark.always
def test_train_writes_a_run_and_prints_its_statement(capsys, tmp_path):
    assert run(["train", "--epochs", "1", "--policy", "rotate", "--out", str(tmp_path / "run")]) == 0
    captured = capsys.readouterr()
    printed = " ".join(captured.out.split())
    assert "test accuracy" in printed and "one record" in printed and "epoch" not in printed
    assert "privacy   epsilon 8.0000" in captured.err and "epoch 1/1: epsilon 8.00/8.00" in captured.err
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert record["policy"] == "rotate" and record["command"].startswith("dpquant")


def test_train_as_json_prints_the_record_and_nothing_else(capsys, tmp_path):
    arguments = ["train", "--epochs", "1", "--policy", "none", "--json", "--out", str(tmp_path / "run")]
    assert run(arguments) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == json.loads((tmp_path / "run" / "record.json").read_text())
    assert captured.err == ""


def test_options_win_over_the_config_file(capsys, tmp_path):
    (tmp_path / "a.toml").write_text('data = "fashion-mnist"\nepsilon = 2.0\nepochs = 3\n')
    assert run(["plan", "--config", str(tmp_path / "a.toml"), "--epochs", "5", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["steps"], printed["epochs"]) == (5 * 29, 5) and 1.99 < printed["epsilon"] <= 2


def interrupted_run(out, steps, model="doubles:interrupting"):
    """The exit code of a run in which the user's Ctrl-C arrives after so many steps."""
    with interrupted(out / "ledger.jsonl", steps):
        return run(["train", "--model", model, "--microbatch-size", "64", "--backend", "simulate", "--out", str(out)])


def test_an_interrupt_leaves_one_line_and_exit_code_130(capsys, tmp_path):
    assert interrupted_run(tmp_path / "run", steps=0) == 130
    captured = capsys.readouterr()
    assert captured.err.count("error: ") == 1 and captured.out == ""
    assert captured.err.splitlines()[-1].startswith("error: interrupted after 0 of 240 steps")


def assert_says_what_was_spent(line, ledger):
    """The steps and the epsilon that the ledger holds, and no others."""
    charges = Ledger.read(ledger)
    steps = sum(charge.count for charge in charges if charge.kind == "train")
    events = [
        Event(kind=c.kind, sample_rate=c.sample_rate, noise_multiplier=c.noise_multiplier, count=c.count)
        for c in charges
    ]
    said = re.search(r"after (\d+) of 240 steps; spent so far: epsilon = (\d+\.\d{4}) at delta = 0.0001$", line)
    assert said is not None and int(said[1]) == steps
    assert 0 <= float(said[2]) - epsilon(events, 1e-4) < 1e-4  # rounded up


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run interrupted after three steps: (exit code, standard error, its ledger)."""
    out, errors = tmp_path_factory.mktemp("stopped") / "run", io.StringIO()
    with contextlib.redirect_stderr(errors):
        code = interrupted_run(out, steps=3)
    return code, errors.getvalue(), out / "ledger.jsonl"


def test_an_interrupted_run_says_what_it_has_spent(stopped):
    code, errors, ledger = stopped
    assert code == 130 and errors.count("error: ") == 1
    assert_says_what_was_spent(errors.strip().splitlines()[-1], ledger)


@pytest.mark.parametrize(("right", "wrong"), [("after 3", "after 2"), (r"epsilon = \d", "epsilon = 9")])
def test_a_wrong_account_of_an_interrupted_run_would_be_seen(stopped, right, wrong):
    _, errors, ledger = stopped
    with pytest.raises(AssertionError):
        assert_says_what_was_spent(re.sub(right, wrong, errors.strip().splitlines()[-1]), ledger)


def test_an_interrupted_run_whose_charges_came_from_a_seed_says_so(capsys, tmp_path):
    assert interrupted_run(tmp_path / "run", 1, model="doubles:interrupting_research") == 130
    assert "NOT PRIVATE" in capsys.readouterr().err


def test_an_interrupted_private_run_is_not_called_otherwise(stopped):
    assert "NOT PRIVATE" not in stopped[1]


@pytest.mark.parametrize("options", [["--lr", "1e30"], ["--lr", "1e10", "--weight-decay", "1e30"]])
def test_a_run_that_diverges_has_an_exit_code_of_its_own_and_is_not_continued(options, capsys, tmp_path):
    run_options = ["--epochs", "1", "--policy", "none", "--microbatch-size", "64", "--backend", "simulate", *options]
    assert run(["train", *run_options, "--json", "--out", str(tmp_path / "run")]) == 4
    captured = capsys.readouterr()
    assert captured.out == "" and "stay finite" in captured.err and captured.err.count("\n") == 1
    assert run(["resume", str(tmp_path / "run")]) == 2
    refused = capsys.readouterr().err
    assert refused.count("\n") == 1 and "with a lower lr, in another directory" in refused


def test_help_and_version(capsys):
    assert run(["--version"]) == 0 and capsys.readouterr().out.strip()[0].isdigit()
    for arguments in ([], ["--help"]):
        assert run(arguments) == 0
        assert "train" in capsys.readouterr().out


@pytest.mark.parametrize("verb", ["plan", "train"])
def test_every_verb_has_help_with_an_example(verb, capsys):
    assert run([verb, "--help"]) == 0
    printed = capsys.readouterr().out
    assert "Example: dpquant" in printed and "--max-grad-norm" in printed


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"GOMP_SPINCOUNT": SPINS}),
        ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
        ({"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": "active"}),
    ],
)
def test_waiting_threads_sleep_soon_unless_the_user_says_otherwise(given, expected):
    sleep_soon(given)
    assert given == expected


def assert_set_before_torch_is_loaded(program):
    """The program ends by printing the version; what OpenMP reads is set, and torch is not there yet."""
    shown = "print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    check = f"import atexit, os, sys; atexit.register(lambda: {shown})"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    command = [sys.executable, "-c", f"{check}; sys.argv[1:] = ['--version']; {program}"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == f"{SPINS} False"


def test_the_console_script_sets_it_before_torch_is_loaded():
    assert_set_before_torch_is_loaded("from dpquant.cli import main; main()")


@pytest.mark.parametrize(
    "planted",
    ["import torch; from dpquant.cli import main; main()", "from dpquant.app.cli import run; run(sys.argv[1:])"],
)
def test_setting_it_too_late_or_not_at_all_would_be_seen(planted):
    with pytest.raises(AssertionError):
        assert_set_before_torch_is_loaded(planted)
