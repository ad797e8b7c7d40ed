# SPDX-License-Identifier: Apache-2.0
"""`dpquant audit`: an honest run is not refuted, one whose noise is missing or halved is, and the copy is charged."""

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from dpquant.app.cli import run
from dpquant.app.verbs.audit import report
from dpquant.audits.canaries import Canaries
from dpquant.audits.one_run import Attacker, one_run
from dpquant.audits.report import LEVEL, AuditRequest, audit
from dpquant.engine.batches import leaves
from dpquant.errors import SettingError
from dpquant.privacy.accounting import epsilon
from dpquant.privacy.ledger import Ledger
from dpquant.runs.settings import TrainSettings
from dpquant.runs.sources import dataset_of, form_of
from dpquant.runs.train import train
from mechanisms import repeating
from sources import images, regression, table, texts

SMALL = {"model": "mlp", "policy": "dpquant", "epochs": 1, "microbatch_size": 64, "backend": "simulate", "threads": 1}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(TrainSettings.chosen(SMALL), folder)
    return folder


def half(gaussian, shape, std, **purpose):
    return gaussian(shape, std / 2, **purpose)


def silent(gaussian, shape, std, **purpose):
    return torch.zeros(tuple(shape))


@pytest.fixture(scope="module")
def audited(trained):
    """All trials of a run, small ones."""
    request = AuditRequest(canaries=40, taps=400, plays=6)
    return audit(trained, request, out=trained.with_name("copy"), command="dpquant audit run")


def test_the_training_with_canaries_is_charged_and_a_claim_above_the_ceiling_stands(audited):
    found = json.loads(audited.to_json())
    one, out = found["one_run"], Path(found["copy"])
    assert found["refuted"] is False and len(found["taps"]) == 2 and len(found["games"]) == 3
    assert all(game["p_value"] > 1e-6 for game in found["games"]) and one["p_value"] > 1e-6
    assert one["epsilon_claimed"] == pytest.approx(epsilon(Ledger.read(out / "ledger.jsonl"), 1e-4))
    assert one["canaries"] == 40 and one["guesses"][0]["made"] == 40
    assert 0 <= one["epsilon_bound"] <= one["epsilon_bound_gaussian"] + 0.5 and one["ceiling"] < 8
    assert one["detectable"] is None and set(one["power"].values()) == {0.0}
    assert (out / "config.toml").read_text().count("choices =") == 1, "it makes the decisions that the run made"


def test_an_audit_is_told_with_what_it_cannot_show(audited, capsys):
    assert report(Console(width=200), audited, as_json=False) == 0
    printed = capsys.readouterr().out
    assert all(words in printed for words in ("DO NOT RELEASE IT", "game, analysis, one record", "no claim above"))


def test_taps_are_told_with_their_power(trained, capsys):
    assert run(["audit", str(trained), "--mode", "tap"]) == 0
    printed = capsys.readouterr().out
    for words in ("taps, full precision: noise", "taps, luq-fp4: mean", "halved: 100%", "Not refuted"):
        assert words in " ".join(printed.split()), words
    assert not list(trained.parent.glob("run-audit-*")), "no record was read, and no copy made"


def test_a_refuted_run_has_an_exit_code_of_its_own(trained, tmp_path, capsys):
    request = AuditRequest(mode="tap", taps=400)
    found = audit(trained, request, out=tmp_path / "none", start=repeating(gaussian=half))
    assert found.refuted and not (tmp_path / "none").exists()
    assert report(Console(), found, as_json=False) == 1 and "REFUTED" in capsys.readouterr().out
    assert report(Console(quiet=True), found, as_json=True) == 1
    assert json.loads(capsys.readouterr().out)["refuted"] is True


def test_a_training_without_noise_is_refuted(tmp_path):
    """One that learns its records by heart, and claims little."""
    settings = TrainSettings.chosen(
        {
            **SMALL,
            "model": "doubles:that_remembers",
            "policy": "none",
            "noise_multiplier": 20.0,
            "epochs": 6,
            "lr": 30.0,
            "momentum": 0.0,
            "microbatch_size": 256,
        }
    )
    attacker = Attacker(form_of(settings), 120, 0, repeating(3, gaussian=silent))
    found = one_run(settings, tmp_path / "copy", attacker=attacker, alpha=LEVEL)
    assert found.p_value < LEVEL and found.epsilon_bound_gaussian > found.epsilon_bound > found.epsilon_claimed
    assert found.ceiling > found.epsilon_claimed and found.detectable is not None


