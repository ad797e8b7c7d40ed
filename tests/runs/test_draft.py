# SPDX-License-Identifier: Apache-2.0
"""A drafted file of settings: it names all of them, and runs as it is what was asked for."""

import dataclasses
import re

import pytest

from dpquant.app.cli import run
from dpquant.errors import SettingError
from dpquant.runs.declared import QUESTIONS
from dpquant.runs.draft import drafted
from dpquant.runs.settings import TrainSettings, from_toml
from sources import table

ASKED = [
    {},
    {"data": "image-folder:my photos", "records": 480, "epsilon": 3.0},
    {"data": "fashion-mnist", "policy": "dpquant", "macs": 0.9, "noise_multiplier": 1.0, "fix": True},
    {
        "data": "text:a.csv",
        "text_column": "t",
        "label_column": "l",
        "classes": "a,b",
        "records": 900,
        "test_share": 0.1,
    },
]


@pytest.mark.parametrize("given", ASKED)
def test_a_draft_runs_as_it_is_what_was_asked_for(given, tmp_path):
    (tmp_path / "config.toml").write_text(drafted(given))
    assert TrainSettings.chosen({}, from_toml(tmp_path / "config.toml")) == TrainSettings.chosen(given)


@pytest.mark.parametrize("given", ASKED)
def test_every_comment_with_a_value_is_its_default(given, tmp_path):
    """Taking the # off every line that has a value changes nothing."""
    text, values = re.subn(r"(?m)^# (\w+ = )(?!  )", r"\1", drafted(given))
    assert values > 15
    (tmp_path / "config.toml").write_text(text)
    assert TrainSettings.chosen({}, from_toml(tmp_path / "config.toml")) == TrainSettings.chosen(given)


def test_every_setting_and_every_question_is_there_once_and_the_users_words_come_last():
    text = drafted({})
    for field in dataclasses.fields(TrainSettings):
        if field.metadata["option"]:
            assert len(re.findall(rf"(?m)^#? ?{field.name} (=|has)", text)) == 1, field.name
    words = text[text.index("[declared]") :]
    assert all(f'# {name} = ""' in words for name in QUESTIONS) and " lr " not in words
    assert "# lr = 0.2    # from digits" in text and max(map(len, text.splitlines())) <= 120


def test_what_is_no_run_is_not_drafted():
    with pytest.raises(SettingError, match="epochs"):
        drafted({"epochs": 0})


def test_init_writes_a_file_once_and_the_same_command_trains_with_it(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    short = ["--epochs", "1", "--microbatch-size", "64", "--width", "0.5"]
    assert run(["init", *short]) == 0
    assert capsys.readouterr().out == "" and run(["init", *short]) == 2, "nothing is overwritten"
    assert run(["train", "--config", "config.toml", "--out", "run", "--no-report", "-q"]) == 0
    assert TrainSettings.chosen({}, from_toml(tmp_path / "run" / "config.toml")) == TrainSettings.chosen(
        {"epochs": 1, "microbatch_size": 64, "width": 0.5}
    )


def test_init_of_a_table_says_what_to_do_with_the_draft(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table(tmp_path)
    assert run(["init", "--table", "t.csv", "--label-column", "label", "--out", "my spec.toml"]) == 0
    told = capsys.readouterr().err
    assert "dpquant plan --data table:t.csv --label-column label --spec 'my spec.toml' --test FILE" in told
