# SPDX-License-Identifier: Apache-2.0
import dataclasses
import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from experiments import lite0, paper, pareto, per_tensor, runner
from experiments.__main__ import SCRIPTS, TABLES
from experiments.features import FEATURES
from experiments.packages import PACKAGES
from experiments.runner import FOLDERS, Run, Site, Table, do_table, settings_of

from dpquant.app import cli
from dpquant.backends.registry import BACKENDS
from dpquant.checks.isolation import keeps_apart
from dpquant.errors import SettingError
from dpquant.formats import E3M0, RoleFormat, Rounding
from dpquant.rounding import row_keys
from dpquant.runs.record import SCHEMA, EpochRecord, RunRecord
from dpquant.training import watch
from dpquant.training.cost import LayerCost

TABLE = Table(name="mine", title="Mine", common="--epochs 2", rows={"a": "--lr 1", "b": "--lr 2"}, seeds=(0, 1))
FIELDS = {field.name for field in dataclasses.fields(RunRecord)}
TIMINGS = {
    "note": "", "seconds_total": 9.0, "seconds_train": 2.0, "seconds_analysis": 1.0, "seconds_at_epoch_ends": [],
    "examples_per_second": 1.0,
}  # fmt: skip


def epoch_of(index, accuracy):
    unknown = dict.fromkeys(field.name for field in dataclasses.fields(EpochRecord))
    return {**unknown, "index": index, "accuracy_test": accuracy}


RECORD = {
    **dict.fromkeys(FIELDS),
    "schema": SCHEMA, "layers": [], "per_epoch": [epoch_of(0, 0.4), epoch_of(1, 0.5)], "accuracy_test": 0.5,
    "epsilon": 8.0, "epsilon_analysis_share": 0.0,
    "quantized_fraction_layers": 0.5, "quantized_fraction_macs": 0.5, "four_bit_fraction_macs": 0.5,
}  # fmt: skip


class Commands(list):
    """The commands that were run, none of which trains anything."""

    def __init__(self, work):
        super().__init__()
        self._work, self.record = work, RECORD

    def launch(self, command, **settings):
        self.append(command)
        out = self._work / command[command.index("--out") + 1].rsplit("/", 1)[1]
        out.mkdir(parents=True)
        (out / "record.json").write_text(json.dumps(self.record))
        (out / "timings.json").write_text(json.dumps(TIMINGS))
        return subprocess.CompletedProcess(command, 0)


@pytest.fixture
def commands(tmp_path):
    return Commands(tmp_path / "work")


def site(tmp_path, commands, **settings):
    given = {"work": tmp_path / "work", "folders": {}, "results": tmp_path / "results", "launch": commands.launch}
    return Site(**(given | settings))


def test_a_table_runs_every_row_at_every_seed_once(commands, tmp_path):
    rows = do_table(TABLE, site(tmp_path, commands))
    assert len(commands) == 4 and [command[3] for command in commands] == ["train"] * 4
    assert {tuple(row["accuracies"]) for row in rows.values()} == {(50.0, 50.0)}
    results = json.loads((tmp_path / "results" / "mine.json").read_text())
    assert results["missing"] == [] and results["summary"]["a"]["command"].startswith("dpquant train --epochs 2 --lr 1")
    assert {row["seconds"] for row in rows.values()} == {3}
    assert (tmp_path / "results" / "mine.png").exists()
    do_table(TABLE, site(tmp_path, commands, jobs=2))
    assert len(commands) == 4


def test_some_rows_are_run_once(commands, tmp_path):
    table = Table(name="mine", title="Mine", common="", rows={"a": "--lr 1"}, once={"b": "--lr 2"}, seeds=(3, 4))
    assert [(run.row, run.seed) for run in table.runs()] == [("a", 3), ("b", 3), ("a", 4)]
    assert [len(row["accuracies"]) for row in do_table(table, site(tmp_path, commands)).values()] == [2, 1]


