# SPDX-License-Identifier: Apache-2.0
"""`dpquant check-model` collects everything for which a run would refuse a model, and says nothing of a sound one."""

import dataclasses
import functools
import json
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

from doubles import OfTexts
from dpquant.app.check_model import check_model
from dpquant.app.cli import run
from dpquant.app.output import results
from dpquant.app.verbs.check_model import print_model_check
from dpquant.checks.isolation import Findings, check_isolation
from dpquant.data import dataset as data
from dpquant.data.form import Form
from dpquant.data.pack import pack
from dpquant.runs.settings import TrainSettings
from dpquant.runs.sources import dataset_of, form_of
from sources import as_options, images, regression, table, texts
from words import VOCABULARY, bert_in

VECTORS = Form(input_shape=(6,), num_classes=3)
TEXTS = Form(input_shape=(5,), num_classes=3, vocabulary=12)
IMAGES = Form(input_shape=(1, 8, 8), num_classes=3)


def checked(model, form=VECTORS, **keywords):
    return check_model(model, form, **keywords)


def stages(found):
    return [(one.stage, one.module) for one in found.findings]


class Vectors(nn.Module):
    """Two linear layers with something between them."""

    def __init__(self, between=lambda net, x: x):
        super().__init__()
        self.body, self.head, self.between = nn.Linear(6, 6), nn.Linear(6, 3), between

    def forward(self, x):
        return self.head(self.between(self, torch.tanh(self.body(x))))


def less_the_mean(net, x):
    return x - x.mean(0)


class Recurrent(nn.Module):
    def __init__(self, trained=True):
        super().__init__()
        self.table = nn.Embedding(12, 4)
        self.lstm, self.head = nn.LSTM(4, 4, batch_first=True), nn.Linear(4, 3)
        self.lstm.requires_grad_(trained)

    def forward(self, x):
        return self.head(self.lstm(self.table(x))[0][:, -1])


class Tied(nn.Module):
    """A table that is the head's weight as well; by hand, behind its module's back."""

    def __init__(self, by_hand=False):
        super().__init__()
        self.table, self.head = nn.Embedding(12, 4), nn.Linear(4, 12, bias=False)
        if not by_hand:
            self.head.weight = self.table.weight
        self.by_hand, self.last = by_hand, nn.Linear(12, 3)

    def forward(self, x):
        found = self.table(x).mean(1)
        return self.last(found @ self.table.weight.T if self.by_hand else self.head(found))


def test_a_sound_model_passes_in_both_precisions_and_its_layers_are_listed():
    found = checked(nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(144, 3)), IMAGES)
    assert found.passed and found.probe == {"full precision": "passed", "quantized": "passed"}
    conv, norm, head = found.layers
    assert (conv.kind, conv.parameters, conv.macs, conv.format, conv.reason) == ("Conv2d", 40, 36 * 36, "luq-fp4", "")
    assert (norm.kind, norm.macs, norm.format, norm.reason) == ("GroupNorm", None, None, "no matrix product")
    assert (head.name, head.parameters, head.macs) == ("3", 435, 432)


def test_all_findings_come_at_once():
    net = Vectors(less_the_mean)
    net.head = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 4))
    found = checked(net)
    assert stages(found) == [("type", "head.0"), ("outputs", ""), ("full precision", "")]
    norm, outputs, coupled = found.findings
    assert norm.kind == "BatchNorm1d" and norm.fix is not None and "GroupNorm" in norm.fix
    assert "shape (2, 4)" in outputs.problem and "depends on the rest of the batch" in coupled.problem
    assert "copy" in found.probed and found.probe == {"full precision": "failed", "quantized": "not run"}


def test_a_normalization_is_fixed_if_asked_and_the_fixed_model_is_checked():
    net = nn.Sequential(nn.Linear(6, 32), nn.BatchNorm1d(32), nn.Tanh(), nn.Linear(32, 3))
    found = checked(net, fixed=True)
    assert found.passed and found.probed == "the model"
    assert found.fixed_model is not None and "GroupNorm" in found.fixed_model and "BatchNorm" not in found.fixed_model
    coupled = nn.Sequential(nn.BatchNorm1d(6), Vectors(less_the_mean))
    assert stages(checked(coupled, fixed=True)) == [("full precision", "")]