KINDS = {"images": images, "rows": table, "a regression": regression, "texts": texts}


@pytest.mark.parametrize("kind", KINDS)
def test_canaries_follow_from_the_seed_and_join_by_their_coins(kind, tmp_path):
    dataset = dataset_of(TrainSettings.chosen(KINDS[kind](tmp_path)))
    records = dataset.train
    canaries, same, others = (Canaries.for_records(records, dataset, 200, seed) for seed in (1, 1, 2))
    assert torch.equal(canaries.inputs, same.inputs) and torch.equal(canaries.inside, same.inside)
    assert not torch.equal(canaries.inside, others.inside) and 60 < canaries.inside.sum() < 140
    together, alone = canaries.among(records), canaries.alone(records)
    assert len(together) == len(records) + canaries.inside.sum() and len(alone) == 200
    assert all(map(torch.equal, leaves_of(together, torch.arange(9)), leaves_of(records, torch.arange(9))))
    joined = torch.arange(len(records), len(together))
    inside = canaries.inside.nonzero().flatten()
    assert all(map(torch.equal, leaves_of(together, joined), leaves_of(alone, inside)))
    outside = (~canaries.inside).nonzero().flatten()[: len(joined)]
    assert not torch.equal(leaves_of(together, joined[: len(outside)])[0], leaves_of(alone, outside)[0])
    assert bool(together.readable[len(records) :].all())


def leaves_of(records, ids):
    return [leaf for _, leaf in leaves(records.batch(ids))]


@pytest.mark.parametrize("kind", ["rows", "a regression", "texts"])
def test_a_training_on_rows_or_texts_is_audited(kind, tmp_path):
    settings = TrainSettings.chosen(KINDS[kind](tmp_path))
    form = form_of(settings)
    found = one_run(settings, tmp_path / "copy", attacker=Attacker(form, 40, 0), alpha=LEVEL)
    assert found.canaries == 40 and found.p_value > 1e-6 and (found.accuracy_test is None) == (kind == "a regression")


def test_a_training_on_rows_without_noise_is_refuted(tmp_path):
    """The planted fault: a training that claims little and learns its rows by heart."""
    changes = {
        "model": "doubles:rows_that_are_remembered",
        "noise_multiplier": 20.0,
        "epochs": 6,
        "lr": 30.0,
        "optimizer": "sgd",
    }
    given = {**table(tmp_path), **changes, "momentum": 0.0, "policy": "none", "records": 60, "microbatch_size": 64}
    del given["width"]
    settings = TrainSettings.chosen(given)
    attacker = Attacker(form_of(settings), 120, 0, repeating(3, gaussian=silent))
    assert one_run(settings, tmp_path / "copy", attacker=attacker, alpha=LEVEL).p_value < LEVEL


def test_packed_records_are_refused_with_the_way(tmp_path):
    (tmp_path / "config.toml").write_text('data = "packed:p"\nrecords = 900\nnoise_multiplier = 1.0\npolicy = "none"\n')
    with pytest.raises(SettingError, match="--mode tap"):
        audit(tmp_path, AuditRequest(canaries=40, mode="one-run"), out=tmp_path / "copy")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--mode", "best"], "mode=best"),
        (["--canaries", "3"], "canaries=3"),
        (["--canaries", "5000"], "canaries=5000"),
        (["--seed", "-1"], "seed=-1"),
    ],
)
def test_bad_options_are_refused_before_anything_is_run(trained, capsys, options, words):
    assert run(["audit", str(trained), *options]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and words in captured.err
    assert not list(trained.parent.glob("run-audit-*"))


def test_what_is_no_run_is_refused(tmp_path, trained, capsys):
    assert run(["audit", str(tmp_path)]) == 2 and "holds no config.toml" in capsys.readouterr().err
    assert run(["audit", str(trained), "--out", str(trained)]) == 2 and "new or empty" in capsys.readouterr().err
