# SPDX-License-Identifier: Apache-2.0
"""`dpquant export --to`: the file computes what the model does, says what is promised, and names no folder."""

import dataclasses
import json
import logging
import shutil
import zipfile

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import dpquant
from dpquant.app.cli import run as command
from dpquant.app.model_file import FORMATS, STATEMENT_END, DiffersError, Format, random_inputs, write_model
from dpquant.errors import ModelError, SettingError
from dpquant.privacy.ledger import Ledger
from dpquant.runs.loading import described
from dpquant.runs.names import DESCRIPTION, LEDGER, MODEL, RECORD
from dpquant.runs.record import RunRecord
from sources import images, pretrained, runs_on, table, texts

MAKE = {"images": images, "table": table, "texts": texts, "pretrained": pretrained}
TO = [pytest.param(name, marks=pytest.mark.filterwarnings("ignore")) for name in FORMATS]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """{kind: a run on such records that has ended}."""
    return runs_on(MAKE, tmp_path_factory.mktemp)


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the run on images, to be changed."""
    return shutil.copytree(finished["images"], tmp_path / "run")


def needs(name):
    for package in FORMATS[name].needs:
        pytest.importorskip(package)


def contents(path):
    """The bytes of a file and of everything that is packed in it."""
    found = [path.read_bytes()]
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as packed:
            found += [packed.read(name) for name in packed.namelist()]
    return found


@pytest.mark.parametrize("name", TO)
@pytest.mark.parametrize("kind", MAKE)
def test_a_file_computes_what_the_model_does_for_any_batch(kind, name, finished, tmp_path, capsys, caplog):
    needs(name)
    run, out = finished[kind], tmp_path / f"model.{name}"
    with caplog.at_level(logging.WARNING):
        assert command(["export", str(run), "--to", name, "--out", str(out), "--json"]) == 0
    captured = capsys.readouterr()
    done = json.loads(captured.out)
    assert captured.err == "" and caplog.records == []
    assert done["difference"] < 1e-5 and done["bytes"] == out.stat().st_size
    model, description = dpquant.load(run), described(run)
    for count in (2, 5):
        inputs = random_inputs(description, count, seed=99)
        found = FORMATS[name].outputs(out, description, inputs)
        with torch.no_grad():
            torch.testing.assert_close(found, model(inputs), rtol=1e-4, atol=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == [out.name, out.name + STATEMENT_END]


def statement_in(path):
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            return file.metadata()["privacy_statement"]
    if path.suffix == ".pt2":
        files = {"privacy.txt": ""}
        torch.export.load(path, extra_files=files)
        return files["privacy.txt"]
    import onnx

    return {one.key: one.value for one in onnx.load(path).metadata_props}["privacy_statement"]


@pytest.mark.parametrize("name", TO)
def test_the_statement_travels_in_the_file_and_beside_it_and_no_folder_does(name, finished, tmp_path):
    needs(name)
    for kind in ("images", "pretrained"):
        run, out = finished[kind], tmp_path / f"{kind}.{name}"
        done, record = write_model(run, name, out), RunRecord.read(run / RECORD)
        assert statement_in(out) == record.statement.strip()
        beside = out.with_name(out.name + STATEMENT_END).read_text()
        assert beside.startswith(record.statement.strip()) and done.sha256 in beside
        assert Ledger.verify(run / LEDGER).head in beside
        places = [str(run.parent).encode(), torch.__file__.rsplit("/", 2)[0].encode(), b"site-packages"]
        assert sum(place in data for data in contents(out) for place in places) == 0


def test_a_safetensors_file_has_the_parameters_and_what_the_model_is(finished, tmp_path):
    out = tmp_path / "model.safetensors"
    write_model(finished["images"], "safetensors", out)
    state = dpquant.load(finished["images"]).state_dict()
    assert all(torch.equal(values, state[name]) for name, values in load_file(out).items())
    with safe_open(out, framework="pt") as file:
        found = file.metadata()
    record = RunRecord.read(finished["images"] / RECORD)
    assert found["delta"] == f"{record.delta:g}" and found["run"] == record.provenance.run_id
    assert json.loads(found["model_json"])["class_names"] == ["bright", "dark"]


def shifted(path, description, inputs):
    return FORMATS["safetensors"].outputs(path, description, inputs) + 1e-3


def not_finite(path, description, inputs):
    return FORMATS["safetensors"].outputs(path, description, inputs) * torch.nan


def raising(path, description, inputs):
    raise RuntimeError("of another program")


@pytest.mark.parametrize("outputs", [shifted, not_finite])
def test_a_file_that_computes_something_else_is_not_written(outputs, run, tmp_path):
    formats = {"other": dataclasses.replace(FORMATS["safetensors"], outputs=outputs)}
    with pytest.raises(DiffersError, match="Nothing was written"):
        write_model(run, "other", tmp_path / "out", formats=formats)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_writer_that_raises_is_one_error(run, tmp_path):
    formats = {"other": dataclasses.replace(FORMATS["safetensors"], outputs=raising)}
    with pytest.raises(ModelError, match="of another program"):
        write_model(run, "other", tmp_path / "out", formats=formats)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_missing_package_is_one_line_with_the_command_that_installs_it(run, tmp_path):
    needed = Format(write=print, outputs=raising, needs=("torch", "no_such_package_of_dpquant"), extra="onnx")
    with pytest.raises(SettingError, match=r"no_such_package_of_dpquant is not .*pip install 'dpquant\[onnx\]'"):
        write_model(run, "other", tmp_path / "out", formats={"other": needed})


def cut_ledger(run):
    lines = (run / LEDGER).read_bytes().splitlines(keepends=True)
    (run / LEDGER).write_bytes(b"".join([lines[0], *lines[2:]]))


def other_weights(run):
    data = bytearray((run / MODEL).read_bytes())
    data[-1] ^= 1
    (run / MODEL).write_bytes(bytes(data))


WRONG = {
    "a format that is not known": (lambda run: None, ["--to", "pt3", "--out", "f"], 2, "Did you mean pt2"),
    "no file": (lambda run: None, ["--to", "pt2"], 2, "Expected a folder, or to and out"),
    "no format": (lambda run: None, ["--out", "f"], 2, "Expected a folder, or to and out"),
    "neither": (lambda run: None, [], 2, "Expected a folder, or to and out"),
    "both": (lambda run: None, ["d", "--to", "pt2", "--out", "f"], 2, "Expected a folder, or to and out"),
    "a file that is there": (lambda run: None, ["--to", "safetensors", "--out", "run"], 2, "which is there"),
    "a folder that is not": (lambda run: None, ["--to", "safetensors", "--out", "no/f"], 2, "not there"),
    "not ended": (lambda run: (run / RECORD).unlink(), ["--to", "safetensors", "--out", "f"], 2, "dpquant resume"),
    "no description": (
        lambda run: (run / DESCRIPTION).unlink(),
        ["--to", "safetensors", "--out", "f"],
        2,
        "holds none",
    ),
    "a ledger with a line less": (cut_ledger, ["--to", "safetensors", "--out", "f"], 1, "line 2 of"),
    "other weights": (other_weights, ["--to", "safetensors", "--out", "f"], 2, "SHA-256"),
}


@pytest.mark.parametrize(("change", "options", "code", "said"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_written_is_one_line(change, options, code, said, run, tmp_path, monkeypatch, capsys):
    change(run)
    monkeypatch.chdir(tmp_path)
    assert command(["export", "run", *options]) == code
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and said in captured.err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_file_is_told_in_one_line(run, tmp_path, capsys):
    assert command(["export", str(run), "--to", "safetensors", "--out", str(tmp_path / "f")]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert "[batch, 3, 8, 8]" in line and "differ from the model's by at most 0" in line
