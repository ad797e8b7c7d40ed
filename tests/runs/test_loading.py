# SPDX-License-Identifier: Apache-2.0
"""A run's model is loaded from its directory alone, as plain layers of torch, and computes what the run measured."""

import copy
import io
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import dpquant
from dpquant.app.export import export
from dpquant.data.pack import pack
from dpquant.errors import DataError, ModelError, SettingError
from dpquant.runs.describing import description_of
from dpquant.runs.description import DESCRIPTION_SCHEMA, ModelDescription
from dpquant.runs.evaluation import accuracy
from dpquant.runs.names import CONFIG, DESCRIPTION, DIVERGED, MODEL, RECORD, TOKENIZER
from dpquant.runs.place import Place
from dpquant.runs.record import RunRecord
from dpquant.runs.settings import TrainSettings
from dpquant.runs.sources import dataset_of
from dpquant.runs.train import train
from sources import TINY, images, pretrained, regression, table, texts

FIXTURES = Path(__file__).parent / "fixtures"
OWN = """
from torch import nn

def build(num_classes, input_shape):
    return nn.Sequential(nn.Flatten(), nn.Linear(64 * input_shape[0], 6), nn.BatchNorm1d(6), nn.Linear(6, num_classes))
"""


def trained(folder, settings):
    train(TrainSettings.chosen(settings), folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run on images that has ended."""
    folder = tmp_path_factory.mktemp("images")
    return trained(folder, images(folder))


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it, to be changed."""
    return shutil.copytree(finished, tmp_path / "run")


def assert_is_plain(model):
    """Torch's own layers alone, or the user's, in evaluation mode; nothing of dpquant's training."""
    for module in model.modules():
        room = type(module).__module__
        assert not room.startswith(("dpquant.engine", "dpquant.backends", "dpquant.training")), module
        assert not module.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def assert_all_of_torch_works(model, inputs):
    """torch.export, torch.func, a copy, and a pickle of the state."""
    with torch.no_grad():
        expected = model(inputs)
        graph = torch.export.export(model, (inputs,), strict=False).module()
        torch.testing.assert_close(graph(inputs), expected)
        torch.testing.assert_close(copy.deepcopy(model)(inputs), expected)
    called = torch.func.functional_call(model, dict(model.named_parameters()), (inputs,))
    torch.testing.assert_close(called, expected)
    stream = io.BytesIO()
    torch.save(model.state_dict(), stream)
    stream.seek(0)
    state = torch.load(stream, weights_only=True)
    assert state.keys() == model.state_dict().keys()
    again = copy.deepcopy(model)
    again.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(again(inputs), expected)


def test_the_model_of_a_run_computes_what_the_run_measured_and_works_with_all_of_torch(finished):
    model = dpquant.load(str(finished))
    assert_is_plain(model)
    test = dataset_of(Place(finished).settings()).test
    assert accuracy(model, test) == RunRecord.read(finished / RECORD).accuracy_test
    assert_all_of_torch_works(model, test.batch(torch.arange(4))[0])
    jacobian = torch.func.jacrev(model)(test.batch(torch.arange(1))[0])
    assert jacobian.shape == (1, 2, 1, 3, 8, 8)


def test_a_model_that_the_library_trained_works_with_all_of_torch_once_it_is_restored():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    records = [(torch.randn(1, 8, 8), torch.tensor(number % 2)) for number in range(20)]
    private = dpquant.make_private(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        records,
        plan=dpquant.PrivacyPlan(
            noise_multiplier=1.0, delta=1e-3, max_grad_norm=1.0, sample_rate=0.5, expected_batch_size=10, steps=2
        ),
        policy=dpquant.AllPolicy(),
        loss_fn=lambda m, batch: nn.functional.cross_entropy(m(batch[0]), batch[1], reduction="none"),
        backend="simulate",
        microbatch_size=8,
    )
    for epoch in private.epochs():
        for batch in epoch:
            private.step(batch)
    plain = dpquant.restore(private.model).requires_grad_(False).eval()
    assert_is_plain(plain)
    assert_all_of_torch_works(plain, torch.randn(3, 1, 8, 8))


@pytest.mark.parametrize("make", [table, regression, texts])
def test_the_model_of_rows_or_texts_is_loaded_without_their_files(make, tmp_path):
    run = trained(tmp_path, make(tmp_path))
    moved = shutil.move(run, tmp_path / "elsewhere")
    for file in tmp_path.iterdir():
        if file.is_file():
            file.unlink()
    model = dpquant.load(moved)
    assert_is_plain(model)
    assert (Path(moved) / TOKENIZER).exists() == (make is texts)
    state = load_file(Path(moved) / MODEL)
    assert all(torch.equal(state[name], values) for name, values in model.state_dict().items())


@pytest.mark.parametrize("lora", [None, 2])
def test_a_pretrained_network_is_loaded_without_its_folder(lora, tmp_path):
    pytest.importorskip("peft")
    settings = pretrained(tmp_path)
    run = trained(tmp_path, settings if lora is None else {**settings, "lora": lora})
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).unlink()
    assert_is_plain(model := dpquant.load(run))
    assert str(tmp_path) not in (run / DESCRIPTION).read_text().replace(f"hf:{tmp_path}", "")
    state = load_file(run / MODEL)
    assert all(torch.equal(state[name], values) for name, values in model.state_dict().items() if name in state)
    inputs = {name: torch.ones(2, 5, dtype=torch.int64) for name in ("input_ids", "attention_mask")}
    assert model(inputs).shape == (2, 2)


