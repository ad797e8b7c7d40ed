# SPDX-License-Identifier: Apache-2.0
import importlib
import json
import subprocess

import pytest
from experiments import runner
from experiments.__main__ import SCRIPTS, TABLES
from experiments.runner import Run, Site, Table, do_table

from dpquant.cli import _settings
from dpquant.settings import TrainSettings

TABLE = Table(name="mine", title="Mine", common="--epochs 2", rows={"a": "--lr 1", "b": "--lr 2"}, seeds=(0, 1))
RECORD = {
    "accuracy_test": 0.5, "accuracy_per_epoch": [0.4, 0.5], "epsilon": 8.0, "epsilon_analysis_share": 0.0,
    "quantized_fraction_layers": 0.5, "quantized_fraction_macs": 0.5, "four_bit_fraction_macs": 0.5,
    "seconds_train": 2.0, "seconds_analysis": 1.0,
}  # fmt: skip


@pytest.fixture
def commands(monkeypatch, tmp_path):
    """The commands that were run, none of which trains anything."""
    seen = []

    def pretended(command, **settings):
        seen.append(command)
        out = tmp_path / "work" / command[command.index("--out") + 1].rsplit("/", 1)[1]
        out.mkdir(parents=True)
        (out / "record.json").write_text(json.dumps(RECORD))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(runner.subprocess, "run", pretended)
    monkeypatch.setattr(runner, "RESULTS", tmp_path / "results")
    return seen


def site(tmp_path, **settings):
    return Site(work=tmp_path / "work", folders={}, **settings)


def test_a_table_runs_every_row_at_every_seed_once(commands, tmp_path):
    rows = do_table(TABLE, site(tmp_path))
    assert len(commands) == 4 and [command[1] for command in commands] == ["train"] * 4
    assert {tuple(row["accuracies"]) for row in rows.values()} == {(50.0, 50.0)}
    results = json.loads((tmp_path / "results" / "mine.json").read_text())
    assert results["missing"] == [] and results["summary"]["a"]["command"].startswith("dpquant train --epochs 2 --lr 1")
    assert (tmp_path / "results" / "mine.png").exists()
    do_table(TABLE, site(tmp_path, jobs=2))
    assert len(commands) == 4


def test_after_the_deadline_nothing_begins_and_what_is_missing_is_listed(commands, tmp_path):
    do_table(TABLE, site(tmp_path))
    more = Table(name="mine", title="Mine", common="--epochs 2", rows={**TABLE.rows, "c": "--lr 3"}, seeds=(0,))
    do_table(more, site(tmp_path, deadline=0.0))
    assert len(commands) == 4
    assert json.loads((tmp_path / "results" / "mine.json").read_text())["missing"] == ["c, seed 0"]


def test_a_run_whose_data_is_not_here_is_left_out(commands, tmp_path):
    table = Table(name="mine", title="Mine", common="--data image-folder:GTSRB", rows={"a": ""}, seeds=(0,))
    assert do_table(table, site(tmp_path)) == {} and not commands
    here = Site(work=tmp_path / "work", folders={"GTSRB": tmp_path})
    assert do_table(table, here)["a"]["command"] == "dpquant train --data image-folder:GTSRB --seed 0 --out RUN"
    assert f"image-folder:{tmp_path}" in commands[0]


def test_runs_of_other_options_or_seeds_have_other_directories(tmp_path):
    folders = [Run("a", seed, options).folder(tmp_path) for seed in (0, 1) for options in ("--lr 1", "--lr 2")]
    assert len(set(folders)) == 4
    assert Run("a", 0, "--lr  1").folder(tmp_path) == Run("b", 0, "--lr 1").folder(tmp_path)


def test_a_run_that_fails_is_told(monkeypatch, tmp_path):
    failed = subprocess.CompletedProcess([], 2, stderr="error: Expected")
    monkeypatch.setattr(runner.subprocess, "run", lambda *a, **k: failed)
    with pytest.raises(SystemExit, match="error: Expected"):
        do_table(TABLE, site(tmp_path))


@pytest.mark.parametrize("name", TABLES)
def test_every_row_is_a_command_that_train_understands(name):
    import shlex

    fields = TrainSettings.__dataclass_fields__
    for table in importlib.import_module(f"experiments.{name}").TABLES:
        for run in table.runs():
            words = shlex.split(run.options)
            given = {words[i][2:].replace("-", "_"): words[i + 1] for i in range(0, len(words), 2)}
            types = {key: fields[key].type for key in given}
            typed = {
                key: float(value) if "float" in str(types[key]) else int(value) if "int" in str(types[key]) else value
                for key, value in given.items()
            }
            assert _settings(typed, None).data in ("fashion-mnist", "image-folder:GTSRB", "image-folder:CIFAR10")


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_can_be_run(name):
    assert callable(importlib.import_module(f"experiments.{name}").run)