def test_after_the_deadline_nothing_begins_and_what_is_missing_is_listed(commands, tmp_path):
    do_table(TABLE, site(tmp_path, commands))
    more = Table(name="mine", title="Mine", common="--epochs 2", rows={**TABLE.rows, "c": "--lr 3"}, seeds=(0,))
    do_table(more, site(tmp_path, commands, deadline=0.0))
    assert len(commands) == 4
    assert json.loads((tmp_path / "results" / "mine.json").read_text())["missing"] == ["c, seed 0"]


def test_a_run_that_fails_is_told_at_once_and_the_others_go_on(commands, tmp_path, capsys):
    def launch(command, **settings):
        if "--lr 1" in " ".join(command):
            return subprocess.CompletedProcess(command, 1, stderr="error: no such file")
        return commands.launch(command, **settings)

    here = site(tmp_path, commands, launch=launch)
    assert do_table(TABLE, here).keys() == {"b"} and [run.row for run in here.failed] == ["a", "a"]
    assert json.loads((tmp_path / "results" / "mine.json").read_text())["missing"] == ["a, seed 0", "a, seed 1"]
    said = capsys.readouterr().out
    assert said.index("FAILED: a, seed 0\n") < said.index("error: no such file") < said.index("b, seed 0: 0.5000")


def test_a_run_whose_data_is_not_here_is_left_out_and_no_record_says_where_it_was(commands, tmp_path):
    table = Table(name="mine", title="Mine", common="--data image-folder:GTSRB", rows={"a": ""}, seeds=(0,))
    assert do_table(table, site(tmp_path, commands)) == {} and not commands
    commands.record = {**RECORD, "dataset": f"image-folder:{tmp_path}/photos"}
    here = site(tmp_path, commands, folders={"GTSRB": tmp_path / "photos"})
    assert do_table(table, here)["a"]["command"] == "dpquant train --data image-folder:GTSRB --seed 0 --out RUN"
    assert f"image-folder:{tmp_path}/photos" in commands[0]
    assert here.record(table.runs()[0])["dataset"] == "image-folder:GTSRB"


def test_a_run_of_a_public_network_waits_for_its_weights(commands, tmp_path, capsys):
    found = []

    def launch(command, *, env, **settings):
        found.append(env.get(lite0.WEIGHTS))
        return commands.launch(command, **settings)

    run = "--model experiments.lite0:finetuned"
    table = Table(name="mine", title="Mine", common="", rows={"a": run, "b": "--lr 1"}, seeds=(0,))
    assert do_table(table, site(tmp_path, commands, launch=launch)).keys() == {"b"}
    assert found == [None] and "left out, without LITE0: a" in capsys.readouterr().out
    assert list(runner.needed(table.runs(), {}, tmp_path / "work")) == ["LITE0"]
    do_table(table, site(tmp_path, commands, launch=launch, folders={"LITE0": tmp_path / "weights"}))
    assert found == [None, str(tmp_path / "weights")]


def test_what_the_results_hold_counts_as_done_where_that_is_wanted(commands, tmp_path):
    do_table(TABLE, site(tmp_path, commands))
    bare, kept = (
        site(tmp_path, commands, work=tmp_path / "elsewhere", **more)
        for more in ({}, {"kept": runner.committed(tmp_path / "results")})
    )
    assert bare.record(TABLE.runs()[0]) is None
    assert do_table(TABLE, kept).keys() == {"a", "b"} and len(commands) == 4


def test_what_only_finished_runs_read_is_not_prepared(commands, tmp_path):
    table = Table(name="mine", title="Mine", common="", rows={"a": "--data packed:FROZEN", "b": "--lr 1"}, seeds=(0, 1))
    first, other, *_ = runs = [run for run in table.runs() if run.row == "a"]
    assert list(runner.needed(runs, {}, tmp_path / "work")) == ["FROZEN", "FROZEN"]
    assert list(runner.needed(runs, {first.command}, tmp_path / "work")) == ["FROZEN"]
    assert list(runner.needed(runs, {first.command, other.command}, tmp_path / "work")) == []
    do_table(table, site(tmp_path, commands, folders={"FROZEN": tmp_path / "features"}))
    assert list(runner.needed([first], {first.command}, tmp_path / "work")) == ["FROZEN"]  # its record has the folder


