# SPDX-License-Identifier: Apache-2.0
"""`dpquant predict`: what a model says of files, by model.json alone; what cannot be read is one line, and no end."""

import csv
import io
import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import dpquant
from dpquant.app.cli import run as command
from dpquant.app.predict import predict
from dpquant.data.task import Task
from dpquant.runs.names import CONFIG, DESCRIPTION, MODEL, RECORD, TOKENIZER
from dpquant.runs.predictions import predictions
from dpquant.runs.settings import TrainSettings
from dpquant.runs.sources import dataset_of
from dpquant.runs.train import train
from sources import images, regression, table, texts

MAKE = {"images": images, "table": table, "regression": regression, "texts": texts}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """{kind: (a run on such records that has ended, its data set)}; only what `predict` may need is there."""
    found = {}
    for name, make in MAKE.items():
        folder = tmp_path_factory.mktemp(name)
        settings = TrainSettings.chosen(make(folder))
        train(settings, folder / "run")
        dataset = dataset_of(settings)
        alone = tmp_path_factory.mktemp("alone") / name
        alone.mkdir()
        for file in (DESCRIPTION, MODEL, RECORD, CONFIG, TOKENIZER):
            if (folder / "run" / file).exists():
                shutil.copy(folder / "run" / file, alone)
        found[name] = (alone, dataset, folder)
    return found


def predicted(capsys, *arguments, code=0):
    """The objects that `predict` prints, and its lines on standard error."""
    capsys.readouterr()
    assert command(["predict", *map(str, arguments)]) == code
    captured = capsys.readouterr()
    return [json.loads(line) for line in captured.out.splitlines()], captured.err.splitlines()


def expected_of(run, dataset, ids):
    with torch.no_grad():
        return dpquant.load(run)(dataset.test.batch(torch.tensor(ids))[0]).softmax(1)


def test_images_are_read_as_in_training(finished, capsys):
    run, dataset, folder = finished["images"]
    files = sorted((folder / "photos" / "test" / "bright").iterdir())[:3]
    found, errors = predicted(capsys, run, *files)
    assert errors == [] and [one["file"] for one in found] == [str(file) for file in files]
    shares = expected_of(run, dataset, [0, 1, 2])
    for one, row in zip(found, shares, strict=True):
        assert one["label"] == dataset.class_names[row.argmax()]
        assert one["probability"] == pytest.approx(float(row.max()), abs=1e-5)


def test_a_table_needs_no_label_and_other_columns_are_left_aside(finished, tmp_path, capsys):
    run, _, folder = finished["table"]
    found, errors = predicted(capsys, run, folder / "t.csv")
    assert errors == [] and [one["row"] for one in found] == list(range(1, 81))
    (tmp_path / "new.csv").write_text("name,country,amount\nAnn,AT,3\nBob,DE,90\n")
    found, errors = predicted(capsys, run, tmp_path / "new.csv")
    assert errors == [] and len(found) == 2
    inputs = torch.tensor([[2 * 3 / 100 - 1, 0.0], [2 * 90 / 100 - 1, 1.0]])
    with torch.no_grad():
        shares = (dpquant.load(run)(inputs) + torch.tensor([math.log(0.75), math.log(0.25)])).softmax(1)
    assert [one["probability"] for one in found] == pytest.approx(shares.max(1).values.tolist(), abs=1e-5)
    assert [one["positive"] for one in found] == pytest.approx(shares[:, 1].tolist(), abs=1e-5)


def test_numbers_are_predicted_in_their_own_unit(finished, tmp_path, capsys):
    run, _, _ = finished["regression"]
    (tmp_path / "new.csv").write_text("country,amount\nAT,3\n")
    (found,), _ = predicted(capsys, run, tmp_path / "new.csv")
    with torch.no_grad():
        output = float(dpquant.load(run)(torch.tensor([[2 * 3 / 100 - 1, 0.0]])))
    assert found["value"] == pytest.approx(1000 * (1 + output), rel=1e-5) and set(found) == {"file", "row", "value"}


def test_texts_come_from_files_and_from_standard_input(finished, tmp_path, capsys, monkeypatch):
    run, dataset, _ = finished["texts"]
    (tmp_path / "new.txt").write_text("bad night\ngood day good day\n")
    found, errors = predicted(capsys, run, tmp_path / "new.txt")
    assert errors == [] and [one["line"] for one in found] == [1, 2]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"bad night\r\ngood day good day")))
    again, errors = predicted(capsys, run, "-")
    assert errors == [] and [one["probability"] for one in again] == [one["probability"] for one in found]
    assert [one["file"] for one in again] == ["-", "-"] and dataset.class_names == ("ham", "spam")