def test_a_trained_lstm_passes_and_so_does_a_frozen_one():
    found = checked(Recurrent(), TEXTS)
    assert found.passed
    assert [(one.name, one.format) for one in found.layers[1:]] == [("lstm", "luq-fp4"), ("head", "luq-fp4")]
    found = checked(Recurrent(trained=False), TEXTS)
    assert found.passed
    notes = {layer.name: layer.notes for layer in found.layers}
    assert notes == {"table": "", "lstm": "frozen", "head": ""}


def test_tied_weights_pass_and_are_counted_once_but_not_if_tied_by_hand():
    found = checked(Tied(), TEXTS)
    assert found.passed
    assert [(one.parameters, one.notes) for one in found.layers[:2]] == [(48, ""), (0, "shares parameters with table")]
    by_hand = checked(Tied(by_hand=True), TEXTS)
    assert stages(by_hand) == [("full precision", "")] and "table.weight" in by_hand.findings[0].problem


def test_a_model_without_anything_to_train_is_refused():
    found = checked(Vectors().requires_grad_(False))
    assert stages(found) == [("type", "")] and found.findings[0].fix and "requires_grad_" in found.findings[0].fix


@pytest.mark.parametrize(
    ("model", "stage", "said"),
    [
        (Vectors(lambda net, x: x[:, :3]), "outputs", "RuntimeError"),
        (Vectors().double(), "outputs", "RuntimeError"),
        (Vectors(lambda net, x: x * torch.rand(len(x)).flip(0)[:, None]), "full precision", "rest of the batch"),
    ],
    ids=["shapes that do not fit", "another type", "random numbers by place"],
)
def test_other_models_are_refused_with_the_reason(model, stage, said):
    found = checked(model)
    assert stages(found) == [(stage, "")] and said in found.findings[0].problem


def test_a_network_that_cannot_read_the_shortest_texts_is_refused_as_a_run_refuses_it(tmp_path):
    form = form_of(TrainSettings.chosen(texts(tmp_path)))
    reads = functools.partial(OfTexts, form.vocabulary, 2)
    assert form.lengths == (16, 32, 40) and checked(reads(16), form).passed
    found = checked(reads(17), form)
    assert stages(found) == [("outputs", "")] and "texts of 16 tokens" in found.findings[0].problem
    assert checked(reads(17), dataclasses.replace(form, lengths=(40,))).passed  # as if all had the largest length


def test_an_error_names_the_users_line():
    found = checked(Vectors(lambda net, x: x[:, :3]))
    line = Vectors.forward.__code__.co_firstlineno + 1
    assert f"test_check_model.py:{line})" in found.findings[0].problem
    assert found.probe == {"full precision": "not run", "quantized": "not run"}


def test_a_model_that_cannot_be_saved_is_refused():
    net = Vectors()
    whole = torch.zeros(8)
    net.register_buffer("low", whole[:5])
    net.register_buffer("high", whole[3:])
    assert stages(checked(net)) == [("saving", "")]


def blind(objective, specimens):
    """A live check that is disabled."""
    return Findings(objective=objective, compared=objective, macs={}, specimens=next(specimens))


def assert_hidden_coupling_is_found(isolate):
    found = checked(Vectors(less_the_mean), format="full", isolate=isolate)
    assert stages(found) == [("full precision", "")]


def test_a_coupling_that_no_type_shows_is_found_by_the_live_check():
    assert_hidden_coupling_is_found(check_isolation)


def test_a_coupling_is_not_found_where_the_live_check_is_disabled():
    with pytest.raises(AssertionError):
        assert_hidden_coupling_is_found(blind)


KINDS = {
    "digits": lambda folder: {"data": "digits"},
    "digits, resized": lambda folder: {"data": "digits", "image_size": 12, "normalize": "0.3:0.2"},
    "images": images,
    "a table": table,
    "a regression": regression,
    "texts": texts,
    "packed images": lambda folder: packed(images, folder),
    "packed rows": lambda folder: packed(table, folder),
    "packed texts": lambda folder: packed(texts, folder),
}


def packed(make, folder):
    settings = TrainSettings.chosen(make(folder))
    pack(lambda store: dataset_of(settings, store), folder / "packed")
    return {"data": f"packed:{folder / 'packed'}"}


def said(form):
    """The fields of a form, in words."""
    fields = {field.name: getattr(form, field.name) for field in dataclasses.fields(Form)}
    return {**fields, "synthetic": str(fields["synthetic"])}