def test_a_run_whose_record_still_holds_its_times_counts_as_it_did(commands, tmp_path):
    do_table(TABLE, site(tmp_path, commands))
    for out in (tmp_path / "work").iterdir():
        (out / "timings.json").unlink()
        (out / "record.json").write_text(json.dumps({**RECORD, "seconds_train": 5.0, "seconds_analysis": 1.0}))
    assert {row["seconds"] for row in do_table(TABLE, site(tmp_path, commands)).values()} == {6} and len(commands) == 4


def test_a_record_that_an_older_program_wrote_does_not(commands, tmp_path):
    do_table(TABLE, site(tmp_path, commands))
    path = tmp_path / "results" / "mine.json"
    results = json.loads(path.read_text())
    del results["records"]["a"][0]["four_bit_fraction_macs"]
    path.write_text(json.dumps(results))
    here = Site(work=tmp_path / "elsewhere", folders={}, kept=runner.committed(tmp_path / "results"))
    assert [here.record(run) is None for run in TABLE.runs()] == [True, False, False, False]


def test_committed_records_of_either_form_can_be_read():
    assert all(RunRecord.from_json(json.dumps(run)).accuracy_test == run["accuracy_test"] for run in committed_runs())


def committed_runs():
    """The records of private runs that the results hold: one without an epsilon is of a run with another program."""
    runs = [run for run in runner.committed().values() if run["epsilon"] is not None]
    assert len(runs) > 100
    return runs


def test_whatever_the_results_hold_can_be_gone_on_from():
    tables = [json.loads(path.read_text()) for path in runner.RESULTS.glob("*.json")]
    runs = [run for table in tables for records in table.get("records", {}).values() for run in records]
    assert len(runner.committed()) == len({run["command"] for run in runs}) > 100
    assert all(command.startswith(("dpquant train ", "python -m ")) for command in runner.committed())


def test_another_program_takes_the_place_of_dpquant(commands, tmp_path):
    table = Table(name="mine", title="M", common="", rows={"a": "", "b": ""}, seeds=(0,), programs={"b": "mine.main"})
    do_table(table, site(tmp_path, commands))
    assert len(commands) == 2 and commands[1][1:4] == ["-m", "mine.main", "train"]


def test_scales_per_tensor_let_one_example_change_another_and_ours_do_not():
    """What the variant is there to show: it is not private."""
    x = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)
    louder = torch.cat([x[:3], 100 * x[3:]]).to(memory_format=torch.channels_last)
    keys = row_keys(7, torch.arange(4))
    role = RoleFormat(format=E3M0, rounding=Rounding.NEAREST)
    for ours, sharing in zip(BACKENDS.values(), per_tensor.shared_scales().values(), strict=True):
        shared = sharing.quantize(x, role, keys)
        assert shared.codes.shape == x.shape and shared.codes.is_contiguous(memory_format=torch.channels_last)
        assert shared.scale.shape == (4,) and shared.scale.unique().numel() == 1
        assert not torch.equal(sharing.quantize(louder, role, keys).codes[:3], shared.codes[:3])
        assert torch.equal(ours.quantize(louder, role, keys).codes[:3], ours.quantize(x, role, keys).codes[:3])


def test_the_checks_that_an_experiment_disables_are_where_it_looks_for_them():
    with per_tensor.checks_disabled():
        assert watch.keeps_apart() is True
    assert watch.keeps_apart is keeps_apart


