# SPDX-License-Identifier: Apache-2.0
"""`report`, `verify` and `total` on a run: what was edited is seen, and what is no run is one line."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys

import pytest

from dpquant.app.cli import run as command
from dpquant.app.report import facts_of
from dpquant.app.spent import total
from dpquant.app.verify import verify
from dpquant.errors import DataError, SettingError
from dpquant.privacy import accounting
from dpquant.privacy.ledger import Ledger
from dpquant.runs.names import CONFIG, DESCRIPTION, LEDGER, METRICS, MODEL, RECORD, REPORT
from dpquant.runs.record import RunRecord
from dpquant.runs.settings import TrainSettings
from dpquant.runs.train import train

SETTINGS = {
    "model": "mlp", "width": 0.1, "epochs": 2, "batch_size": 64.0, "backend": "simulate", "microbatch_size": 64,
    "policy": "dpquant", "noise_multiplier": 1.0, "lr": 0.1,
    "declared": {"justification": "as an example"}, "records_per_person": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that has ended."""
    out = tmp_path_factory.mktemp("runs") / "one"
    train(TrainSettings.chosen(SETTINGS), out, command="dpquant train --out /home/somebody/one")
    return out


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it, to be changed."""
    return shutil.copytree(finished, tmp_path / "run")


def test_a_sound_run_verifies_and_its_record_says_what_the_ledger_says(run, capsys):
    found = verify(run)
    assert found.holds and len(found.findings) >= 20 and found.skipped == []
    record, contents = RunRecord.read(run / RECORD), Ledger.verify(run / LEDGER)
    assert record.ledger.head == contents.head and record.provenance.run_id == contents.run
    assert record.epsilon == accounting.epsilon(record.ledger.events, record.delta)
    assert record.plan.records_per_person == 2 and record.records == 1442
    assert "up to 2 records" in record.statement and record.declared == SETTINGS["declared"]
    assert command(["verify", str(run)]) == 0
    assert "all hold" in capsys.readouterr().out.splitlines()[-1]
    assert command(["verify", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["holds"] is True


def edited(name, change):
    def edit(run):
        fields = json.loads((run / name).read_text())
        change(fields)
        (run / name).write_text(json.dumps(fields))

    return edit


def record(change):
    return edited(RECORD, change)


def cut_ledger(run):
    lines = (run / LEDGER).read_bytes().splitlines(keepends=True)
    (run / LEDGER).write_bytes(b"".join(lines[:-1]))


def flipped_ledger(run):
    data = bytearray((run / LEDGER).read_bytes())
    data[len(data) // 2] ^= 1
    (run / LEDGER).write_bytes(bytes(data))


def less_noise_in_the_config(run):
    text = (run / CONFIG).read_text()
    (run / CONFIG).write_text(text.replace("noise_multiplier = 1.0", "noise_multiplier = 2.0"))


def other_weights(run):
    data = bytearray((run / MODEL).read_bytes())
    data[-1] ^= 1
    (run / MODEL).write_bytes(bytes(data))


def other_metrics(run):
    (run / METRICS).write_text((run / METRICS).read_text().replace('"accuracy_test": 0.', '"accuracy_test": 0.9'))


WRONG = {
    "epsilon halved": (record(lambda r: r.update(epsilon=r["epsilon"] / 2)), "epsilon"),
    "another delta": (record(lambda r: r.update(delta=1e-9)), "epsilon"),
    "another head": (record(lambda r: r["ledger"].update(head="0" * 64)), "ledger: head"),
    "fewer steps charged": (record(lambda r: r["ledger"]["events"][0].update(count=1)), "ledger: events"),
    "the second accountant": (record(lambda r: r.update(epsilon_rdp=1.0)), "epsilon: Renyi accounting"),
    "the share of analyses": (record(lambda r: r.update(epsilon_analysis_share=0.5)), "epsilon: share of analyses"),
    "the plan": (record(lambda r: r["plan"].update(steps=3)), "plan: other numbers"),
    "the noise": (record(lambda r: r.update(noise_multiplier=2.0)), "plan: noise_multiplier"),
    "the statement": (
        record(lambda r: r.update(statement=re.sub(r"epsilon = [\d.]+", "epsilon = 0.5", r["statement"], count=1))),
        "statement: epsilon and delta",
    ),
    "the model's name": (record(lambda r: r.update(model="cnn")), "settings"),
    "accuracy": (record(lambda r: r.update(accuracy_test=0.99)), "epochs: last test accuracy"),
    "times quantized": (record(lambda r: r["layers"][0].update(times_quantized=99)), "epochs: times quantized"),
    "an epoch's epsilon": (
        record(lambda r: r["per_epoch"][0].update(epsilon=1e6)),
        "epochs: epsilon grows to the total",
    ),
    "the description": (edited(DESCRIPTION, lambda d: d.update(model="cnn")), "model: name"),
    "a ledger that is cut": (cut_ledger, "ledger: head"),
    "a ledger with a flipped bit": (flipped_ledger, "ledger: chain of hashes"),
    "no ledger": (lambda run: (run / LEDGER).unlink(), "ledger: chain of hashes"),
    "the settings": (less_noise_in_the_config, "plan: noise_multiplier"),
    "the model": (other_weights, "model: SHA-256"),
    "no model": (lambda run: (run / MODEL).unlink(), "model"),
    "the metrics": (other_metrics, "epochs: metrics"),
    "a report of another record": (lambda run: (run / REPORT).write_text("<p>"), "report"),
}


@pytest.mark.parametrize(("change", "what"), WRONG.values(), ids=WRONG)
def test_what_was_edited_is_one_line_and_exit_code_1(change, what, run, capsys):
    change(run)
    assert command(["verify", str(run)]) == 1
    captured = capsys.readouterr()
    wrong = [line for line in captured.out.splitlines() if line.startswith("WRONG")]
    assert captured.err == "" and any(line.startswith(f"WRONG  {what}: ") for line in wrong), captured.out
    assert "WRONG." in captured.out.splitlines()[-1] and "Traceback" not in captured.out


def test_a_report_of_an_edited_run_says_so_on_top(run, capsys):
    WRONG["epsilon halved"][0](run)
    assert command(["report", str(run)]) == 0
    page = (run / REPORT).read_text()
    assert "checks do not hold" in page.split('id="promise"')[0] and "is said to limit" in page


def test_a_report_is_of_its_record_and_leaves_out_what_is_redacted(run, tmp_path, capsys):
    assert command(["report", str(run)]) == 0
    assert "report.html" in capsys.readouterr().out and verify(run).holds
    page = (run / REPORT).read_text()
    assert "/home/somebody/one" in page and "as an example" in page and "Of a person" in page
    out = tmp_path / "page.html"
    assert command(["report", str(run), "--redact", "--out", str(out)]) == 0
    assert not any(words in out.read_text() for words in ("/home/somebody", "as an example", "microbatch_size = 64"))


def test_the_json_of_a_report_has_typed_numbers(run, capsys):
    assert command(["report", str(run), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["epsilon"] == RunRecord.read(run / RECORD).epsilon and found["holds"] is True
    assert len(found["answers"]) == 24 and len(found["meaning"]["attacks"]) == 3 and found["alarms"] == []
    assert [one["records"] for one in found["persons"]] == [1, 2, 5, 10] and not (run / REPORT).exists()


def test_an_export_verifies_and_its_report_names_no_folder_of_the_machine(run, tmp_path, capsys):
    out = tmp_path / "out"
    assert (
        command(["export", str(run), str(out)]) == command(["report", str(out)]) == command(["verify", str(out)]) == 0
    )
    assert "summary of an export" in capsys.readouterr().out
    page = (out / REPORT).read_text()
    assert "/home/somebody" not in page and "do not hold" not in page
    summary = json.loads((out / "ledger.json").read_text())
    summary["events"][0]["noise_multiplier"] *= 2
    (out / "ledger.json").write_text(json.dumps(summary))
    assert command(["verify", str(out)]) == 1 and "WRONG  epsilon:" in capsys.readouterr().out


def test_card_and_registry_are_written_beside_it(run, tmp_path, capsys):
    card, draft = tmp_path / "README.md", tmp_path / "entry.yaml"
    assert command(["report", str(run), "--card", str(card), "--registry", str(draft)]) == 0
    assert "differential-privacy" in card.read_text() and "tier: 3" in draft.read_text()
    capsys.readouterr()
    assert command(["report", str(run), str(run), "--card", str(card)]) == 2
    assert "Expected one run" in capsys.readouterr().err


def test_several_runs_are_compared_with_what_they_cost_together(run, finished, tmp_path, capsys):
    out = tmp_path / "both.html"
    assert command(["report", str(run), str(finished), "--out", str(out)]) == 0
    assert "2 runs compared" in out.read_text() and "it is counted once" in out.read_text()


@pytest.mark.parametrize("name", [LEDGER, MODEL, DESCRIPTION, METRICS, CONFIG])
def test_a_report_without_one_of_the_files_is_made_all_the_same(name, run):
    (run / name).unlink()
    found = facts_of(run)
    assert found.record.model == "mlp" and bool(found.wrong) == (name in (LEDGER, MODEL, CONFIG))


def test_a_run_that_has_not_ended_or_is_none_is_one_line(run, tmp_path, capsys):
    (run / RECORD).unlink()
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for verb in ("report", "verify"):
        for where, said in (("run", "dpquant resume"), ("empty", "directory of a run"), ("nowhere", "a run")):
            assert command([verb, str(tmp_path / where)]) == 2
            captured = capsys.readouterr()
            assert captured.out == "" and captured.err.count("\n") == 1 and said in captured.err, captured.err
    (run / RECORD).write_text("{")
    for reads in (facts_of, verify):
        with pytest.raises(DataError, match="Expected a run's record"):
            reads(run)
    with pytest.raises(SettingError, match="directory of a run"):
        facts_of(tmp_path / "file")


def test_a_run_that_is_given_twice_counts_once(run, finished, capsys):
    once = verify(run)
    assert once.holds
    epsilon = RunRecord.read(run / RECORD).epsilon
    assert command(["total", str(run), str(run), str(finished)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.count("counted once") == 2 and f"epsilon = {epsilon:.2f}"[:-1] in shown
    found = total([run, finished])
    assert found.account.together.epsilon == pytest.approx(epsilon) and len(found.notes) == 1
    assert command(["total", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["epsilon"] == pytest.approx(epsilon)


def test_other_runs_add_up_and_two_states_of_one_run_both_count(run, finished, tmp_path):
    other = tmp_path / "other"
    contents = Ledger.verify(run / LEDGER)
    ledger = Ledger(other, budget=contents.budget)
    for event in contents.events:
        ledger.charge(**{f.name: getattr(event, f.name) for f in dataclasses.fields(event) if f.name != "research"})
    ledger.close()
    both = total([run, other])
    assert both.account.together.epsilon > 1.3 * total([run]).account.together.epsilon and both.notes == []
    lines = (run / LEDGER).read_bytes().splitlines(keepends=True)
    (run / LEDGER).write_bytes(b"".join(lines[:-1]))
    (note,) = total([run, finished]).notes
    assert "both are counted" in note


def test_the_verbs_load_no_torch(run):
    code = f"""if True:
        import sys
        from dpquant.app.cli import run
        assert run(['report', {str(run)!r}]) == run(['verify', {str(run)!r}]) == run(['total', {str(run)!r}]) == 0
        sys.exit('torch' in sys.modules)"""
    assert subprocess.run([sys.executable, "-c", code], check=False, stdout=subprocess.DEVNULL).returncode == 0


def test_train_writes_a_report_unless_it_is_told_not_to(tmp_path, capsys):
    common = ["--epochs", "1", "--model", "mlp", "--width", "0.1", "--policy", "none", "--noise-multiplier", "1"]
    common += ["--backend", "simulate", "--microbatch-size", "64"]
    assert command(["train", *common, "--out", str(tmp_path / "a")]) == 0
    assert verify(tmp_path / "a").holds and (tmp_path / "a" / REPORT).exists()
    assert command(["train", *common, "--no-report", "--out", str(tmp_path / "b")]) == 0
    assert not (tmp_path / "b" / REPORT).exists()