@pytest.mark.parametrize("kind", KINDS)
def test_the_form_of_a_data_set_is_that_of_its_records(kind, tmp_path):
    settings = TrainSettings.chosen(KINDS[kind](tmp_path))
    form, dataset = form_of(settings), dataset_of(settings)
    assert said(form) == said(dataset)
    inputs, _ = dataset.train[0]
    assert isinstance(inputs, dict) or inputs.shape == form.input_shape
    assert said(form) != said(dataclasses.replace(form, num_classes=form.num_classes + 1))


def test_the_form_of_an_image_folder_is_read_without_opening_a_file(tmp_path):
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / part / name).mkdir(parents=True)
            (tmp_path / part / name / "a.png").write_bytes(b"no image")
    found = data.form_of(f"image-folder:{tmp_path}")
    assert (found.input_shape, found.class_names) == ((3, 32, 32), ("cat", "dog"))


def without_records(settings):
    """The options of check-model for these settings, and no file of records."""
    Path(str(settings["data"]).partition(":")[2]).unlink(missing_ok=True)
    Path(str(settings.get("test", "none"))).unlink(missing_ok=True)
    names = ("data", "label_column", "spec", "text_column", "classes", "tokenizer", "max_length")
    return as_options({name: settings[name] for name in names if name in settings})


@pytest.mark.parametrize("make", [table, regression, texts])
def test_a_model_is_checked_for_rows_and_texts_without_their_records(make, tmp_path, capsys):
    options = without_records(make(tmp_path))
    name = "embedding-mean" if make is texts else "tabular-resnet"
    assert run(["check-model", name, *options, "--width", "0.1"]) == 0, capsys.readouterr()
    assert "Nothing has to change" in capsys.readouterr().out


@pytest.mark.parametrize("options", [[], ["--lora", "2"], ["--train-only", "*classifier*"]], ids=str)
def test_a_pretrained_network_is_checked_as_a_run_trains_it(options, tmp_path, capsys):
    network = f"hf:{pretrained_in(tmp_path)}"
    assert run(["check-model", network, "--json", *options]) == 0, capsys.readouterr()
    found = json.loads(capsys.readouterr().out)
    assert found["vocabulary"] == len(VOCABULARY) and found["input_shape"] == [64]  # as many as it has positions for
    frozen = sum("frozen" in layer["notes"] for layer in found["layers"])
    assert found["num_classes"] == 2 and (frozen > 5) == bool(options)