def test_records_are_not_taken_for_texts(finished, tmp_path, capsys):
    (tmp_path / "new.csv").write_text("body,kind\nbad night,ham\n")
    assert command(["predict", str(finished["texts"][0]), str(tmp_path / "new.csv")]) == 2
    told = capsys.readouterr()
    assert told.out == "" and "whose lines are records" in told.err and told.err.count("\n") == 1


def test_several_classes_and_csv(finished, capsys):
    run, _, folder = finished["images"]
    file = folder / "photos" / "test" / "dark" / "0.png"
    (found,), _ = predicted(capsys, run, file, "--top", "2")
    assert [one["label"] for one in found["top"]] in (["bright", "dark"], ["dark", "bright"])
    assert sum(one["probability"] for one in found["top"]) == pytest.approx(1)
    assert found["top"][0] == {"label": found["label"], "probability": found["probability"]}
    assert command(["predict", str(run), str(file), "--csv", "--top", "2"]) == 0
    ((row),) = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert row["file"] == str(file) and row["label"] == found["label"] and row["label_2"] == found["top"][1]["label"]
    assert float(row["probability_2"]) == pytest.approx(found["top"][1]["probability"])


def test_csv_of_rows_and_of_numbers_has_their_columns(finished, tmp_path, capsys):
    (tmp_path / "new.csv").write_text("country,amount\nAT,3\n")
    for kind, header in (("table", "file,row,label,probability,positive"), ("regression", "file,row,value")):
        assert command(["predict", str(finished[kind][0]), str(tmp_path / "new.csv"), "--csv"]) == 0
        first, line = capsys.readouterr().out.splitlines()
        assert first == header and line.startswith(f"{tmp_path / 'new.csv'},1,")


HOSTILE = [
    "<img src=x onerror=alert(1)>.png",
    "a\nb.png",
    "--top.png",
    "'; rm -rf x.png",
    'q"uo,te.png',
    "größe 鳥.png",
]


def test_hostile_names_are_text(finished, tmp_path, capsys):
    run, _, _ = finished["images"]
    files = [tmp_path / name for name in HOSTILE]
    files.append(Path(str(tmp_path / "not\udcffutf8.png")))
    for file in files:
        with file.open("wb") as stream:
            Image.new("L", (8, 8), 100).save(stream, "PNG")
    found, errors = predicted(capsys, run, *files)
    assert errors == [] and [one["file"] for one in found] == [str(file) for file in files]
    assert command(["predict", str(run), "--csv", *map(str, files)]) == 0
    rows = list(csv.reader(io.StringIO(capsys.readouterr().out)))
    assert [row[0] for row in rows[1:-1]] == [str(file) for file in files[:-1]] and "udcff" in rows[-1][0]
    found, errors = predicted(capsys, run, tmp_path / "not\nthere.png", code=2)
    assert found == [] and len(errors) == 1


def unreadable(folder):
    """{what is wrong: a file that cannot be read as an image}."""
    found = {name: folder / f"{name}.png" for name in ("torn", "text", "empty", "nothing", "a folder")}
    Image.new("L", (8, 8)).save(found["torn"])
    found["torn"].write_bytes(found["torn"].read_bytes()[:-30])
    found["text"].write_text("no image")
    found["empty"].write_bytes(b"")
    found["a folder"].mkdir()
    found["float"] = folder / "float.tiff"
    Image.fromarray(np.zeros((8, 8), np.float32)).save(found["float"])
    return found


def test_an_image_that_cannot_be_read_is_one_line_and_the_others_are_predicted(finished, tmp_path, capsys):
    run, _, folder = finished["images"]
    good = folder / "photos" / "test" / "dark" / "0.png"
    bad = unreadable(tmp_path)
    found, errors = predicted(capsys, run, good, *bad.values(), good, code=2)
    assert len(found) == 2 and len(errors) == len(bad)
    for error, file in zip(errors, bad.values(), strict=True):
        assert error.startswith("error: Expected") and str(file) in error


def test_rows_and_lines_that_cannot_be_read_are_named_and_the_others_are_predicted(finished, tmp_path, capsys):
    (tmp_path / "new.csv").write_text("country,amount\nAT,3\nDE,many\nAT,5\nAT\n")
    found, errors = predicted(capsys, finished["table"][0], tmp_path / "new.csv", code=2)
    assert [one["row"] for one in found] == [1, 3]
    assert len(errors) == 2 and "row 2" in errors[0] and "column amount" in errors[0] and "row 4" in errors[1]
    (tmp_path / "new.txt").write_bytes(b"good\n\nb\xfcd\nbad day\n")
    found, errors = predicted(capsys, finished["texts"][0], tmp_path / "new.txt", code=2)
    assert [one["line"] for one in found] == [1, 4]
    assert (len(errors) == 2 and "line 2" in errors[0] and "not UTF-8 in line 3" in errors[1]) or "line 3" in errors[1]