def test_a_run_with_scales_per_tensor_promises_nothing(tmp_path, capsys):
    out = tmp_path / "run"
    assert per_tensor.main(["train", "--policy", "all", "--epochs", "1", "--threads", "1", "--out", str(out)]) == 0
    record = json.loads((out / "record.json").read_text())
    assert record["epsilon"] is None and record["statement"].startswith("NOT PRIVATE")
    assert [epoch["epsilon"] for epoch in record["per_epoch"]] == [None]
    assert capsys.readouterr().out.strip().endswith(per_tensor.NOT_PRIVATE)
    assert record["backend"].startswith("SharedScale of ") and record["backend"] not in BACKENDS


def test_scales_per_tensor_are_refused_where_the_checks_are_left_in(tmp_path, capsys):
    with mock.patch.dict(BACKENDS, per_tensor.shared_scales(), clear=True):
        code = cli.run(["train", "--policy", "all", "--epochs", "1", "--threads", "1", "--out", str(tmp_path / "run")])
    assert code == 2 and "that example alone" in capsys.readouterr().err and not (tmp_path / "run").exists()


RESULTS = {
    "summary": {
        "static 0.9": {
            "accuracy_mean": 12.3456, "accuracy_spread": 1.0, "accuracies": [1, 2], "quantized_fraction_macs": 0.9,
            "four_bit_fraction_macs": 0.5, "epsilon": 8.0, "epsilon_analysis_share": 0.01,
            "command": "dpquant train --lr 3 --lr 1 --policy static --fraction 0.9 --seed 0 --out RUN",
        },
        "naive": {
            "accuracy_mean": 10, "accuracy_spread": None, "accuracies": [1], "quantized_fraction_macs": 1,
            "four_bit_fraction_macs": 1, "epsilon": None, "epsilon_analysis_share": None,
            "command": "python -m mine train --lr 3 --lr 1 --policy all --seed 0 --out RUN",
        },
    },
    "missing": ["a, b, seed 0", "a, b, seed 2"],
}  # fmt: skip


def test_results_stand_on_the_page_beside_the_papers(tmp_path):
    (tmp_path / "baselines-gtsrb.json").write_text(json.dumps(RESULTS))
    page = "before\n<!-- results: baselines-gtsrb -->\nold\n<!-- end -->\n<!-- results: none -->\n<!-- end -->\nafter"
    found = paper.refreshed(page, tmp_path)
    assert (
        "| static 0.9 | 12.35 ± 1.00 | 2 | 90% | 50% | 1.00% | 57.49 ± 4.46 | `--policy static --fraction 0.9` |"
        in found
    )
    assert "| naive | 10.00 | 1 | 100% | 100% | NOT PRIVATE |  | `(python -m mine) --policy all` |" in found
    assert "`dpquant train --lr 1 OPTIONS --seed SEED --out RUN`" in found
    assert "Not run yet: a, b at seed 0, 2." in found
    assert "old" not in found and "Not run yet." in found and found.startswith("before") and found.endswith("after")
    assert paper.refreshed(found, tmp_path) == found


def test_the_page_says_what_the_results_say():
    assert paper.refreshed(paper.PAGE.read_text()) == paper.PAGE.read_text()


def test_runs_of_other_options_or_seeds_have_other_directories(tmp_path):
    folders = [Run("a", seed, options).folder(tmp_path) for seed in (0, 1) for options in ("--lr 1", "--lr 2")]
    assert len(set(folders)) == 4
    assert Run("a", 0, "--lr  1").folder(tmp_path) == Run("b", 0, "--lr 1").folder(tmp_path)


def test_a_run_that_fails_makes_the_command_fail(tmp_path):
    wanted = ["--rows", "baselines-gtsrb/full*", "--seeds", "1", "--gtsrb", "nowhere", "--work", str(tmp_path)]
    command = [sys.executable, "-m", "experiments", "baselines", *wanted]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(runner.__file__).parents[1])
    assert result.returncode == 1 and result.stderr == (
        "error: Failed runs: 1. Each is named above, with its command.\n"
    )
    assert "FAILED: full precision, seed 0" in result.stdout and "nowhere" in result.stdout