@pytest.mark.filterwarnings("default")
def test_a_head_of_other_classes_begins_anew_and_that_is_said(tmp_path, capsys):
    assert run(["check-model", f"hf:{pretrained_in(tmp_path)}", "--json", "--classes", "5"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["num_classes"] == 5
    assert captured.err.startswith("warning: The head of") and captured.err.count("\n") == 1


def test_what_is_wrong_with_many_layers_is_said_once(here, capsys):
    (here / "models_to_check.py").write_text(
        "from torch import nn\ndef normed():\n    layers = [nn.Flatten(), *(nn.BatchNorm1d(64) for _ in range(20))]\n"
        "    return nn.Sequential(*layers, nn.Embedding(3, 4, max_norm=1.0), nn.Linear(64, 10))\n"
    )
    assert run(["check-model", "models_to_check:normed", "--data", "digits"]) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "1. 1 and 19 more (BatchNorm1d): It mixes" in shown and shown.count("It mixes the examples") == 1
    assert "2. 21 (Embedding): max_norm" in shown
    assert run(["train", "--model", "models_to_check:normed", "--noise-multiplier", "1", "--policy", "none"]) == 2
    assert "got 1 (BatchNorm1d)" in (said := capsys.readouterr().err) and "There are 19 more of its kind." in said


def pretrained_in(folder):
    return bert_in(folder / "network")


def test_a_pretrained_network_that_cannot_be_trained_is_found(tmp_path, capsys):
    """Twin of the test above: nothing would be trained."""
    assert run(["check-model", f"hf:{pretrained_in(tmp_path)}", "--train-only", "*position_ids*"]) == 2
    assert "matches none" in capsys.readouterr().err


OWN = """
import torch
from torch import nn

def good(num_classes, input_shape):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))

def normed():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.Linear(32, 10))

def broken():
    raise KeyError("width")
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with a user's models."""
    (tmp_path / "models_to_check.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "models_to_check", raising=False)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["good"], 0), (["normed"], 1), (["normed", "--fix"], 0)],
    ids=["sound", "to be changed", "fixed"],
)
def test_the_exit_code_says_whether_something_has_to_change(arguments, code, here, capsys):
    name, *rest = arguments
    options = [f"models_to_check:{name}", "--data", "digits", *rest]
    assert run(["check-model", *options]) == code
    captured = capsys.readouterr()
    shown = " ".join(captured.out.split())
    assert captured.err == ""
    assert ("Nothing has to change" in shown) == (code == 0) and "million MACs" in shown
    assert sorted(path.name for path in here.iterdir() if path.name != "__pycache__") == ["models_to_check.py"]


def test_what_is_printed_is_documented(here, capsys):
    assert run(["check-model", "models_to_check:normed", "--data", "digits", "--json"]) == 1
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert captured.err == "" and not found["passed"] and found["input_shape"] == [1, 8, 8]
    assert run(["check-model", "--help"]) == 0
    help = capsys.readouterr().out
    assert "Example: dpquant" in help and all(name in help for name in found)
    assert all(name in help for part in ("findings", "layers") for name in found[part][0])


SHAPE = ["--input-shape", "1x8x8", "--classes", "10"]
BAD = {
    "no form": ["models_to_check:good"],
    "two forms": ["models_to_check:good", *SHAPE, "--data", "digits"],
    "no classes": ["models_to_check:good", "--input-shape", "1x8x8"],
    "classes of a data set": ["models_to_check:good", "--data", "digits", "--classes", "3"],
    "no vocabulary": ["models_to_check:good", "--tokens", "8", "--classes", "3"],
    "one class": ["models_to_check:good", "--input-shape", "8", "--classes", "1"],
    "a shape that is none": ["models_to_check:good", "--input-shape", "3,32,32", "--classes", "10"],
    "a size of zero": ["models_to_check:good", "--input-shape", "1x0x8", "--classes", "10"],
    "unknown data": ["models_to_check:good", "--data", "digit"],
    "a missing folder": ["cnn", "--data", "image-folder:/nowhere"],
    "a spec without data": ["models_to_check:good", *SHAPE, "--spec", "s.toml"],
    "names of classes without data": ["models_to_check:good", "--input-shape", "8", "--classes", "a,b"],
    "a table without its spec": ["mlp", "--data", "table:t.csv", "--label-column", "y"],
    "texts without a tokenizer": ["embedding-mean", "--data", "text:t.csv", "--text-column", "t"],
    "a pretrained network that is not there": ["hf:nowhere"],
    "a pretrained network of images": ["hf:nowhere", "--data", "digits"],
    "adapters of another network": ["cnn", "--data", "digits", "--lora", "4"],
    "image size without data": ["models_to_check:good", *SHAPE, "--image-size", "8"],
    "image size of zero": ["cnn", "--data", "digits", "--image-size", "0"],
    "unknown model": ["cnm", "--data", "digits"],
    "unknown function": ["models_to_check:god", "--data", "digits"],
    "unknown format": ["models_to_check:good", "--data", "digits", "--format", "fp4"],
    "a width of one's own": ["models_to_check:good", "--data", "digits", "--width", "2"],
}


@pytest.mark.parametrize("arguments", BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_exit_code_2(arguments, here, capsys):
    assert run(["check-model", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: Expected ") and captured.err.count("\n") == 1


def test_a_model_function_that_raises_is_one_line_with_the_users_place(here, capsys):
    assert run(["check-model", "models_to_check:broken", "--data", "digits"]) == 2
    captured = capsys.readouterr()
    line = OWN.splitlines().index('    raise KeyError("width")') + 1
    assert captured.out == "" and captured.err.count("\n") == 1
    assert f"KeyError: 'width' (at models_to_check.py:{line})" in captured.err


def test_a_long_name_of_a_layer_is_printed_whole(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    long = "encoder_" * 9 + "weights"
    print_model_check(results(), checked(nn.Sequential(OrderedDict({long: nn.Linear(6, 3)}))))
    lines = capsys.readouterr().out.splitlines()
    assert long in "".join(line.split(" ")[0] for line in lines) and "…" not in "".join(lines)