def test_an_own_network_is_imported_as_train_does_and_fixed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_network_of_a_test.py").write_text(OWN)
    run = trained(tmp_path, {**images(tmp_path), "model": "own_network_of_a_test:build", "fix": True, "width": 1.0})
    model = dpquant.load(run)
    assert_is_plain(model)
    assert isinstance(model[2], nn.GroupNorm)
    (tmp_path / "own_network_of_a_test.py").unlink()
    del sys.modules["own_network_of_a_test"]
    with pytest.raises(ModelError, match="own_network_of_a_test"):
        dpquant.load(run)


def test_packed_records_are_described_as_their_source(tmp_path):
    for make in (images, table, texts):
        folder = tmp_path / make.__name__
        folder.mkdir()
        settings = make(folder)
        source = TrainSettings.chosen(settings)
        pack(lambda store, source=source: dataset_of(source, store), folder / "packed")
        others = {name: settings[name] for name in (*TINY, "model") if name in settings}
        packed = TrainSettings.chosen({**others, "data": f"packed:{folder / 'packed'}"})
        model = nn.Linear(1, 1)
        found, expected = (description_of(one, dataset_of(one), model) for one in (packed, source))
        assert found == expected
        assert dataset_of(packed).tokenizer == dataset_of(source).tokenizer


def no_record(run):
    (run / RECORD).unlink()


def no_model(run):
    no_record(run)
    (run / MODEL).unlink()


def other_weights(run):
    data = bytearray((run / MODEL).read_bytes())
    data[-1] ^= 1
    (run / MODEL).write_bytes(bytes(data))


def diverged(run):
    no_record(run)
    (run / DIVERGED).write_text("why")


def of_another_width(run):
    fields = json.loads((run / DESCRIPTION).read_text())
    (run / DESCRIPTION).write_text(json.dumps({**fields, "width": 0.2}))


REFUSED = {
    "stopped": (no_record, SettingError, "epsilon is not final. Finish it: dpquant resume"),
    "killed early": (no_model, SettingError, "no model yet"),
    "diverged": (diverged, SettingError, "It diverged"),
    "no run": (lambda run: [no_record(run), (run / CONFIG).unlink()], SettingError, "directory of a run"),
    "other weights": (other_weights, DataError, "to have the SHA-256"),
    "no weights": (lambda run: (run / MODEL).unlink(), DataError, "is not there"),
    "no description": (lambda run: (run / DESCRIPTION).unlink(), DataError, "it holds none"),
    "half a description": (lambda run: (run / DESCRIPTION).write_text("{"), DataError, "to describe a run's model"),
    "a newer description": (lambda run: (run / DESCRIPTION).write_text('{"schema": 99}'), DataError, "schema 99"),
    "another description": (of_another_width, DataError, "to hold the parameters of model=mlp"),
    "half a record": (lambda run: (run / RECORD).write_text("{"), DataError, "a run's record"),
}


@pytest.mark.parametrize(("change", "error", "said"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_finished_run_or_no_longer_its_model_is_refused(change, error, said, run):
    change(run)
    with pytest.raises(error, match=said):
        dpquant.load(run)


def test_what_is_no_path_is_refused():
    with pytest.raises(SettingError, match="Expected run to be the path"):
        dpquant.load(None)


def test_a_description_of_every_schema_is_read_for_ever():
    for schema in range(1, DESCRIPTION_SCHEMA + 1):
        found = ModelDescription.read(FIXTURES / f"model-{schema}.json")
        assert found.model == "cnn" and found.num_classes == 10 and found.kind == "images"
        assert found.input_shape == [1, 8, 8] and found.normalisation is not None and found.normalisation.std == 0.5
    latest = FIXTURES / f"model-{DESCRIPTION_SCHEMA}.json"
    assert ModelDescription.read(latest).to_json() == latest.read_text()


def test_a_run_whose_description_is_of_schema_1_is_loaded(run):
    fields = json.loads((run / DESCRIPTION).read_text())
    of_1 = json.loads((FIXTURES / "model-1.json").read_text())
    (run / DESCRIPTION).write_text(json.dumps({name: fields[name] for name in of_1} | {"schema": 1}))
    assert_is_plain(dpquant.load(run))


def test_the_folder_of_an_export_is_loaded_and_described_without_folders_of_the_machine(tmp_path):
    run = trained(tmp_path, pretrained(tmp_path))
    export(run, tmp_path / "out")
    assert not any(str(tmp_path).encode() in path.read_bytes() for path in (tmp_path / "out").iterdir())
    assert_is_plain(dpquant.load(tmp_path / "out"))
    assert (tmp_path / "out" / TOKENIZER).read_bytes() == (tmp_path / "tokenizer.json").read_bytes()