WRONG = {
    "a table for images": ("images", "new.csv", "file of another kind"),
    "standard input for images": ("images", "-", "standard input"),
    "an image for rows": ("table", "new.png", "ends in .csv"),
    "a table without a column": ("table", "less.csv", "to have a column country"),
    "no table": ("table", "none.csv", "not there"),
    "no texts": ("texts", "none.txt", "No such file"),
    "a folder of texts": ("texts", "folder", "Is a directory"),
}


@pytest.mark.parametrize(("kind", "file", "said"), WRONG.values(), ids=WRONG)
def test_an_input_of_another_kind_is_refused_in_one_line(kind, file, said, finished, tmp_path, capsys):
    (tmp_path / "new.csv").write_text("country,amount\nAT,3\n")
    (tmp_path / "less.csv").write_text("amount\n3\n")
    Image.new("L", (8, 8)).save(tmp_path / "new.png")
    (tmp_path / "folder").mkdir()
    found, errors = predicted(capsys, finished[kind][0], file if file == "-" else tmp_path / file, code=2)
    assert found == [] and len(errors) == 1 and said in errors[0]


def test_images_of_another_size_are_refused_where_training_took_them_as_they_are(finished, tmp_path, capsys):
    run = shutil.copytree(finished["images"][0], tmp_path / "run")
    Image.new("L", (9, 8)).save(tmp_path / "wide.png")
    assert predicted(capsys, run, tmp_path / "wide.png")[1] == []  # it is resized, as the run's images were
    fields = json.loads((run / DESCRIPTION).read_text())
    (run / DESCRIPTION).write_text(json.dumps({**fields, "image_size": None}))
    _, (error,) = predicted(capsys, run, tmp_path / "wide.png", code=2)
    assert "8x8 pixels" in error and "9x8" in error


def test_a_run_that_cannot_be_used_is_one_line(finished, tmp_path, capsys):
    run = shutil.copytree(finished["texts"][0], tmp_path / "run")
    (run / TOKENIZER).write_text((run / TOKENIZER).read_text() + " ")
    _, (error,) = predicted(capsys, run, "-", code=2)
    assert "SHA-256" in error and TOKENIZER in error
    (run / TOKENIZER).unlink()
    assert "the tokenizer of the run" in predicted(capsys, run, "-", code=2)[1][0]
    (run / RECORD).unlink()
    assert "Finish it" in predicted(capsys, run, "-", code=2)[1][0]
    assert "Expected the directory of a run" in predicted(capsys, tmp_path / "nowhere", "x", code=2)[1][0]
    assert "Expected top in 1 .. 2" in predicted(capsys, finished["images"][0], "x", "--top", "3", code=2)[1][0]
    assert "Leave it out" in predicted(capsys, finished["regression"][0], "x", "--top", "1", code=2)[1][0]


def test_outputs_that_are_not_finite_have_no_answer():
    outputs = torch.tensor([[0.0, math.nan], [1.0, 0.0], [math.inf, 0.0]])
    found = predictions(outputs, Task(), ["a", "b"], 1)
    assert [one is None for one in found] == [True, False, True] and found[1].labels == ("a",)
    assert predictions(torch.tensor([[math.nan], [9.0]]), Task(kind="regression", low=0, high=10), [], 1)[1].value == 10


def test_a_model_that_raises_is_one_line(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    source = (
        "from torch import nn\n\nclass Picky(nn.Linear):\n    def forward(self, x):\n"
        "        if x.max() > 0.9:\n            raise ValueError('too bright')\n"
        "        return super().forward(x.flatten(1))\n\n"
        "def build(num_classes):\n    return Picky(192, num_classes)\n"
    )
    (tmp_path / "picky_network_of_a_test.py").write_text(source)
    settings = {**images(tmp_path), "model": "picky_network_of_a_test:build", "width": 1.0}
    train(TrainSettings.chosen(settings), tmp_path / "run")
    for name, grey in (("white", 255), ("grey", 100)):
        Image.new("L", (8, 8), grey).save(tmp_path / f"{name}.png")
    found, (error,) = predicted(capsys, "run", "white.png", "grey.png", code=2)
    assert [one["file"] for one in found] == ["grey.png"] and "too bright" in error and "white.png" in error


def test_predictions_are_yielded_as_they_are_made(finished):
    def lines():
        for number in range(130):
            if number == 100:
                raise KeyboardInterrupt
            yield "good day\n"

    class Endless(io.StringIO):
        def __iter__(self):
            return lines()

    run, _, _ = finished["texts"]
    made = predict(run, ["-"], top=None, as_csv=False, standard_input=Endless())
    assert all(next(made)[1] for _ in range(64))
    with pytest.raises(KeyboardInterrupt):
        next(made)
    assert isinstance(dpquant.load(run), nn.Module)
