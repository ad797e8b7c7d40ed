# SPDX-License-Identifier: Apache-2.0
import json

import pytest

from dpquant import compare as module
from dpquant.cli import run
from dpquant.compare import compare, half_width
from dpquant.errors import SettingError
from dpquant.settings import TrainSettings

SMALL = {"epochs": 1, "microbatch_size": 32, "backend": "simulate"}


def settings(**given):
    return TrainSettings.chosen({**SMALL, **given})


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "compare"
    return out, compare(settings(), ["none", "rotate"], 2, out)


def test_every_policy_is_run_at_every_seed(compared):
    out, comparison = compared
    assert {path.name for path in out.iterdir()} == {
        "none-0", "none-1", "rotate-0", "rotate-1", "compare.json", "compare.png"
    }  # fmt: skip
    assert {name: len(row.accuracies) for name, row in comparison.rows.items()} == {"none": 2, "rotate": 2}
    none, rotated = comparison.rows["none"], comparison.rows["rotate"]
    assert none.quantized_fraction_macs == 0 < rotated.four_bit_fraction_macs
    assert none.epsilon <= 8 and rotated.half_width > 0
    assert json.loads((out / "compare.json").read_text())["rows"]["none"]["mean"] == none.mean
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_all_runs_together_cost_more_than_one_and_no_more_than_their_sum(compared):
    _, comparison = compared
    each = [row.epsilon for row in comparison.rows.values() for _ in row.accuracies]
    assert max(each) < comparison.epsilon_together <= sum(each)


def test_what_is_done_is_not_repeated_and_other_settings_are_refused(compared, monkeypatch):
    out, comparison = compared
    monkeypatch.setattr(module, "train", lambda *a, **k: pytest.fail("trained again"))
    assert compare(settings(), ["none", "rotate"], 2, out).rows == comparison.rows
    with pytest.raises(SettingError, match="of others"):
        compare(settings(lr=0.3), ["none"], 1, out)
    with pytest.raises(pytest.fail.Exception):
        compare(settings(), ["all"], 1, out)


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