@pytest.mark.parametrize("name", TABLES)
def test_every_row_is_a_command_that_train_understands(name):
    for table in importlib.import_module(f"experiments.{name}").TABLES:
        for run in table.runs():
            kind, _, place = settings_of(run.options).data.partition(":")
            assert kind == "fashion-mnist" or place.split("/")[0] in {*FOLDERS, *PACKAGES, *FEATURES}


def test_an_option_that_train_does_not_know_is_an_error():
    with pytest.raises(SettingError, match="Expected lr > 0"):
        settings_of("--lr 1e-3 --lr -1")
    with pytest.raises(KeyError, match="learning_rate"):
        settings_of("--learning-rate 1")


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_can_be_run(name):
    module = importlib.import_module(f"experiments.{name}")
    assert callable(module.run) and not hasattr(module, "TABLES")  # which would be taken for tables to run


LAYERS = {"a": LayerCost(full=2.0, quantized=1.0, macs=1.0), "b": LayerCost(full=4.0, quantized=3.0, macs=1.0)}
ASSESSED = {"luq-fp4": SimpleNamespace(layers=LAYERS, batch_size=10, full_step=100.0)}


def ran(*times_quantized, accuracy=0.5, rest="full"):
    layers = [{"name": n, "times_quantized": t} for n, t in zip("ab", times_quantized, strict=True)]
    shares = {"four_bit_fraction_macs": 0.5, "quantized_fraction_macs": 0.75}
    return {"accuracy_test": accuracy, "epochs": 4, "format": "luq-fp4", "rest": rest, "layers": layers, **shares}


def test_a_steps_time_follows_the_layers_that_ran_quantized_epoch_by_epoch():
    row = pareto._row([ran(4, 1, accuracy=0.4), ran(0, 0, accuracy=0.6)], ASSESSED)
    assert row["step_here"] == pytest.approx(((100 - 10 - 10 / 4) + 100) / 200)
    assert row["step_four_bits"] == pytest.approx(1 - 0.5 * 0.75 - 0.25 * 0.5)
    assert row["accuracy"] == pytest.approx(50) and row["accuracy_spread"] == pytest.approx(14.142, abs=1e-3)
    assert pareto._step(ran(4, 1, rest="luq-fp4"), ASSESSED) == pytest.approx(0.8)


def test_the_cheapest_schedule_loses_little():
    rows = {
        "full precision": {"accuracy": 80.0, "step": 1.0},
        "close": {"accuracy": 79.6, "step": 0.7},
        "cheap": {"accuracy": 79.4, "step": 0.5},
    }
    assert pareto._cheapest(rows, "step") == "close"


def test_tables_whose_positives_are_rare_have_their_metrics_on_the_page(tmp_path):
    metrics = {"average_precision": [58.0, 59.0], "roc_auc": [94.0], "recall_at_1_percent_fpr": [36.0]}
    summary = {"static 0.9": {**RESULTS["summary"]["static 0.9"], "metrics": metrics}}
    (tmp_path / "tables-3.json").write_text(json.dumps({"summary": summary, "missing": []}))
    found = paper.refreshed("<!-- results: tables-3 -->\n<!-- end -->", tmp_path)
    assert "| average precision, % | area under the ROC curve, % |" in found
    assert "| static 0.9 | 58.50 ± 0.71 | 94.00 | 36.00 | 2 |" in found


def test_a_summary_has_the_metrics_beside_accuracy(commands, tmp_path):
    commands.record = {**RECORD, "metrics_test": {"accuracy": 0.5, "roc_auc": 0.75}}
    rows = do_table(TABLE, site(tmp_path, commands))
    assert rows["a"]["metrics"] == {"roc_auc": [75.0, 75.0]}


def test_rows_and_seeds_can_be_chosen(commands, tmp_path):
    do_table(TABLE, site(tmp_path, commands, rows="mine/b*", seeds=1))
    assert len(commands) == 1 and "--lr 2" in " ".join(commands[0])
    results = json.loads((tmp_path / "results" / "mine.json").read_text())
    assert results["missing"] == ["a, seed 0", "a, seed 1", "b, seed 1"]
